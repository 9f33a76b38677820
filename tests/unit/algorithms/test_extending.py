"""Every example of docs/develop/extending.md runs as it stands there, and does what the page says."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from keel import schema
from keel.algorithms import advantages, registry
from keel.algorithms.objective import Objective
from keel.algorithms.types import Credit, Measured, Outputs, Rows, labeled
from keel.config import loader
from keel.config.run import Settings
from keel.config.workers import ScorerSettings
from keel.errors import ConfigError
from keel.observability.metric_table import TABLE
from keel.online import preflight
from keel.rollout import scorers
from rollouts import generated, prompts, rollouts

PAGE = (Path(__file__).parents[3] / "docs" / "develop" / "extending.md").read_text(encoding="utf8")
MODULES = dict(re.findall(r"^`(\w+)\.py`:\n\n```python\n(.*?)```", PAGE, re.M | re.S))
BLOCKS = dict(zip(MODULES, map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)```", PAGE, re.M | re.S)), strict=True))
BROKEN = """
import numpy as np

NUMBER = 1


class NoObjective:
    def __init__(self, settings): ...


def function(settings): ...


def one_short(rewards, tickets):
    return rewards[1:]


def not_finite(rewards, tickets):
    return np.full(len(rewards), np.nan)
"""

STEP = rollouts([0, 1, 2], samples=3)
"""Three prompts, rewards 0, .1, .2 by sample; reference = sampler - 0.1 at each token."""
TICKETS = STEP.column("ticket").to_numpy()
LENGTHS = schema.lengths(STEP, "completion_tokens")
REWARDS = STEP.column("reward").to_numpy().astype(np.float64)
SAMPLER = schema.ragged(STEP, "completion_logprobs")[0]


@pytest.fixture(autouse=True)
def files(restored_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of the page, and one with mistakes, where Python finds them; forgotten afterwards."""
    for name, code in {**MODULES, "my_mistakes": BROKEN}.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf8")
    monkeypatch.syspath_prepend(tmp_path)


def settings(*blocks: dict[str, Any]) -> Settings:
    tree: dict[str, Any] = {
        "policy": {"model": "m"},
        "prompts": {"source": "p", "max_tokens": 8},
        "sampling": {"max_tokens": 8},
        "rewards": [{"name": "a", "source": "a:b"}],
    }
    for block in blocks:
        tree |= block
    return loader.parse(tree)


def rows_of(batch: pa.RecordBatch, credit: Credit, which: np.ndarray | None = None) -> Rows:
    """All rows of a batch, or some, as the learner gives them."""
    lengths = schema.lengths(batch, "completion_tokens")
    which = np.arange(len(lengths)) if which is None else which
    items = np.isin(np.repeat(np.arange(len(lengths)), lengths), which)
    return Rows(
        advantages=torch.from_numpy(credit.advantages[items]),
        lengths=torch.from_numpy(lengths[which].astype(np.float64)),
        row_of_item=torch.from_numpy(np.repeat(np.arange(len(which)), lengths[which])),
        sampler=torch.from_numpy(schema.ragged(batch, "completion_logprobs")[0][items].astype(np.float64)),
    )


def outputs(rows: Rows, shift: float) -> Outputs:
    """A policy whose log-probs are the sampler's plus a shift."""
    return Outputs((rows.sampler + shift).requires_grad_())


def test_every_example_is_short_and_the_page_is_plain() -> None:
    assert list(MODULES) == ["my_rewards", "my_advantages", "my_terms", "my_objectives"]
    assert PAGE.count("```python") == len(MODULES) and PAGE.isascii()
    assert {name: len(code.splitlines()) for name, code in MODULES.items() if len(code.splitlines()) >= 20} == {}


def test_the_page_names_every_column_and_only_metrics_there_are() -> None:
    """The columns between `**Columns**` and `**Options**` are those of the schema, in its order."""
    part = PAGE[PAGE.index("**Columns**") : PAGE.index("**Options**")]
    named = [name for name in re.findall(r"`(\w+)`", part) if name in STEP.schema.names]
    rows = [line for line in part.splitlines() if line.startswith("| ")]
    in_table = [name for line in rows for name in re.findall(r"`(\w+)`", line) if name in STEP.schema.names]
    assert in_table == STEP.schema.names and set(named) == set(in_table)
    assert "objective_term" in {metric.name for metric in TABLE if metric.labels and metric.kind == "gauge"}


