"""Settings of stages: what they make of the learner's, and one line for every mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from keel.config import loader
from keel.config.base import Section
from keel.config.label import LabelSettings
from keel.config.stages import PreferSettings, RewardModelSettings, SupervisedSettings, TrainingSettings
from keel.errors import ConfigError

SFT, PREFER, REWARD, LABEL = SupervisedSettings, PreferSettings, RewardModelSettings, LabelSettings
JUDGE = {"name": "gold", "source": "pkg:function"}
SAMPLED: dict[str, Any] = {"policy": {"model": "m"}, "prompts": {"source": "p"}, "judge": JUDGE}


def training(**blocks: Any) -> dict[str, Any]:
    return {"policy": {"model": "m"}, "prompts": {"source": "p", "max_tokens": 16}, **blocks}


def message(model: type[Section], tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        loader.parse_as(model, tree)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", [SFT, PREFER, REWARD])
@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ({"training": {"patience": 2}}, "training.patience=2: counts evaluations, but evaluate_every_steps=0"),
        ({"training": {"epochs": 0}}, "training.epochs=0: input should be greater than 0"),
        ({"training": {"epoch": 3}}, "training.epoch: unknown setting; did you mean epochs?"),
        ({"training": {"rows_per_step": 2}, "learners": {"count": 3}}, "learners.count=3: every rank takes a row of every step and evaluation"),
        ({"learners": {"count": 9}, "prompts": {"source": "p", "held_out": 8}}, "expected at most 8"),
        ({"prompts": {"source": "p", "held_out": 1}}, "prompts.held_out=1: input should be greater than or equal to 2"),
        ({"completions": {"max_tokens": 0}}, "completions.max_tokens=0: input should be greater than or equal to 1"),
        ({"completions": {"unusable": "keep"}}, "completions.unusable='keep': input should be 'drop' or 'refuse'"),
        ({"rewards": []}, "rewards: unknown setting; "),
        ({"run": {"steps": 3}}, "run.steps: unknown setting; expected one of name, directory, seed"),
        ({"learners": {"packed_tokens": -1}}, "learners.packed_tokens=-1: input should be greater than or equal to 0"),
        ({"policy": None}, "policy=None: input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_a_mistake_of_a_training_stage_is_one_line(model: Any, blocks: dict[str, Any], expected: str) -> None:
    assert expected in message(model, training(**blocks))


@pytest.mark.parametrize(
    ("model", "tree", "expected"),
    [
        (SFT, training(learners={"tokens_per_batch": 100}), "learners.tokens_per_batch=100: one row may have prompts.max_tokens + completions.max_tokens=144 tokens"),
        (PREFER, training(learners={"tokens_per_batch": 143}), "learners.tokens_per_batch=143: one row may have prompts.max_tokens + completions.max_tokens=144 tokens"),
        (SFT, training(objective={"kind": "preference"}), "objective: unknown setting"),
        (PREFER, training(samples=1), "samples=1: input should be greater than or equal to 2"),
        (PREFER, training(objective={"kind": "policy_gradient"}), "objective.kind='policy_gradient': input should be 'preference'"),
        (PREFER, training(objective={"kind": "preference", "loss": "dop"}), "objective.loss='dop'"),
        (PREFER, training(objective={"kind": "preference", "bta": 1}), "objective.bta: unknown setting; did you mean beta?"),
        (PREFER, training(reference=None), "reference=None"),
        (REWARD, training(margin=-1), "margin=-1: input should be greater than or equal to 0"),
        (REWARD, training(label_smoothing=0.5), "label_smoothing=0.5: input should be less than 0.5"),
        (REWARD, training(members={"count": 0}), "members.count=0"),
        (REWARD, training(center={"rows": "some"}), "center.rows='some': input should be 'all', 'chosen', 'rejected' or 'none'"),
        (REWARD, training(centre={"rows": "all"}), "centre: is called center since Keel 0.2.0; expected center"),
        (LABEL, {"judge": JUDGE}, "runs=[]: expected run directories, or policy and prompts, and not both"),
        (LABEL, {**SAMPLED, "runs": ["r"]}, "runs=['r']: expected run directories, or policy and prompts, and not both"),
        (LABEL, {"judge": JUDGE, "policy": {"model": "m"}}, "runs=[]: expected run directories"),
        (LABEL, {"policy": {"model": "m"}, "prompts": {"source": "p"}}, "judge: missing; expected a value"),
        (LABEL, {**SAMPLED, "judge": {"name": "gold", "kind": "stored"}}, "judge.kind=stored: sampled completions have no stored reward"),
        (LABEL, {**SAMPLED, "monitors": [{"name": "old", "kind": "stored"}]}, "monitors.old.kind=stored: sampled completions have no stored reward"),
        (LABEL, {**SAMPLED, "judge": {"name": "gold", "kind": "reference"}}, "judge.kind=reference: reads a reference's log-probs; expected a reference block"),
        (LABEL, {**SAMPLED, "monitors": [{"name": "near", "kind": "reference", "source": "relevance"}]}, "monitors.near.kind=reference: reads a reference's log-probs; expected a reference block"),
        (LABEL, {**SAMPLED, "monitors": [{"name": "gold", "source": "a:b"}]}, "monitors: two rewards of gold, gold have one name; expected different names"),
        (LABEL, {"runs": ["r"], "judge": {"name": "gold", "kind": "reference"}, "reference": {}}, "expected a reference block, with a model"),
        (LABEL, {**SAMPLED, "judge": {"name": "gold", "source": "a.b"}}, "judge.source='a.b': expected module:function"),
        (LABEL, {**SAMPLED, "noise": {"flip_ratio": 1.5}}, "noise.flip_ratio=1.5: input should be less than or equal to 1"),
        (LABEL, {**SAMPLED, "noise": {"temperature": -1}}, "noise.temperature=-1"),
        (LABEL, {**SAMPLED, "truncated": "cut"}, "truncated='cut': input should be 'keep' or 'drop'"),
        (LABEL, {**SAMPLED, "max_prompts": 0}, "max_prompts=0"),
        (LABEL, {**SAMPLED, "pairs": {"selection": "min_max"}}, "pairs.selection='min_max'"),
        (LABEL, {**SAMPLED, "learners": {}}, "learners: unknown setting"),
    ],
)  # fmt: skip
def test_a_mistake_of_one_stage_is_one_line(model: Any, tree: dict[str, Any], expected: str) -> None:
    assert expected in message(model, tree)


def test_files_and_overrides_are_those_of_every_command(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(training()))
    settings = loader.load_as(SFT, path, ["training.epochs=3", "run.name=x", "learners.packed_tokens=256"])
    assert (settings.training.epochs, settings.run_directory, settings.learners.packed_tokens) == (3.0, "runs/x", 256)
    with pytest.raises(ConfigError, match=r"training\.patience=1: counts evaluations"):
        loader.load_as(SFT, path, ["training.patience=1"])
    with pytest.raises(ConfigError, match="no such file"):
        loader.load_as(SFT, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("fields", "rows", "expected"),
    [
        ({}, 320, 10),
        ({"epochs": 2.5}, 320, 25),
        ({"epochs": 0.5}, 8, 1),  # at least one
        ({"epochs": 3, "max_steps": 7}, 320, 7),
        ({"epochs": 3, "max_steps": 700}, 320, 30),
        ({"rows_per_step": 7}, 20, 3),
    ],
)
def test_steps_of_a_stage(fields: dict[str, Any], rows: int, expected: int) -> None:
    assert TrainingSettings(**fields).steps(rows) == expected


def test_the_learner_of_a_stage_reads_stored_completions() -> None:
    sft = loader.parse_as(SFT, training(run={"name": "x", "seed": 5}, training={"rows_per_step": 8})).learner_spec(12)
    assert (sft.run.name, sft.run.seed, sft.run.steps) == ("x", 5, 12)
    assert (sft.sampling.stored_ratio, sft.sampling.samples_per_prompt, sft.groups_per_step) == (1.0, 1, 8)
    assert sft.reference is None and [reward.kind for reward in sft.rewards] == ["stored"]
    assert sft.needed_columns() == {}
    prefer = loader.parse_as(
        PREFER, {**training(objective={"kind": "preference", "beta": 0.3}), "samples": 4}
    ).learner_spec(1)
    assert prefer.sampling.samples_per_prompt == 4 and prefer.objective.beta == 0.3  # type: ignore[union-attr]
    assert prefer.needed_columns() == {"reference_logprobs": "objective.loss=dpo"}


def test_a_label_stage_samples_and_scores_like_an_online_run() -> None:
    settings = loader.parse_as(
        LABEL, {**SAMPLED, "judge": {**JUDGE, "role": "monitor"}, "sampling": {"samples_per_prompt": 3}}
    )
    online = settings.scoring_spec()
    assert [(reward.name, reward.role) for reward in online.rewards] == [("gold", "train")]
    assert online.sampling == settings.sampling and online.policy.model == "m" and online.prompts.source == "p"


def test_scorers_of_a_reward_stage_run_where_its_learner_ran() -> None:
    settings = loader.parse_as(REWARD, training(learners={"threads": 3}))
    assert settings.scoring_spec([]).scorers.threads == 3
    assert settings.completions.max_tokens == 512


@pytest.mark.parametrize("extra", [{"policy": {"model": "m"}}, {"prompts": {"source": "p"}}])
def test_runs_and_half_of_what_samples_are_refused(extra: dict[str, Any]) -> None:
    assert "not both" in message(LABEL, {"runs": ["r"], "judge": JUDGE, **extra})


def test_one_sample_a_prompt_makes_no_pair() -> None:
    message(LABEL, {**SAMPLED, "sampling": {"samples_per_prompt": 1}})


@pytest.mark.parametrize(
    "blocks",
    [
        {"sampling": {"stored_ratio": 0.5, "temperature": 0.7}},
        {"pairs": {"selection": "most_disagreeing"}},  # of one judge: every prompt is settled
    ],
)
def test_what_no_online_run_could_do_is_one_line(blocks: dict[str, Any]) -> None:
    message(LABEL, {**SAMPLED, **blocks})


def test_one_member_has_no_mean() -> None:
    line = message(REWARD, training(members={"average_weights": True}))
    assert line.startswith("members.average_weights=true: count=1 is its own mean; expected a count of 2 or more")
    loader.parse_as(REWARD, training(members={"average_weights": True, "count": 2}))
