"""`keel plan`: predictions against closed forms, splits against all of them, memory by hand, and the command."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel.analysis.allocation import best, of_cpus, of_gpus
from keel.analysis.plan import Machine, Prediction, footprints, predict
from keel.analysis.rates import Rates
from keel.cli import main
from keel.cluster.capacity import configured
from keel.config import loader
from keel.errors import ConfigError
from planned import APART, GIVEN, rates, settings


def test_a_synchronous_step_is_the_sum_of_its_stages() -> None:
    """Four groups of two samples: eight sequences through every stage."""
    result = predict(settings(), rates(), configured(settings()), APART)
    whole = (1 + 8 * 0.25) + 0.5 + (0.25 + 8 * 0.125) + (1 + 8 * 0.5) + 0.125 + 0.25
    assert result.step_seconds == pytest.approx(whole)
    assert result.step_seconds_p90 == pytest.approx(whole)
    assert result.tokens_per_second == pytest.approx(8 * 100 / whole)
    assert result.busy == pytest.approx({"generator": 3 / whole, "reference": 0.5 / whole, "scorer": 1.25 / whole, "learner": 5 / whole})  # fmt: skip
    for role in result.counts:
        assert result.busy[role] + sum(result.idle[role].values()) == pytest.approx(1.0)
    assert result.idle["learner"]["generator"] == pytest.approx(3 / whole)
    assert result.staleness == {0: 1.0}


def test_ranks_divide_what_they_can() -> None:
    counts = {**configured(settings()), "learner": 4}
    slow = rates(learner={"communication_seconds": 0.75})
    one, four = (predict(settings(), slow, config, APART) for config in (configured(settings()), counts))
    assert one.step_seconds - four.step_seconds == pytest.approx((1 + 8 * 0.5) - (1 + 2 * 0.5 + 0.75))


def test_a_broadcast_passes_every_node() -> None:
    counts = {**configured(settings(groups=20)), "generator": 20}
    sizes, far = settings(groups=20), rates(weights={"node_seconds": 0.5})
    here, present = (predict(sizes, config, counts, APART).step_seconds for config in (rates(), far))
    assert present - here == pytest.approx(2 * 0.5), "twenty generators are on three nodes"


def test_what_does_not_fit_into_a_generator_together_is_decoded_in_waves() -> None:
    narrow = settings(generators={"max_sequences": 2})
    wide, slow = (predict(config, rates(), configured(config), APART).step_seconds for config in (settings(), narrow))
    assert slow - wide == pytest.approx((4 - 1) * 1.0), "eight sequences, two together"


def test_variation_is_of_the_size_that_was_given() -> None:
    sizes = settings(groups=1)
    steady, uneven = rates(), rates(generator={"variation_ratio": 0.5})
    result = predict(sizes, uneven, configured(sizes), APART, steps=3000)
    assert result.step_seconds == pytest.approx(predict(sizes, steady, configured(sizes), APART).step_seconds, rel=0.01)
    assert result == predict(sizes, uneven, configured(sizes), APART, steps=3000), "seeded"
    drawn = predict(sizes, rates(generator={"relative_seconds": [0.5, 1.5]}), configured(sizes), APART, steps=200)
    assert drawn.step_seconds_p90 - result.step_seconds == pytest.approx(0.5 * 1.5, abs=0.05)


@pytest.mark.parametrize(("staleness", "decoding"), [(0, 1.0), (1, 1.0), (0, 20.0)])
def test_the_best_split_is_the_best_of_all(staleness: int, decoding: float) -> None:
    """More splits than are all tried, on a budget small enough to try everything that could win here.

    Decoding of 20 s whatever the batch: shares by work, where the search starts, are far from the best.
    """
    given = rates(generator={"fixed_seconds": decoding})
    sizes = settings(staleness, groups=16)
    counts, tried = configured(sizes), []

    def simulate(config: Any) -> Prediction:
        tried.append(dict(config))
        return predict(sizes, given, config, APART, steps=6)

    result = best(of_gpus(sizes, counts, 12), given, counts, simulate)
    assert all(config["generator"] + config["reference"] + config["learner"] <= 12 for config in tried)
    assert len(tried) < 150, "of 2640"
    every = [
        simulate({"generator": generators, "scorer": scorers, "reference": references, "learner": ranks})
        for generators, scorers, references, ranks in itertools.product(
            range(1, 7), range(1, 5), range(1, 7), range(1, 7)
        )
        if generators + references + ranks == 12
    ]
    assert result[0].step_seconds <= 1.01 * min(item.step_seconds for item in every)


def test_a_slow_role_gets_the_devices() -> None:
    sizes = settings(2, groups=16)
    slow = rates(generator={"sequence_seconds": 4.0})
    result = best(of_gpus(sizes, configured(sizes), 10), slow, configured(sizes), lambda config: predict(sizes, slow, config, APART, steps=8))  # fmt: skip
    assert result[0].counts["generator"] >= 7


def test_on_shared_cores_more_workers_do_not_help() -> None:
    sizes = settings(1, groups=8, **{name: {"threads": 1} for name in ("generators", "reference", "learners")})
    counts, machine = configured(sizes), Machine(cores=1.0)
    result = best(
        of_cpus(sizes, counts, 2), rates(), counts, lambda config: predict(sizes, rates(), config, machine, steps=8)
    )
    assert sum(result[0].counts.values()) <= 5
    alone = predict(sizes, rates(), counts, machine, steps=8)
    assert result[0].step_seconds > 0.9 * alone.step_seconds


def test_a_budget_too_small_for_one_of_each_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpus=2: one worker of each role takes 3"):
        of_gpus(settings(), configured(settings()), 2)


def test_memory_is_bytes_a_parameter() -> None:
    """Seven billion parameters in bf16 on eight ranks: ZeRO's own numbers (1910.02054, section 5): 2 + 2 + 12 bytes."""
    sizes = settings()
    for stage, num_bytes in ((1, 2 + 2 + 12 / 8), (2, 2 + (2 + 12) / 8), (3, (2 + 2 + 12) / 8)):
        learners = sizes.learners.model_copy(update={"zero_stage": stage})
        result = {
            footprint.role: footprint
            for footprint in footprints(sizes.model_copy(update={"learners": learners}), 7 * 10**9, 8)
        }
        assert result["learner"].num_bytes == pytest.approx(7e9 * num_bytes)
    assert result["generator"].num_bytes == 14e9 + 2**30
    assert result["reference"].num_bytes == 14e9
    assert result["node"].parts == {"published weights, old and new": 28e9}


