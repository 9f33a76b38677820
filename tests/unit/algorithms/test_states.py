"""What a resumed run starts from: a state restored into an object that already has another one leaves nothing of that."""

import copy
import dataclasses
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keel.algorithms
from keel.algorithms import coefficients
from keel.algorithms.coefficients import Observation
from keel.algorithms.objective import Objective
from keel.algorithms.types import Measured
from keel.config.regularizer import ControllerSettings
from keel.observability.metric_table import TABLE
from keel.observability.metrics import RunMetrics
from tabular import CASES, case, heads, objective, table

STEP, OTHER = table(), table(shift={7: 3.0, 2: -1.0})
CONTROLLERS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "proportional": {"kind": "proportional", "target_nats": 3.0, "horizon_completions": 20},
    "dual": {"kind": "dual", "target_nats": 3.0},
    "band": {"kind": "band", "low_nats": 3.0, "high_nats": 3.1, "rate": 0.001},
    "safe": {"kind": "safe"},
}


def snapshot(thing: Any) -> Any:
    """Everything a Keel object holds, down to numbers: what must be equal for two of them to act alike."""
    if isinstance(thing, Mapping):
        return {str(key): snapshot(item) for key, item in thing.items()}
    if isinstance(thing, list | tuple):
        return [snapshot(item) for item in thing]
    if type(thing).__module__.startswith("keel.") and not dataclasses.is_dataclass(type(thing).__base__):
        inside = {name: item for name, item in vars(thing).items() if name not in ("settings", "by", "kl", "entropy")}
        return {"": type(thing).__name__, **{name: snapshot(item) for name, item in inside.items()}}
    return copy.deepcopy(thing)


def through_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """As state.json gives it back."""
    return json.loads(json.dumps(state))


# ---- controllers


def observations(seed: int, count: int) -> Iterator[Observation]:
    draw = np.random.default_rng(seed)
    for _ in range(count):
        nats, kl, entropy, reward = draw.uniform(0.1, 6.0, size=4)
        yield Observation(float(nats), int(draw.integers(1, 9)), float(kl), float(entropy), float(reward))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("steps", "others"), [(0, 5), (1, 3), (7, 2), (60, 130), (130, 60)])
@pytest.mark.parametrize("kind", list(CONTROLLERS))
def test_a_coefficient_is_restored_over_another_history(kind: str, steps: int, others: int, sign: float) -> None:
    settings = ControllerSettings(**CONTROLLERS[kind])
    saved, other = (coefficients.coefficient(settings, 0.4, sign) for _ in range(2))
    for seen in observations(1, steps):
        saved.update(seen)
    for seen in observations(2, others):
        other.update(seen)
    if kind != "fixed":
        assert snapshot(other) != snapshot(saved)
    before, state = snapshot(saved), saved.state()
    other.restore(through_json(state))
    assert snapshot(other) == before
    for seen in observations(3, 4):
        saved.update(seen)
        other.update(seen)
        assert snapshot(other) == snapshot(saved)
    assert kind == "fixed" or snapshot(saved) != before
    saved.restore(state)  # the learner goes back to it when a step is refused: nothing above may have changed it
    assert snapshot(saved) == before


def test_the_coefficient_of_the_checkpoint_counts_not_that_of_the_configuration() -> None:
    subject = coefficients.coefficient(ControllerSettings(), 0.4, 1.0)
    subject.restore({"value": 0.7})
    assert subject.value == 0.7


# ---- objectives


def take_step(subject: Objective, step: Any, version: int) -> None:
    values = heads(subject, step.values)
    logprobs = step.logprobs(step.logits).numpy()
    subject.weigh(step.batch, Measured(logprobs, None if values is None else values.numpy(), version=version))
    subject.adapt(step.batch, {"clamped_policy_entropy_nats": 0.01 * len(step.batch) * (1 + version)})


def adaptive(kind: str) -> dict[str, Any]:
    """KL under one controller; where that is not SAFE's, entropy under one of its own beside it."""
    kl = {"coefficient": 0.3, "placement": "loss", "estimator": "k2", "controller": CONTROLLERS[kind]}
    dual = {"kind": "dual", "target_nats": 2.0, "rate": 0.3}
    return {"kl": kl, "entropy": {"form": "token_bonus", "coefficient": 0.2, "controller": dual}}


