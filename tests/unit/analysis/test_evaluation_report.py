"""What an evaluation says, against loops over its rows and enumeration of subsets."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from keel import schema
from keel.analysis import evaluation_report
from rollouts import generated, prompts, referenced, scored

PROMPTS = 6
Side = tuple[str, str, int, list[float | None]]
"""model, decoding, samples a prompt, scores row by row."""


def side(model: str, decoding: str, samples: int, scores: list[float | None], texts: list[str] | None = None) -> Any:
    """One model's answers to prompts 0..5 as an evaluation stores them, judged by reward_gold."""
    rows = referenced(generated(prompts(range(PROMPTS), samples)))
    batch = scored(rows, [0.5] * len(scores), extra={"gold": scores})
    if texts is not None:
        place = batch.schema.get_field_index("completion")
        batch = batch.set_column(place, batch.schema.field(place), pa.array(texts))
    labels = {"model": [model] * len(scores), "decoding": [decoding] * len(scores)}
    return schema.append(batch, pa.RecordBatch.from_pydict(labels)).replace_schema_metadata(None)


def report(*sides: Any, judge: str = "reward_gold", **further: Any) -> dict[str, Any]:
    fields: Mapping[str, Any] = {"pass_at": [1, 2, 4], "pass_threshold": None, **further}
    result = evaluation_report.report(schema.concat(list(sides)), judge, **fields)
    assert json.loads(json.dumps(result)) == result
    return result


def draw(samples: int, seed: int) -> list[float | None]:
    """Scores with ties, in thirds."""
    return (np.random.default_rng(seed).integers(0, 3, PROMPTS * samples) / 2).tolist()


def share(policy: list[float | None], other: list[float | None], samples: int, other_samples: int) -> float:
    """Mean over prompts of the mean over its judged rows of 1, 1/2, 0."""
    by_prompt = []
    for prompt in range(PROMPTS):
        wins = []
        for sample in range(samples):
            one = policy[prompt * samples + sample]
            two = other[prompt * other_samples + (sample if other_samples > 1 else 0)]
            if one is not None and two is not None:
                wins.append(1.0 if one > two else 0.5 if one == two else 0.0)
        by_prompt += [np.mean(wins)] if wins else []
    return float(np.mean(by_prompt))


@pytest.mark.parametrize("samples", [1, 3])
def test_win_rates_of_sampled_answers_are_those_of_a_loop(samples: int) -> None:
    policy, other = draw(samples, 1), draw(samples, 2)
    result = report(side("policy", "sampled", samples, policy), side("other", "sampled", samples, other))
    rate = result["win_rates"]["sampled"]
    assert set(result["win_rates"]) == {"sampled"}
    assert rate["win_rate"]["mean"] == pytest.approx(share(policy, other, samples, samples))
    assert rate["unjudged"] == 0 and rate["win_rate"]["low"] <= rate["win_rate"]["mean"] <= rate["win_rate"]["high"]


def test_sampled_meet_sampled_and_greedy_meet_greedy() -> None:
    policy, other = draw(2, 3), draw(2, 4)
    parts = [
        side("policy", "sampled", 2, policy),
        side("policy", "greedy", 1, [1.0] * PROMPTS),
        side("other", "sampled", 2, other),
        side("other", "greedy", 1, [0.0] * 5 + [1.0]),
    ]
    rates = report(*parts)["win_rates"]
    assert rates["sampled"]["win_rate"]["mean"] == pytest.approx(share(policy, other, 2, 2))
    assert rates["greedy"]["win_rate"]["mean"] == pytest.approx(5.5 / 6)


def test_a_given_answer_meets_every_answer_to_its_prompt() -> None:
    policy, given = draw(3, 5), draw(1, 6)
    greedy: list[float | None] = [2.0] * PROMPTS
    parts = [
        side("policy", "sampled", 3, policy),
        side("policy", "greedy", 1, greedy),
        side("other", "given", 1, given),
    ]
    rates = report(*parts)["win_rates"]
    assert rates["sampled"]["win_rate"]["mean"] == pytest.approx(share(policy, given, 3, 1))
    assert rates["greedy"]["win_rate"]["mean"] == 1.0


def test_answers_meet_by_prompt_and_sample_whatever_their_order() -> None:
    policy, other = draw(2, 7), draw(2, 8)
    one, two = side("policy", "sampled", 2, policy), side("other", "sampled", 2, other)
    shuffled = two.take(pa.array(np.random.default_rng(0).permutation(two.num_rows)))
    assert report(one, shuffled)["win_rates"] == report(one, two)["win_rates"]