@pytest.mark.parametrize(("stage", "num_bytes"), [(1, 4 + 4 + 12 / 8), (2, 4 + (4 + 12) / 8), (3, (4 + 4 + 8) / 8)])
def test_in_fp32_only_stage_3_keeps_no_second_copy_of_the_weights(stage: int, num_bytes: float) -> None:
    """DeepSpeed 0.19.8: stage_1_and_2.py:560 clones the partition whatever its type, stage3.py:1162 does not."""
    sizes = settings(learners={"zero_stage": stage, "precision": "fp32"})
    (learner,) = [footprint for footprint in footprints(sizes, 10**9, 8) if footprint.role == "learner"]
    assert learner.num_bytes == pytest.approx(1e9 * num_bytes)


READERS = [
    ({"kl": {"exact_share": 0.1}}, True),
    ({"kl": {"coefficient": 0.1, "placement": "loss", "estimator": "exact"}}, True),
    ({"kl": {"coefficient": 0.1, "placement": "loss", "estimator": "k3"}}, False),
]


@pytest.mark.parametrize(("regularizer", "held"), READERS)
def test_a_learner_that_reads_the_references_vocabulary_holds_it(regularizer: dict[str, Any], held: bool) -> None:
    sizes = settings(regularizer=regularizer, reference={"dtype": "float32"})
    (learner,) = [footprint for footprint in footprints(sizes, 10**9, 8) if footprint.role == "learner"]
    assert learner.parts.get("reference") == (4e9 if held else None)


ON_GPUS = {"generators": {"gpus": 1, "tensor_parallel": 4}, "reference": {"gpus": 0.5}, "learners": {"gpus": 1}}


def test_a_tensor_parallel_generator_takes_all_its_devices() -> None:
    sizes = settings(2, groups=16, **ON_GPUS)
    counts = configured(sizes)
    budget = of_gpus(sizes, counts, 8)
    assert budget.costs == {"generator": 4.0, "reference": 0.5, "scorer": 0.0, "learner": 1.0}
    assert budget.most == {"generator": 2, "reference": 16, "scorer": 8, "learner": 8}
    assert budget.allows({"generator": 1, "reference": 2, "scorer": 1, "learner": 3})
    assert not budget.allows({"generator": 2, "reference": 1, "scorer": 1, "learner": 1})
    (generator,) = [footprint for footprint in footprints(sizes, 10**9, 1) if footprint.role == "generator"]
    assert generator.parts == {"weights": 2e9 / 4, "KV cache": 2**30}, "of one of the four"
    far = rates(weights={"node_seconds": 0.5})
    three, two = (predict(sizes, far, {**counts, "generator": count}, APART).step_seconds for count in (5, 4))
    assert predict(sizes, rates(), {**counts, "generator": 5}, APART).step_seconds < three
    assert three != two


