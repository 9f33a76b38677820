"""Completions that come with the prompts, the references of iterations, and ensembles of rewards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fakes import SAMPLING
from keel import references, schema
from keel.algorithms import reward_ensembles
from keel.config.rewards import EnsembleSettings, RewardSettings
from keel.config.workers import ScorerSettings
from keel.errors import ConfigError
from keel.rollout import scorers, stored_completions
from keel.rollout.datasets import SourceRow
from rollouts import generated, prompts

PAIR = {"chosen": "yes", "rejected": "no way"}
CHAT = {
    "chosen": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}],
    "rejected": [{"content": "no"}],
}
LISTS = {"responses": ["a", "b", "c"], "rewards": [0.5, 1, -2]}


@pytest.mark.parametrize(
    ("columns", "texts", "rewards"),
    [(PAIR, ["yes", "no way"], [1.0, 0.0]), (CHAT, ["yes", "no"], [1.0, 0.0]), (LISTS, ["a", "b", "c"], [0.5, 1.0, -2.0])],
)  # fmt: skip
def test_both_forms_of_rows_are_read(columns: dict[str, Any], texts: list[str], rewards: list[float]) -> None:
    assert stored_completions.completions(columns) == texts
    assert stored_completions.rewards(columns) == rewards


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_share_of_stored_tickets_is_the_ratio_and_spread_evenly(ratio: float) -> None:
    taken = np.array([stored_completions.is_stored(ticket, ratio) for ticket in range(1000)])
    assert taken.sum() == pytest.approx(1000 * ratio, abs=1)
    if 0 < ratio < 1:
        assert np.diff(np.flatnonzero(taken)).max() <= np.ceil(1 / ratio)


def words(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    assert not add_special_tokens  # a second start token would change what the model sees
    return {"input_ids": [len(word) for word in text.split()]}


def test_tokens_end_with_the_end_token_and_the_budget() -> None:
    columns = json.dumps({"chosen": "a bb ccc", "rejected": "a bb ccc dddd eeeee"})
    rows = prompts([0, 1])
    index = rows.schema.get_field_index("prompt_columns")
    rows = rows.set_column(index, rows.schema.field(index), pa.array([columns] * 4))
    assert SAMPLING.max_tokens == 5 and SAMPLING.stop_token_ids == (1,)
    subject = stored_completions.StoredCompletions(1.0, words, SAMPLING)
    assert subject(rows) == [[1, 2, 3, 1], [1, 2, 3, 4, 5]] * 2  # the second was cut: no end token
    half = stored_completions.StoredCompletions(0.5, words, SAMPLING)
    assert half(rows) == [[], [], [1, 2, 3, 1], [1, 2, 3, 4, 5]]
    assert subject(rows.replace_schema_metadata({"keel.held_out": "true"})) is None


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"other": 1}, "line 3 has no completions; expected columns chosen and rejected"),
        ({"responses": ["a", "b"]}, "line 3 has no completions"),
        (
            {"responses": ["a", "b", "c"], "rewards": [1, 2, 3]},
            "line 3 has 3 completions and 3 rewards; expected 2 of each",
        ),
        ({"responses": ["a", "b"], "rewards": [1]}, "line 3 has 2 completions and 1 rewards"),
        ({"chosen": " ", "rejected": "b"}, "line 3 has an empty completion"),
        ({"chosen": "b", "rejected": "b"}, "line 3 has equal completions"),
        ({"chosen": None, "rejected": "b"}, "line 3 has no completions"),
    ],
)
def test_a_row_that_does_not_fit_is_named(columns: dict[str, Any], expected: str) -> None:
    good = SourceRow("line 2", "p", json.dumps(PAIR))
    stored_completions.check([good], 2, "pairs.jsonl")
    with pytest.raises(ConfigError, match=expected):
        stored_completions.check([good, SourceRow("line 3", "p", json.dumps(columns))], 2, "pairs.jsonl")


def test_a_reference_is_whole_or_absent_and_of_its_iteration(tmp_path: Path) -> None:
    assert references.of_version(tmp_path, 4, 3) is None
    for step in (4, 8, 12):
        folder = references.folder_of(tmp_path, step)
        aside = references.begin(folder)
        aside.mkdir()
        (aside / "model").write_text(str(step))
        assert not folder.exists()
        references.commit(folder)
        assert (folder / "model").read_text() == str(step)
    assert references.of_version(tmp_path, 4, 11) == references.folder_of(tmp_path, 8)
    references.prune(tmp_path, 4, oldest_version=9)
    assert sorted(path.name for path in (tmp_path / "references").iterdir()) == ["step-000008", "step-000012"]
    assert references.of_version(tmp_path, None, 11) is None
    references.prune(tmp_path, 4, oldest_version=12, kept=[10])
    assert sorted(path.name for path in (tmp_path / "references").iterdir()) == ["step-000008", "step-000012"]
    references.prune(tmp_path, 4, oldest_version=12, kept=[3, 12])
    assert sorted(path.name for path in (tmp_path / "references").iterdir()) == ["step-000012"]


def low(completions: list[str], **columns: Any) -> list[float]:
    return [1.0, 3.0, 10.0, 20.0]


def high(completions: list[str], **columns: Any) -> list[float]:
    return [102.0, 100.0, 100.0, 110.0]


def gold(completions: list[str], **columns: Any) -> list[float | None]:
    return [None, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("ensemble", "expected"),
    [
        ({}, [103.0, 103.0, 110.0, 130.0]),
        ({"form": "mean"}, [51.5, 51.5, 55.0, 65.0]),
        # centered per prompt the members are [-1, 1, -5, 5] and [1, -1, -5, 5]: they agree on the second prompt
        ({"form": "worst"}, [50.5, 50.5, 55.0, 65.0]),
        ({"form": "lower_bound", "coefficient": 0.5}, [51.0, 51.0, 55.0, 65.0]),
        ({"form": "variance", "coefficient": 2.0}, [49.5, 49.5, 55.0, 65.0]),
        ({"form": "worst", "center": False}, [1.0, 3.0, 10.0, 20.0]),
    ],
)
def test_the_reward_of_an_ensemble(ensemble: dict[str, Any], expected: list[float]) -> None:
    """A judge is no part of it, and its failure costs no sample."""
    rewards = [RewardSettings(name=name, source=f"{__name__}:{name}") for name in ("low", "high")]
    rewards.append(RewardSettings(name="gold", source=f"{__name__}:gold", role="judge"))
    batch, receipt = scorers.RewardScorer(rewards, EnsembleSettings(**ensemble), ScorerSettings(), "s").score(
        generated(prompts([0, 1]))
    )
    schema.check(batch)
    assert batch.column("reward").to_pylist() == expected
    assert receipt.failures == {"gold_none": 1}


def test_a_failed_member_leaves_its_siblings_what_they_are() -> None:
    """And a prompt with one completion, as in an evaluation, has the members' mean, not 0."""
    members = np.array([[10.0, 11.0, 12.0, np.nan], [12.0, 10.0, 11.0, 11.0]])
    tickets, weights = np.zeros(4, int), np.ones(2)
    whole = reward_ensembles.combine(
        members[:, :3], weights, "lower_bound", 1.0, reward_ensembles.center(members[:, :3], tickets[:3])
    )
    broken = reward_ensembles.combine(members, weights, "lower_bound", 1.0, reward_ensembles.center(members, tickets))
    assert broken[:3] == pytest.approx(whole) and np.isnan(broken[3])
    alone = members[:, :1]
    assert (
        reward_ensembles.combine(alone, weights, "lower_bound", 1.0, reward_ensembles.center(alone, tickets[:1]))
        == 11.0
    )