VARIANTS: dict[str, Any] = {name: (lambda name=name: case(name)) for name in CASES}
VARIANTS |= {
    f"kl {kind}": (lambda kind=kind: objective(regularizer=adaptive(kind))) for kind in CONTROLLERS if kind != "band"
}
VARIANTS["entropy band"] = lambda: objective(
    regularizer={
        "entropy": {"form": "token_bonus", "coefficient": 0.2, "top_share": 0.5, "controller": CONTROLLERS["band"]}
    }
)
VARIANTS["popart of two heads"] = lambda: objective(
    objective={
        "advantage": "gae",
        "normalize_reward": True,
        "critic": {"popart": True, "popart_rate": 0.4},
        "entropy_advantage": {},
    },
    regularizer=adaptive("dual"),
)
MOVING = {"entropy band", "kl proportional", "kl dual", "kl safe", "kl fixed", "none", "eapo", "popart of two heads"}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_an_objective_is_restored_over_another_history(name: str) -> None:
    saved, other = VARIANTS[name](), VARIANTS[name]()
    fresh = snapshot(saved)
    for version in range(3):
        take_step(saved, STEP, version)
    for version in range(5):
        take_step(other, OTHER, version)
    before, state = snapshot(saved), saved.state()
    assert (snapshot(other) != before) == (before != fresh) == (name in MOVING)
    other.restore(through_json(state))
    assert snapshot(other) == before
    assert other.coefficients() == saved.coefficients()
    for version in range(2):
        take_step(saved, OTHER, version)
        take_step(other, OTHER, version)
    assert snapshot(other) == snapshot(saved)
    saved.restore(state)
    assert snapshot(saved) == before


def test_every_class_that_has_a_state_is_restored_here() -> None:
    """A new one is found by its methods: it belongs into a table above."""
    tried = {type(coefficients.coefficient(ControllerSettings(**config), 1.0, 1.0)) for config in CONTROLLERS.values()}
    tried |= {type(build()) for build in VARIANTS.values()} | {Objective}
    for result in pkgutil.iter_modules(keel.algorithms.__path__):
        module = importlib.import_module(f"keel.algorithms.{result.name}")
        for _, class_ in inspect.getmembers(module, inspect.isclass):
            if class_.__module__ == module.__name__ and hasattr(class_, "restore"):
                assert class_ in tried, class_


# ---- counters


def counted(metrics: RunMetrics, factor: float) -> None:
    """Every counter gets a number of its own."""
    for number, metric in enumerate(metric for metric in TABLE if metric.kind == "counter"):
        label = "/".join(f"l{place}" for place in range(len(metric.labels)))
        metrics.add({metric.name: {label: factor * (1 + number)} if label else factor * (1 + number)})
        if label:
            metrics.add({metric.name: {label.replace("l0", f"only {factor}"): 1.0}})


@pytest.mark.parametrize(("saved", "present"), [(2.0, 3.0), (3.0, 2.0)])
def test_counters_are_those_of_the_checkpoint_but_what_happened_to_machines_has_happened(
    tmp_path: Path, saved: float, present: float
) -> None:
    stored, other = (RunMetrics("run", tmp_path / f"{name}.jsonl") for name in ("stored", "other"))
    counted(stored, saved)
    counted(other, present)
    gauges = {metric.name: metric.operational for metric in TABLE if metric.kind == "gauge" and not metric.labels}
    other.set(dict.fromkeys(gauges, 3.0))
    other.restore(through_json(stored.totals))
    operational = 0
    for number, metric in enumerate(metric for metric in TABLE if metric.kind == "counter"):
        label = "/".join(f"l{place}" for place in range(len(metric.labels)))
        result = other.totals[metric.name]
        factor = max(saved, present) if metric.operational else saved
        operational += metric.operational
        subject = result[label] if label else result
        assert subject == factor * (1 + number), metric.name
        if label:
            labels = {saved, present} if metric.operational else {saved}
            assert set(result) == {label} | {label.replace("l0", f"only {item}") for item in labels}, metric.name
    assert operational > 2
    line = other.record(4, 1.0)
    assert {name for name in gauges if name in line} == {name for name, operational in gauges.items() if operational}
    assert 0 < sum(gauges.values()) < len(gauges)


def test_totals_of_no_checkpoint_are_none(tmp_path: Path) -> None:
    metrics = RunMetrics("run", tmp_path / "metrics.jsonl")
    counted(metrics, 2.0)
    metrics.restore({})
    assert metrics.totals["steps_total"] == 0.0 and metrics.totals["samples_failed_total"] == {}
