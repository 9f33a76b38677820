"""Diagnostics of samples beside brute force, closed forms and other libraries."""

import math
import zlib
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from keel import schema
from keel.observability import diagnostics, sample_diagnostics
from rollouts import generated, prompts, referenced, scored

TOKENS = [[1, 2, 3, 1, 2, 3, 1], [1, 2, 3, 4], [7, 7, 7, 7, 7], [5, 6], [1, 2, 3, 4], [9]]
TICKETS = [0, 0, 1, 1, 2, 2]


def batch(tokens: list[list[int]] = TOKENS, tickets: list[int] = TICKETS) -> pa.RecordBatch:
    texts = [" ".join(map(str, row)) for row in tokens]
    columns: dict[str, Any] = {"ticket": pa.array(tickets, pa.int64()), "completion": texts}
    return pa.RecordBatch.from_pydict(columns | {"completion_tokens": pa.array(tokens, schema.TOKENS)})


def grams(row: list[int]) -> list[tuple[int, ...]]:
    return [tuple(row[place : place + 3]) for place in range(len(row) - 2)]


def test_repetition_by_counting() -> None:
    expected = [1 - len(set(grams(row))) / len(grams(row)) if len(row) > 2 else 0.0 for row in TOKENS]
    assert expected == pytest.approx([2 / 5, 0, 2 / 3, 0, 0, 0])
    assert sample_diagnostics.repetition(batch()).tolist() == pytest.approx(expected)
    assert sample_diagnostics.repetition(batch([[1], [2]], [0, 1])).tolist() == [0.0, 0.0]


def test_random_rows_by_counting() -> None:
    draw = np.random.default_rng(3)
    rows = [draw.integers(0, 4, draw.integers(1, 40)).tolist() for _ in range(30)]
    tickets = draw.integers(0, 7, 30).tolist()
    expected = [1 - len(set(grams(row))) / len(grams(row)) if len(row) > 2 else 0.0 for row in rows]
    assert sample_diagnostics.repetition(batch(rows, tickets)).tolist() == pytest.approx(expected)
    assert sample_diagnostics.template_overlap(batch(rows, tickets)) == pytest.approx(overlap(rows, tickets))
    sums, pairs = sample_diagnostics.prompt_overlaps(batch(rows, tickets))
    names = sorted(set(tickets))
    assert not sums.diagonal().any() and not pairs.diagonal().any()
    for one, other in combinations(range(len(names)), 2):
        places = [place for place, ticket in enumerate(tickets) if ticket in (names[one], names[other])]
        number = tickets.count(names[one]) * tickets.count(names[other])
        mean = overlap([rows[place] for place in places], [tickets[place] for place in places])
        assert pairs[one, other] == pairs[other, one] == number
        assert sums[one, other] == pytest.approx(number * mean) and sums[other, one] == pytest.approx(number * mean)


def overlap(rows: list[list[int]], tickets: list[int]) -> float:
    values = []
    for i, j in combinations(range(len(rows)), 2):
        a, b = set(grams(rows[i])), set(grams(rows[j]))
        if tickets[i] != tickets[j]:
            values.append(len(a & b) / len(a | b) if a | b else 0.0)
    return float(np.mean(values))


def test_one_template_for_all_prompts_overlaps_wholly_and_different_answers_do_not() -> None:
    assert sample_diagnostics.template_overlap(batch([[1, 2, 3, 4]] * 4, [0, 0, 1, 1])) == 1.0
    assert sample_diagnostics.template_overlap(batch([[1, 2, 3], [1, 2, 3], [4, 5, 6]], [0, 0, 1])) == 0.0
    assert sample_diagnostics.template_overlap(batch([[1, 2, 3], [1, 2, 3]], [4, 4])) is None
    assert sample_diagnostics.template_overlap(batch([[1], [2]], [0, 1])) == 0.0


def test_overlap_of_many_rows_is_that_of_512_evenly_spaced_ones() -> None:
    draw = np.random.default_rng(5)
    rows = [draw.integers(0, 3, 6).tolist() for _ in range(600)]
    tickets = list(range(600))
    chosen = [round(place) for place in np.linspace(0, 599, 512)]
    expected = overlap([rows[place] for place in chosen], [tickets[place] for place in chosen])
    assert sample_diagnostics.template_overlap(batch(rows, tickets)) == pytest.approx(expected)