def test_the_reward() -> None:
    """`answer` is the ticket; "answer 1" does not hold "0" and "answer 1000" holds "1"; weight 2, .001 a token."""
    config = settings(BLOCKS["my_rewards"])
    batch = generated(prompts([0, 1]))
    preflight.check_reward_source(config.rewards[0], "rewards.answered.source")
    preflight.check_rewards(config, prompts([0, 1]))
    scored, receipt = scorers.RewardScorer(config.rewards, config.ensemble, ScorerSettings(), "scorer-0").score(batch)
    held = np.array([1.0, 0.0, 1.0, 1.0])
    expected = held - 0.001 * schema.lengths(batch, "completion_tokens")
    assert scored.column("reward_answered").to_numpy() == pytest.approx(expected, abs=1e-6)
    assert scored.column("reward").to_numpy() == pytest.approx(2 * expected, abs=1e-6)
    assert not receipt.failures


def test_an_unknown_answer_is_a_failed_sample() -> None:
    config = settings(BLOCKS["my_rewards"])
    columns = pa.array(['{"answer": null}', '{"answer": "1"}'])
    batch = generated(prompts([0]))
    batch = batch.set_column(
        batch.schema.get_field_index("prompt_columns"), batch.schema.field("prompt_columns"), columns
    )
    scored, receipt = scorers.RewardScorer(config.rewards, config.ensemble, ScorerSettings(), "scorer-0").score(batch)
    assert scored.column("reward").is_null().to_pylist() == [True, False]
    assert dict(receipt.failures) == {"answered_none": 1}


def test_the_advantage() -> None:
    """Rewards 0, .1, .2 of each prompt: minus the median, -.1, 0, .1, for every token of the completion."""
    subject = registry.build(settings(BLOCKS["my_advantages"]))
    credit = subject.credited(STEP, Measured())
    assert credit.advantages == pytest.approx(np.repeat([-0.1, 0.0, 0.1] * 3, LENGTHS), abs=1e-6)
    rows = rows_of(STEP, credit)
    new = outputs(rows, 0.0)
    terms = subject.loss(rows, new, credit)
    (gradient,) = torch.autograd.grad(terms.loss, new.logprobs)
    assert gradient.numpy() == pytest.approx(-credit.advantages / 9, abs=1e-9)


def test_the_advantage_sees_regularized_rewards_and_groups_of_any_size() -> None:
    """KL is 0.1 a token: scores 0.1 sample - 0.05 * 0.1 |y|. One sample of the first prompt is missing."""
    subject = registry.build(settings(BLOCKS["my_advantages"], {"regularizer": {"kl": {"coefficient": 0.05}}}))
    batch = schema.select(STEP, np.arange(9) != 1)
    lengths = schema.lengths(batch, "completion_tokens")
    scores = batch.column("reward").to_numpy().astype(np.float64) - 0.005 * lengths
    medians = [np.median(scores[:2])] * 2 + [np.median(scores[2:5])] * 3 + [np.median(scores[5:])] * 3
    credit = subject.weigh(batch, Measured())
    assert credit.advantages == pytest.approx(np.repeat(scores - medians, lengths), abs=1e-6)


def test_the_term_of_the_reward() -> None:
    """R + 0.1 * mean log ref enters the baseline of rloo; the metric is the mean of the term."""
    subject = registry.build(settings(BLOCKS["my_terms"]))
    fluency = np.array([np.mean(row) for row in STEP.column("reference_logprobs").to_pylist()])
    credit = subject.credited(STEP, Measured())
    expected = advantages.by_ticket(advantages.rloo, REWARDS + 0.1 * fluency, TICKETS)
    assert credit.advantages == pytest.approx(np.repeat(expected, LENGTHS), abs=1e-6)
    assert labeled(credit.metrics)["objective_term"] == {"fluency": pytest.approx(0.1 * fluency.mean(), abs=1e-6)}


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", 0.05 * 0.5 * 0.2**2),
        ("sequence_mean", 0.05 * 0.5 * 0.2**2),
        ("sequence_sum", 0.05 * 0.5 * 0.2**2 * LENGTHS.sum() / 9),
        ("constant", 0.05 * 0.5 * 0.2**2 * LENGTHS.sum() / 9 / 8),
    ],
)
def test_the_term_of_the_loss(reduction: str, expected: float) -> None:
    """Policy 0.2 nats above the sampler everywhere: 0.05 * 0.02 a token, reduced like the surrogate, added to it."""
    by_reduction = {"objective": {"reduction": reduction}}
    with_term, without = (registry.build(settings(*blocks, by_reduction)) for blocks in ([BLOCKS["my_terms"]], []))
    credit = with_term.weigh(STEP, Measured())
    rows = rows_of(STEP, credit)
    new = outputs(rows, 0.2)
    terms, plain = with_term.loss(rows, new, credit), without.loss(rows, new, credit)
    assert terms.sums["objective_term/near_sampler"] == pytest.approx(expected, rel=1e-6)
    assert terms.loss.item() - plain.loss.item() == pytest.approx(expected, rel=1e-6)
    gradient, before = (torch.autograd.grad(item.loss, new.logprobs)[0] for item in (terms, plain))
    assert (gradient - before).sum().item() == pytest.approx(2 * expected / 0.2, rel=1e-6)


