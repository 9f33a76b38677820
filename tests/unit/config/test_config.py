"""Settings from files and overrides, and one line for every mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from keel import __version__
from keel.config import loader
from keel.config.run import Settings
from keel.config.stages import RewardModelSettings
from keel.errors import ConfigError
from setting_blocks import sections
from shipped import FILES, identity, settings_class


def tree(**blocks: Any) -> dict[str, Any]:
    basic = {
        "policy": {"model": "m"},
        "prompts": {"source": "p", "max_tokens": 16},
        "rewards": [{"name": "a", "source": "pkg:function"}],
    }
    return {**basic, **blocks}


def message(changed: dict[str, Any]) -> str:
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        loader.parse(changed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_every_shipped_configuration_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    settings = loader.load_as(settings_class(path), path)
    (tmp_path / "again.yaml").write_text(loader.dump(settings))
    assert loader.load_as(settings_class(path), tmp_path / "again.yaml") == settings
    assert loader.digest(settings) in loader.dump(settings).splitlines()[0]


def test_the_two_quickstarts_differ_in_the_regularizer_alone() -> None:
    folder = Path(__file__).parents[3] / "configs"
    kl, maxent = (yaml.safe_load((folder / f"quickstart{suffix}.yaml").read_text()) for suffix in ("", "-maxent"))
    assert kl.pop("regularizer") != maxent.pop("regularizer")
    assert (kl["run"].pop("name"), maxent["run"].pop("name")) == ("quickstart", "quickstart-maxent")
    assert kl == maxent


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (tree(polcy={}), "polcy: unknown setting; did you mean policy?"),
        ({"polcy": {"model": "m"}, "prompts": {"source": "p"}, "rewards": []}, "polcy: unknown setting; did you mean policy?"),
        (tree(learners={"learning_rat": 1}), "learners.learning_rat: unknown setting; did you mean learning_rate?"),
        (tree(rewards=[{"name": "a", "source": "a:b", "wieght": 2}]), "rewards.0.wieght: unknown setting; did you mean weight?"),
        (tree(regularizer={"kl": {"betta": 1}}), "regularizer.kl.betta: unknown setting; expected one of"),
        (tree(reference={"modle": "m"}), "reference.modle: unknown setting; did you mean model?"),
        (tree(run={"steps": "many"}), "run.steps='many': input should be a valid integer"),
        (tree(run={"steps": 0}), "run.steps=0: input should be greater than or equal to 1"),
        (tree(run=None), "run=None: input should be a valid dictionary"),
        (tree(rewards=[3]), "rewards.0=3: input should be a valid dictionary"),
        (tree(rewards=[]), "rewards=[]: list should have at least 1 item"),
        (tree(learners={"learning_rate": float("nan")}), "learners.learning_rate=nan: input should be a finite number"),
        (tree(sampling={"stop_token_ids": [1, "x"]}), "sampling.stop_token_ids.1='x': input should be a valid integer"),
        (tree(objective={"advantage": "foo"}), "objective.advantage='foo': expected rloo, group_mean, grpo"),
        (tree(objective={"advantage": "gae"}), "objective.critic=null: advantage=gae needs a learned value"),
        ({"policy": {"model": "m"}, "rewards": []}, "prompts: missing"),
        (tree(sampling={"samples_per_prompt": 1}), "sampling.samples_per_prompt=1: rloo compares"),
        (tree(reference=None, regularizer={"kl": {"coefficient": 0.1}}), "needs column reference_logprobs but reference is null"),
        (tree(reference=None, rewards=[{"name": "f", "kind": "reference"}]), "rewards.f: kind=reference but reference is null"),
        (tree(rewards=[{"name": "a", "source": "a:b", "role": "monitor"}]), "rewards: none has role train"),
        (tree(rewards=[{"name": "a", "source": "a:b"}] * 2), "name 'a' is used twice"),
        (tree(rewards=[{"name": "a", "source": "a.b"}]), "expected module:function"),
        (tree(rewards=[{"name": "a", "kind": "reference", "source": "x"}]), "expects no source"),
        (tree(rewards=[{"name": "a"}]), "rewards.0.source='': kind=rule expects module:function"),
        (tree(rewards=[{"name": "a", "kind": "model"}]), "rewards.0.source='': kind=model expects a folder or hub name"),
        (tree(rewards=[{"name": "a", "kind": "http"}]), "rewards.0.source='': kind=http expects a URL"),
        (tree(rewards=[{"name": "std", "source": "a:b"}]), "rewards.0.name=std: reward_std is a metric of the run"),
        (tree(regularizer={"kl": {"placement": "loss"}}), "estimator=k1 in the loss: its expected gradient is zero"),
        (tree(regularizer={"kl": {"estimator": "k2"}}), "estimator=k2 in the reward: its expected gradient is not that"),
        (tree(regularizer={"kl": {"estimator": "k3"}}), "estimator=k3 in the reward: its expected gradient is KL(pi,ref) minus"),
        (tree(regularizer={"kl": {"placement": "reward", "estimator": "exact"}}), "estimator=exact in the reward: it is a sum over"),
        (tree(objective={"level": "sequence"}), "level=sequence has one ratio a completion"),
        (tree(objective={"level": "sequence", "reduction": "token_mean", "correction": "none"}), "expected sequence_sum"),
        (tree(buffer={"groups_per_step": 2, "groups_per_batch": 3}), "buffer.groups_per_batch=3"),
        (tree(buffer={"groups_per_step": 2, "groups_per_batch": 5, "max_staleness": 1}), "(1 + max_staleness) * groups_per_step=2"),
        (tree(buffer={"groups_per_step": 1}, learners={"count": 9}), "learners.count=9: a step has 4 rows"),
        (tree(learners={"tokens_per_batch": 8}), "learners.tokens_per_batch=8"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(changed: dict[str, Any], expected: str) -> None:
    assert expected in message(changed)


@pytest.mark.parametrize(
    "blocks",
    [
        {"sampling": {"samples_per_prompt": 2}},
        {"reference": None},
        {"regularizer": {"kl": {"placement": "loss", "estimator": "k2", "coefficient": 0.1}}},
        {"objective": {"level": "sequence", "correction": "sequence"}},
        {"buffer": {"groups_per_step": 2, "groups_per_batch": 4, "max_staleness": 1}},
        {"buffer": {"groups_per_step": 1}, "learners": {"count": 4}},
        {"learners": {"tokens_per_batch": 16 + 128}},
    ],
)
def test_what_the_rules_only_just_allow(blocks: dict[str, Any]) -> None:
    assert loader.parse(tree(**blocks)).run.name == "run"


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, tree())
    changes = [
        "learners.learning_rate=6e-5",
        "regularizer.kl.coefficient=0.5",
        "regularizer.kl.coefficient=0",
        "sampling.stop_token_ids=[7, 8]",
        "rewards.a.weight=2",
        "rewards.0.role=train",
        "reference=null",
        "run.name=x",
    ]
    settings = loader.load(path, changes)
    assert settings.learners.learning_rate == 6e-5
    assert settings.rewards[0].weight == 2
    assert settings.reference is None
    assert settings.regularizer.kl.coefficient == 0
    assert settings.sampling.stop_token_ids == [7, 8]
    assert yaml.safe_load(path.read_text()) == tree()  # the file stays as it was
    assert settings.run_directory == "runs/x"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps", "expected key.key=value"),
        ("=3", "expected key.key=value"),
        ("rewards.a=3", "rewards is not a block"),
        ("learners.learning_rate=fast", "learners.learning_rate='fast': input should be a valid number"),
        ("rewards.b.weight=1", "no entry rewards.b; expected one of a"),
        ("policy.model.size=3", "policy.model is not a block"),
        ("run.steps=[", "not YAML"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace(".", r"\.")):
        loader.load(write(tmp_path, tree()), [override])


@pytest.mark.parametrize(
    ("content", "expected"), [("a: [", "not YAML"), ("- 1", "list at the top"), ("", "NoneType at the top")]
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        loader.load(path)
    with pytest.raises(ConfigError, match="no such file"):
        loader.load(tmp_path / "absent.yaml")


UNSEEN = [
    {"run": {"directory": "elsewhere", "steps": 7}},
    {"metrics": {"host": "0.0.0.0", "port": 1}},
    {
        "tracking": {
            "trackers": ["wandb"],
            "project": "p",
            "tags": ["t"],
            "tensorboard_directory": "d",
            "finish_seconds": 1,
        }
    },
    {"cluster": {"address": "auto", "min_memory_bytes": 0}},
    {"deadlines": {"step_seconds": 5}},
]
SEEN: list[dict[str, Any]] = [
    {"run": {"seed": 1}},
    {"policy": {"model": "n"}},
    {"prompts": {"source": "q", "max_tokens": 16}},
    {"sampling": {"temperature": 0.9}},
    {"objective": {"advantage": "grpo"}},
    {"regularizer": {"kl": {"coefficient": 0.1}}},
    {"rewards": [{"name": "a", "source": "pkg:function", "weight": 2.0}]},
    {"failures": {"retries": 0}},
    {"buffer": {"max_staleness": 1}},
    {"generators": {"dtype": "float32"}},
    {"scorers": {"count": 2}},
    {"reference": None},
    {"learners": {"learning_rate": 1e-3}},
    {"evaluation": {"every_steps": 0}},
    {"checkpoint": {"keep": 3}},
    {"parity": {"max_gap_nats": 0.2}},
    {"guard": {"kl_slope": {"actions": ["stop"]}}},
    {"ensemble": {"coefficient": 2.0}},
    {"shaping": {"missing_end_penalty": 1.0}},
]


def test_the_digest_covers_what_changes_a_number() -> None:
    """Every block of the settings is in one of the two lists; what may change on resume is left out."""
    assert {name for blocks in UNSEEN + SEEN for name in blocks} == set(Settings.model_fields)
    base = loader.digest(loader.parse(tree()))
    assert {loader.digest(loader.parse(tree(**blocks))) for blocks in UNSEEN} == {base}
    assert len({base, *(loader.digest(loader.parse(tree(**blocks))) for blocks in SEEN)}) == 1 + len(SEEN)


def test_the_length_of_a_run_counts_where_a_learning_rate_depends_on_it() -> None:
    digests = [
        loader.digest(loader.parse(tree(run={"steps": steps}, learners={"schedule": schedule})))
        for schedule in ("constant", "linear", "cosine")
        for steps in (4, 6)
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 5


def test_a_difference_names_two_settings_and_counts_the_rest() -> None:
    stored = loader.parse(tree()).model_dump(mode="json")
    assert loader.difference(stored, loader.parse(tree())) == ""
    one = loader.parse(tree(rewards=[{"name": "a", "source": "pkg:function", "weight": 2}]))
    assert loader.difference(stored, one) == "rewards.0.weight: 1.0 there, 2.0 here"
    learners = {"learning_rate": 0.5, "schedule": "linear"}
    many = loader.parse(tree(run={"seed": 1, "steps": 2}, learners=learners, reference=None))
    line = loader.difference(stored, many)
    assert line.startswith("run.seed: 0 there, 1 here; run.steps: 30 there, 2 here; ") and line.endswith(" more")


def test_a_difference_leaves_out_what_may_change_on_resume() -> None:
    stored = loader.parse(tree()).model_dump(mode="json")
    changes = {"run": {"directory": "elsewhere", "steps": 99, "seed": 3}, "metrics": {"port": 1}}
    assert loader.difference(stored, loader.parse(tree(**changes))) == "run.seed: 0 there, 3 here"


def stored(folder: Path, first_line: str) -> Path:
    (folder / "config.yaml").write_text(f"{first_line}\n{yaml.safe_dump(tree(regulariser={}))}")
    return folder


BEFORE = "# sha256 of the resolved settings: " + "0" * 64


def test_a_run_directory_says_which_version_wrote_it(tmp_path: Path) -> None:
    settings = loader.parse(tree())
    (tmp_path / "config.yaml").write_text(loader.dump(settings))
    assert loader.dump(settings).splitlines()[0].startswith(f"# written by keel {__version__}; sha256 of ")
    assert loader.stored_digest(loader.stored_config(tmp_path, "run")) == loader.digest(settings)


@pytest.mark.parametrize(
    ("first_line", "version"),
    [(BEFORE, "0.1.0"), (f"# written by keel 0.1.7rc1; sha256 of the resolved settings: {'0' * 64}", "0.1.7rc1")],
)
def test_a_run_directory_of_an_earlier_version_is_refused(tmp_path: Path, first_line: str, version: str) -> None:
    """Before its checkpoints are read: their states have other names, too."""
    with pytest.raises(ConfigError, match=rf"^RUN_DIR={tmp_path}: was written by Keel {version}; ") as caught:
        loader.stored_config(stored(tmp_path, first_line), f"RUN_DIR={tmp_path}")
    line = str(caught.value)
    assert f"; this is Keel {__version__}, whose settings" in line
    assert f"resume it with Keel {version}, or start a new run with the renamed settings (regularizer, " in line
    assert loader.stored_config(tmp_path, "run", any_version=True) == tmp_path / "config.yaml"


@pytest.mark.parametrize("first_line", ["", "# mine", "# written by keel 0.10.0; sha256 of the resolved settings: 1"])
def test_a_file_of_the_user_or_of_a_later_version_is_read(tmp_path: Path, first_line: str) -> None:
    assert loader.stored_config(stored(tmp_path, first_line), "run") == tmp_path / "config.yaml"


RENAMED_BLOCKS: dict[str, dict[str, Any]] = {
    "regulariser": {"regulariser": {}},
    "objective.normalise_reward": {"objective": {"normalise_reward": True}},
    "objective.normalise_advantage": {"objective": {"kind": "logits_convexity", "normalise_advantage": True}},
    "ensemble.centre": {"ensemble": {"centre": True}},
    "rewards.0.ensemble.centre": {"rewards": [{"name": "a", "source": "a:b", "ensemble": {"centre": False}}]},
    "deadlines.room_seconds": {"deadlines": {"room_seconds": 60}},
}


@pytest.mark.parametrize("setting", RENAMED_BLOCKS)
def test_a_renamed_setting_is_refused_with_its_new_name(setting: str) -> None:
    name = loader.RENAMED[setting.rpartition(".")[2]]
    expected = f"{setting}: is called {name} since Keel 0.2.0; expected {name}"
    assert message(tree(**RENAMED_BLOCKS[setting])) == expected


@pytest.mark.parametrize("setting", ["centre", "centre_penalty"])
def test_a_renamed_setting_of_a_reward_model_is_refused_with_its_new_name(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}: is called {loader.RENAMED[setting]} since Keel 0.2.0"):
        loader.parse_as(RewardModelSettings, {"policy": {"model": "m"}, "prompts": {"source": "p"}, setting: {}})


def test_every_renamed_setting_is_one_that_there_is() -> None:
    names = {name for section in sections().values() for name in section.model_fields}
    assert set(loader.RENAMED.values()) <= names and not set(loader.RENAMED) & names