def test_cores_are_no_budget_for_workers_on_gpus() -> None:
    sizes = settings(**ON_GPUS)
    with pytest.raises(ConfigError, match=r"--cpus=4: generators.tensor_parallel=4; expected --gpus"):
        of_cpus(sizes, configured(sizes), 4)


def config_file(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(loader.dump(settings(1)))
    return path


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    main.app(["plan", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_the_command_plans_with_given_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, saved = tmp_path / "rates.yaml", tmp_path / "saved.yaml"
    given.write_text(yaml.safe_dump({**GIVEN, "policy_parameters": 10**9}))
    arguments = [
        str(config_file(tmp_path)),
        "--rates",
        str(given),
        "--gpus",
        "6",
        "--max-staleness",
        "0",
        "--max-staleness",
        "2",
    ]
    tree = json.loads(plan(capsys, *arguments, "--save-rates", str(saved), "--json"))
    assert [item["max_staleness"] for item in tree["plans"]] == [0, 2]
    assert tree["plans"][0]["configured"]["step_seconds"] == pytest.approx(10.125)
    best_counts = tree["plans"][1]["best"][0]["counts"]
    assert best_counts["generator"] + best_counts["reference"] + best_counts["learner"] <= 6
    assert tree["memory_bytes"]["generator"] == {"weights": 2e9, "KV cache": 2**30}
    assert loader.load_as(Rates, saved) == loader.load_as(Rates, given)
    shown = plan(capsys, *arguments)
    assert "best counts for the budget, max_staleness 2" in shown and "10.12" in shown


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, path = tmp_path / "rates.yaml", str(config_file(tmp_path))
    given.write_text(yaml.safe_dump({**GIVEN, "generator": {"fixed_seconds": -1, "sequence_seconds": 0}}))
    with pytest.raises(ConfigError, match=r"generator.fixed_seconds=-1"):
        plan(capsys, path, "--rates", str(given))
    with pytest.raises(ConfigError, match=r"--rates=.*: --from is given, too"):
        plan(capsys, path, "--rates", str(given), "--from", str(tmp_path))
    with pytest.raises(ConfigError, match=r"--cpus=2: --gpus is given, too"):
        plan(capsys, path, "--rates", str(given), "--gpus", "8", "--cpus", "2")
    given.write_text(yaml.safe_dump({name: value for name, value in GIVEN.items() if name != "reference"}))
    with pytest.raises(ConfigError, match=r"rates.reference: missing"):
        plan(capsys, path, "--rates", str(given))


def test_without_a_budget_workers_share_the_cores_that_the_process_may_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container or a job of one core on a machine of 64."""
    given = tmp_path / "rates.yaml"
    given.write_text(yaml.safe_dump(GIVEN))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {5})
    arguments = [str(config_file(tmp_path)), "cluster.address=local", "--rates", str(given), "--json"]
    assert json.loads(plan(capsys, *arguments))["machine"]["cores"] == 1
    assert json.loads(plan(capsys, *arguments, "--cpus", "4"))["machine"]["cores"] == 4


def test_the_same_counts_take_the_same_time_in_both_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The search simulates few steps: another share of them has an evaluation."""
    given = tmp_path / "rates.yaml"
    given.write_text(yaml.safe_dump(GIVEN))
    arguments = [str(config_file(tmp_path)), "evaluation.every_steps=7", "--rates", str(given), "--gpus", "3", "--json"]
    (result,) = json.loads(plan(capsys, *arguments))["plans"]
    assert result["best"][0] == result["configured"]


def test_what_is_wrong_is_said_before_minutes_of_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from keel.cli import plan_commands

    def measure(*_: Any) -> Rates:
        raise AssertionError("measured")

    monkeypatch.setattr(plan_commands, "_rates", measure)
    path = str(config_file(tmp_path))
    with pytest.raises(ConfigError, match=r"--gpus=1: one worker of each role takes 3"):
        plan(capsys, path, "--gpus", "1")
    with pytest.raises(ConfigError, match=r"--save-rates=.*/no/rates.yaml: no such folder"):
        plan(capsys, path, "--save-rates", str(tmp_path / "no" / "rates.yaml"))