def tapered(*blocks: dict[str, Any]) -> Objective:
    return registry.build(settings(BLOCKS["my_objectives"], *blocks))


def test_the_objective_weighs() -> None:
    """Rewards 0, .1, .2: rloo -.15, 0, .15; a third of the completions is above its baseline."""
    subject = tapered()
    assert type(subject).__name__ == "Tapered" and subject.settings.objective.options == {"cap": 1.0}
    credit = subject.credited(STEP, Measured())
    assert credit.advantages == pytest.approx(np.repeat([-0.15, 0.0, 0.15] * 3, LENGTHS), abs=1e-6)
    assert (credit.num_rows, credit.num_tokens) == (9, LENGTHS.sum())
    assert labeled(credit.metrics) == {"objective_term": {"positive_ratio": pytest.approx(1 / 3)}}


@pytest.mark.parametrize(("shift", "weight"), [(-0.5, np.exp(-0.5)), (0.0, 1.0), (0.5, 1.0)])
def test_the_objective_tapers_what_is_pushed_away(shift: float, weight: float) -> None:
    """pi / sampler = e^shift, at most the cap of 1, on tokens with a negative advantage; 1 on the others."""
    subject = tapered()
    credit = subject.credited(STEP, Measured())
    rows = rows_of(STEP, credit)
    new = outputs(rows, shift)
    terms = subject.loss(rows, new, credit)
    weights = np.where(credit.advantages < 0, weight, 1.0)
    (gradient,) = torch.autograd.grad(terms.loss, new.logprobs)
    assert gradient.numpy() == pytest.approx(-weights * credit.advantages / 9, abs=1e-6)
    assert terms.loss.item() == pytest.approx(-(weights * credit.advantages * (SAMPLER + shift)).sum() / 9, abs=1e-6)
    assert terms.sums["policy_loss"] == terms.sums["loss"] == terms.loss.item()
    assert terms.sums["objective_term/weight"] == pytest.approx(weights.mean())


def test_options_reach_the_class() -> None:
    subject = tapered({"objective": {**BLOCKS["my_objectives"]["objective"], "options": {"cap": 1.5}}})
    credit = subject.credited(STEP, Measured())
    rows = rows_of(STEP, credit)
    terms = subject.loss(rows, outputs(rows, 1.0), credit)
    weights = np.where(credit.advantages < 0, 1.5, 1.0)
    assert terms.sums["objective_term/weight"] == pytest.approx(weights.mean())


def test_every_regularizer_works_with_the_objective() -> None:
    """KL and entropy in the reward and both terms of the page: alpha .1 and beta .05, KL 0.1 a token."""
    regularizer = {
        **BLOCKS["my_terms"]["regularizer"],
        "kl": {"coefficient": 0.05},
        "entropy": {"form": "sequence_sum", "coefficient": 0.1},
    }
    subject = tapered({"regularizer": regularizer})
    credit = subject.credited(STEP, Measured())
    fluency = np.array([np.mean(row) for row in STEP.column("reference_logprobs").to_pylist()])
    scores = REWARDS - 0.005 * LENGTHS - 0.1 * schema.row_sums(SAMPLER, LENGTHS) + 0.1 * fluency
    expected = advantages.by_ticket(advantages.rloo, scores, TICKETS)
    assert credit.advantages == pytest.approx(np.repeat(expected, LENGTHS), abs=1e-6)
    rows = rows_of(STEP, credit)
    terms = subject.loss(rows, outputs(rows, 0.2), credit)
    assert terms.sums["loss"] - terms.sums["policy_loss"] == pytest.approx(0.001 * LENGTHS.sum() / 9)