def test_compression_ratio_is_that_of_zlib() -> None:
    rows = batch()
    text = "\n".join(rows.column("completion").to_pylist()).encode()
    assert sample_diagnostics.compression_ratio(rows) == len(text) / len(zlib.compress(text))
    same, other = batch([[1, 2, 3] * 50] * 2, [0, 1]), np.random.default_rng(0).integers(0, 10**6, (2, 150)).tolist()
    assert sample_diagnostics.compression_ratio(same) > 5 * sample_diagnostics.compression_ratio(batch(other, [0, 1]))  # type: ignore[operator]
    empty = rows.set_column(1, "completion", pa.array([""] * 6))
    assert sample_diagnostics.compression_ratio(empty) is None


def test_correlation_is_that_of_scipy_and_none_where_there_is_none() -> None:
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=50), draw.normal(size=50)
    holes = np.where(np.arange(50) % 7 == 0, np.nan, y)
    both = np.isfinite(holes)
    assert sample_diagnostics.correlation(x, holes) == pytest.approx(stats.pearsonr(x[both], y[both]).statistic)
    assert sample_diagnostics.correlation(x, np.ones(50)) is None
    assert sample_diagnostics.correlation(x[:2], y[:2]) is None


@pytest.mark.parametrize("index", [0.25, 0.5, 1.0])
def test_tail_index_of_pareto_excesses_is_their_index(index: float) -> None:
    """Half of the values lie below the median and the excesses are Pareto: the sample's index within four errors."""
    draw = np.random.default_rng(8)
    upper = draw.random(20_000) ** -index
    values = np.concatenate([-np.ones(20_001), upper])
    count = math.ceil(math.sqrt(len(values)))
    found = sample_diagnostics.tail_index(values + 1)  # the median is 0
    assert found is not None and abs(found - index) < 4 * index / math.sqrt(count) + 0.05


def test_tail_index_of_light_tails_is_small_and_of_few_values_none() -> None:
    draw = np.random.default_rng(2)
    light, heavy = (sample_diagnostics.tail_index(x) for x in (draw.normal(size=10**5), draw.standard_cauchy(10**5)))
    assert light is not None and heavy is not None and light < 0.2 and heavy == pytest.approx(1.0, abs=0.25)
    assert sample_diagnostics.tail_index(np.arange(15.0)) is None
    assert sample_diagnostics.tail_index(np.zeros(100)) is None


def test_importance_on_two_answers_with_known_probabilities() -> None:
    """Policy (0.9, 0.1), reference (0.5, 0.5); nine samples of the first, one of the second: the exact mean is 1."""
    log_ratio = np.log([0.9 / 0.5] * 9 + [0.1 / 0.5])
    weights = np.exp(-log_ratio)
    mass, effective = sample_diagnostics.importance(log_ratio)  # type: ignore[misc]
    assert mass == pytest.approx(1.0)
    assert effective == pytest.approx(weights.sum() ** 2 / (10 * (weights**2).sum()))
    lost, _ = sample_diagnostics.importance(log_ratio[:9])  # type: ignore[misc]
    assert lost == pytest.approx(0.5 / 0.9)
    assert sample_diagnostics.importance(np.array([800.0, 801.0])) == pytest.approx(
        (0.0, 0.5 * (1 + math.e) ** 2 / (1 + math.e**2))
    )
    assert sample_diagnostics.importance(np.array([np.nan])) is None


def test_the_step_reports_them_and_leaves_out_what_it_cannot_know() -> None:
    rows = scored(referenced(generated(prompts([0, 1]))), [0.1, 0.4, 0.2, 0.3])
    summary = diagnostics.summarize(rows)
    values = diagnostics.per_completion(rows)
    reference = [float(-np.mean(row)) for row in rows.column("reference_logprobs").to_pylist()]
    assert values["reference_nll_nats"].tolist() == pytest.approx(reference, abs=1e-6)
    assert summary["reference_nll_nats"] == pytest.approx(np.mean(reference), abs=1e-6)
    assert summary["template_overlap"] == sample_diagnostics.template_overlap(rows)
    assert "reward_tail_index" not in summary  # four rows
    many = scored(generated(prompts(list(range(8)))), (np.arange(16.0) ** 2).tolist())
    assert diagnostics.summarize(many)["reward_tail_index"] == sample_diagnostics.tail_index(np.arange(16.0) ** 2)
