"""Settings from files and overrides, and one line for every mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from keel import config
from keel.config import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def tree(**blocks: Any) -> dict[str, Any]:
    basic = {
        "policy": {"model": "m"},
        "prompts": {"source": "p", "max_tokens": 16},
        "rewards": [{"name": "a", "source": "pkg:function"}],
    }
    return {**basic, **blocks}


def message(changed: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(changed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    settings = config.load(path)
    (tmp_path / "again.yaml").write_text(config.dump(settings))
    assert config.load(tmp_path / "again.yaml") == settings
    assert config.digest(settings) in config.dump(settings).splitlines()[0]


def test_the_two_quickstarts_differ_in_the_regulariser_alone() -> None:
    folder = Path(__file__).parent.parent / "configs"
    kl, maxent = (yaml.safe_load((folder / f"quickstart{suffix}.yaml").read_text()) for suffix in ("", "-maxent"))
    assert kl.pop("regulariser") != maxent.pop("regulariser")
    assert (kl["run"].pop("name"), maxent["run"].pop("name")) == ("quickstart", "quickstart-maxent")
    assert kl == maxent


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (tree(polcy={}), "polcy: unknown setting; did you mean policy?"),
        (tree(learners={"learning_rat": 1}), "learners.learning_rat: unknown setting; did you mean learning_rate?"),
        (tree(rewards=[{"name": "a", "source": "a:b", "wieght": 2}]), "rewards.0.wieght: unknown setting; did you mean weight?"),
        (tree(regulariser={"kl": {"betta": 1}}), "regulariser.kl.betta: unknown setting; expected one of"),
        (tree(run={"steps": "many"}), "run.steps='many': input should be a valid integer"),
        (tree(run={"steps": 0}), "run.steps=0: input should be greater than or equal to 1"),
        ({"policy": {"model": "m"}, "rewards": []}, "prompts: missing"),
        (tree(sampling={"samples_per_prompt": 1}), "sampling.samples_per_prompt=1: objective.advantage=rloo"),
        (tree(reference=None, regulariser={"kl": {"coefficient": 0.1}}), "needs column reference_logprobs but reference is null"),
        (tree(reference=None, rewards=[{"name": "f", "kind": "reference"}]), "rewards.f: kind=reference but reference is null"),
        (tree(rewards=[{"name": "a", "source": "a:b", "role": "monitor"}]), "every role is monitor"),
        (tree(rewards=[{"name": "a", "source": "a:b"}] * 2), "name 'a' is used twice"),
        (tree(rewards=[{"name": "a", "source": "a.b"}]), "expected module:function"),
        (tree(rewards=[{"name": "a", "kind": "reference", "source": "x"}]), "expects no source"),
        (tree(regulariser={"kl": {"placement": "loss"}}), "estimator=k1 in the loss: its expected gradient is zero"),
        (tree(regulariser={"kl": {"estimator": "k3"}}), "estimator=k3 in the reward"),
        (tree(objective={"level": "sequence"}), "level=sequence has one ratio a completion"),
        (tree(objective={"level": "sequence", "reduction": "token_mean", "correction": "none"}), "expected sequence_sum"),
        (tree(buffer={"groups_per_step": 2, "groups_per_batch": 3}), "buffer.groups_per_batch=3"),
        (tree(buffer={"groups_per_step": 1}, learners={"count": 9}), "learners.count=9: a step has 4 rows"),
        (tree(learners={"tokens_per_batch": 8}), "learners.tokens_per_batch=8"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(changed: dict[str, Any], expected: str) -> None:
    assert expected in message(changed)


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, tree())
    changes = [
        "learners.learning_rate=6e-5",
        "rewards.a.weight=2",
        "rewards.0.role=train",
        "reference=null",
        "run.name=x",
    ]
    settings = config.load(path, changes)
    assert settings.learners.learning_rate == 6e-5
    assert settings.rewards[0].weight == 2
    assert settings.reference is None
    assert settings.run_directory == "runs/x"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps", "expected key.key=value"),
        ("rewards.b.weight=1", "no entry rewards.b; expected one of a"),
        ("policy.model.size=3", "policy.model is not a block"),
        ("run.steps=[", "not YAML"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace(".", r"\.")):
        config.load(write(tmp_path, tree()), [override])


@pytest.mark.parametrize(
    ("content", "expected"), [("a: [", "not YAML"), ("- 1", "list at the top"), ("", "NoneType at the top")]
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        config.load(path)
    with pytest.raises(ConfigError, match="no such file"):
        config.load(tmp_path / "absent.yaml")


def test_the_digest_covers_what_changes_a_number() -> None:
    base = config.digest(config.parse(tree()))
    same = [{"run": {"directory": "elsewhere"}}, {"metrics": {"port": 1}}, {"deadlines": {"step_seconds": 5}}]
    assert all(config.digest(config.parse(tree(**blocks))) == base for blocks in same)
    others = [{"run": {"seed": 1}}, {"learners": {"learning_rate": 1e-3}}, {"sampling": {"temperature": 0.9}}]
    assert all(config.digest(config.parse(tree(**blocks))) != base for blocks in others)