def test_shares_of_micro_batches_add_up() -> None:
    subject = tapered(BLOCKS["my_terms"])
    credit = subject.credited(STEP, Measured())
    whole = subject.loss(rows_of(STEP, credit), outputs(rows_of(STEP, credit), -0.5), credit)
    parts = [rows_of(STEP, credit, which) for which in (np.arange(2), np.arange(2, 9))]
    shares = [subject.loss(part, outputs(part, -0.5), credit) for part in parts]
    for name, value in whole.sums.items():
        assert sum(share.sums[name] for share in shares) == pytest.approx(value, abs=1e-9), name


def test_its_metrics_are_in_the_table() -> None:
    """What weigh and loss give can be recorded: an unknown name would stop the run."""
    subject = tapered(BLOCKS["my_terms"])
    credit = subject.credited(STEP, Measured())
    rows = rows_of(STEP, credit)
    result = labeled({**credit.metrics, **subject.loss(rows, outputs(rows, 0.0), credit).sums})
    assert set(result) <= {metric.name for metric in TABLE}
    assert set(result["objective_term"]) == {"positive_ratio", "weight", "near_sampler", "fluency"}


def test_without_a_surrogate_it_is_a_weighted_likelihood(tmp_path: Path) -> None:
    code = MODULES["my_objectives"]
    (tmp_path / "only_weights.py").write_text(code[: code.index("    def surrogate")], encoding="utf8")
    subject = tapered({"objective": {"kind": "custom", "source": "only_weights:Tapered"}})
    credit = subject.credited(STEP, Measured())
    rows = rows_of(STEP, credit)
    terms = subject.loss(rows, outputs(rows, -0.5), credit)
    assert terms.loss.item() == pytest.approx(-(credit.advantages * (SAMPLER - 0.5)).sum() / 9, abs=1e-6)


def with_source(setting: str, source: str) -> Settings:
    return {
        "objective.source": lambda: settings({"objective": {"kind": "custom", "source": source}}),
        "objective.advantage": lambda: settings({"objective": {"advantage": source}}),
        "regularizer.terms.mine.source": lambda: settings(
            {"regularizer": {"terms": [{"name": "mine", "source": source}]}}
        ),
        "rewards.mine.source": lambda: settings({"rewards": [{"name": "mine", "source": source}]}),
    }[setting]()


SETTINGS = ["objective.source", "objective.advantage", "regularizer.terms.mine.source", "rewards.mine.source"]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no_such_module:name", "cannot be imported (No module named 'no_such_module'); expected module:name"),
        ("my_terms:flu", "cannot be imported (module 'my_terms' has no attribute 'flu'); expected module:name"),
        ("my_mistakes:NUMBER", "a int; expected a function or a class"),
    ],
)
def test_a_wrong_name_is_refused_and_names_the_setting(setting: str, source: str, reason: str) -> None:
    config = with_source(setting, source)
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        if setting.startswith("rewards"):
            preflight.check_reward_source(config.rewards[0], setting)
        else:
            registry.build(config)
    assert str(caught.value) == f"{setting}={source}: {reason}"


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_source_without_a_colon_is_refused_by_the_configuration(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"expected .*module:(name|function)") as caught:
        with_source(setting, "my_terms.fluency")
    assert "my_terms.fluency" in str(caught.value) and setting.split(".")[-1] in str(caught.value)


@pytest.mark.parametrize("name", ["NoObjective", "function"])
def test_a_class_that_is_no_objective_is_refused(name: str) -> None:
    config = settings({"objective": {"kind": "custom", "source": f"my_mistakes:{name}"}})
    with pytest.raises(ConfigError, match=rf"^objective\.source=my_mistakes:{name}: not a class derived from "):
        registry.build(config)


@pytest.mark.parametrize("name", ["one_short", "not_finite"])
def test_an_advantage_that_does_not_fit_the_rows_is_refused(name: str) -> None:
    """Before Ray starts: the function is called once when the objective is built."""
    with pytest.raises(ConfigError, match=rf"objective\.advantage=my_mistakes:{name}: .*expected 3 finite numbers"):
        registry.build(settings({"objective": {"advantage": f"my_mistakes:{name}"}}))


def test_a_term_of_the_reward_that_does_not_fit_the_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short_term.py").write_text("def term(batch):\n    return [0.0]\n", encoding="utf8")
    config = {"regularizer": {"terms": [{"name": "mine", "source": "short_term:term"}]}}
    with pytest.raises(ValueError, match="regularizer term mine: expected 9 finite numbers"):
        registry.build(settings(config)).weigh(STEP, Measured())