def test_a_judge_that_failed_is_counted_and_nobody_loses_by_it() -> None:
    policy: list[float | None] = [None, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, None, None, 1.0, 0.0]
    other: list[float | None] = [0.0, 0.0, None, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    result = report(side("policy", "sampled", 2, policy), side("other", "sampled", 2, other))
    rate = result["win_rates"]["sampled"]
    assert rate["unjudged"] == 4
    assert rate["win_rate"]["mean"] == pytest.approx(share(policy, other, 2, 2))  # prompt 4 says nothing
    assert result["means"]["policy, sampled"]["reward_gold"]["missing"] == 3
    assert result["means"]["other, sampled"]["reward_gold"]["missing"] == 1


def test_nobody_to_compare_with_is_no_win_rate() -> None:
    assert "win_rates" not in report(side("policy", "sampled", 2, draw(2, 0)))


def test_lengths_are_those_of_the_answers_that_met() -> None:
    policy, given = (
        side("policy", "sampled", 2, draw(2, 1), ["abc"] * 12),
        side("other", "given", 1, draw(1, 2), ["a"] * 6),
    )
    assert report(policy, given)["win_rates"]["sampled"]["length_characters"] == [3.0, 1.0]


def test_means_average_the_samples_of_a_prompt_first() -> None:
    """Prompt 0 has one judged answer and weighs as much as the others."""
    scores: list[float | None] = [9.0, None, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, None, None]
    result = report(side("policy", "sampled", 2, scores))["means"]["policy, sampled"]["reward_gold"]
    assert result["mean"] == pytest.approx(np.mean([9.0, 1.5, 3.5, 5.5, 7.5]))
    assert result["missing"] == 3 and result["low"] < result["mean"] < result["high"]


def test_samples_of_a_prompt_do_not_narrow_its_interval() -> None:
    """Twice the same answers say no more than once."""
    values = [float(v) for v in np.random.default_rng(0).normal(size=PROMPTS)]
    twice = [value for value in values for _ in range(2)]
    once = report(side("policy", "sampled", 1, values))["means"]["policy, sampled"]["reward_gold"]  # type: ignore[arg-type]
    assert report(side("policy", "sampled", 2, twice))["means"]["policy, sampled"]["reward_gold"] == once  # type: ignore[arg-type]


def test_only_samples_have_entropy_and_kl() -> None:
    parts = [side("policy", decoding, 1, draw(1, 0)) for decoding in ("sampled", "greedy")]
    means = report(*parts, side("other", "given", 1, draw(1, 1)))["means"]
    assert {"kl_nats", "entropy_nats"} <= set(means["policy, sampled"])
    for answers in ("policy, greedy", "other, given"):
        assert not {"kl_nats", "entropy_nats"} & set(means[answers])
        assert {"reward", "reward_gold", "length_tokens", "finished_ratio"} <= set(means[answers])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    scores = draw(4, 9)
    result = report(side("policy", "sampled", 4, scores), pass_at=[1, 2, 3, 4, 8], pass_threshold=0.5)
    assert set(result["pass_at_k"]) == {"1", "2", "3", "4"}  # there are no eight
    assert result["pass_prompts"] == PROMPTS
    right = np.array(scores, float).reshape(PROMPTS, 4) >= 0.5
    for k in (1, 2, 3, 4):
        chances = [
            np.mean([row[list(subset)].any() for subset in itertools.combinations(range(4), k)]) for row in right
        ]
        assert result["pass_at_k"][str(k)]["mean"] == pytest.approx(np.mean(chances))


def test_a_prompt_whose_judge_failed_neither_passes_nor_fails() -> None:
    scores: list[float | None] = [1.0, None, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, None, None]
    result = report(side("policy", "sampled", 2, scores), pass_threshold=1.0)
    assert result["pass_prompts"] == 4
    assert result["pass_at_k"]["1"]["mean"] == pytest.approx(np.mean([0.5, 0.0, 1.0, 0.5]))
    assert result["pass_at_k"]["2"]["mean"] == pytest.approx(np.mean([1, 0, 1, 1]))


def test_greedy_answers_have_no_pass_at_k() -> None:
    assert "pass_at_k" not in report(side("policy", "greedy", 1, draw(1, 0)), pass_threshold=0.5)


def test_given_answers_are_rollout_columns() -> None:
    rows = schema.append(prompts([0, 1], samples=1), schema.given([[5, 1], [7]], ["a b", "c"]))
    schema.check(rows)
    assert rows.schema.names == [*schema.PROMPT.names, *schema.GENERATE.names]
    assert [rows.schema.field(name) for name in schema.GENERATE.names] == list(schema.GENERATE)
    assert rows.column("completion_tokens").to_pylist() == [[5, 1], [7]]
    assert rows.column("completion_logprobs").to_pylist() == [[0.0, 0.0], [0.0]]
    assert rows.column("weight_versions").to_pylist() == [[0, 0], [0]]
    assert rows.column("completion").to_pylist() == ["a b", "c"]
    assert set(rows.column("finish_reason").to_pylist()) == {"stop"} and set(rows.column("generator").to_pylist()) == {
        "given"
    }
    both = schema.concat([rows, generated(prompts([2], samples=1))])  # beside sampled ones
    assert both.num_rows == 3