def test_a_stored_reward_is_that_of_its_sample_and_none_for_generated_ones() -> None:
    rows = prompts([0])
    index = rows.schema.get_field_index("prompt_columns")
    rows = generated(rows.set_column(index, rows.schema.field(index), pa.array([json.dumps(PAIR)] * 2)))
    subject = scorers.RewardScorer(
        [RewardSettings(name="label", kind="stored")], EnsembleSettings(), ScorerSettings(), "s"
    )
    assert subject.score(rows)[0].column("failure").to_pylist() == ["label_none"] * 2
    place = rows.schema.get_field_index("generator")
    rows = rows.set_column(place, rows.schema.field(place), pa.array([schema.STORED] * 2))
    assert subject.score(rows)[0].column("reward").to_pylist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ({"content": "a"}, {"content": "a"}, "equal"),
        ({"content": "a", "reasoning_content": "x"}, {"content": "a", "reasoning_content": "y"}, None),
        ({"content": "a", "reasoning_content": ""}, {"content": "a"}, "equal"),
        ({"content": "", "tool_calls": [{"name": "f"}]}, {"content": "a"}, None),
        ({"content": ""}, {"content": "a"}, "empty"),
    ],
)
def test_what_a_message_says_beside_its_content_counts(chosen: Any, rejected: Any, expected: str | None) -> None:
    assert stored_completions.unusable({"chosen": [chosen], "rejected": [rejected]}) == expected
