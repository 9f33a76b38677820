"""Order and seeds are functions of run seed, epoch and ticket; held-out rows are those of held_out_seed alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel import schema
from keel.errors import ConfigError
from keel.rollout.prompts import Prompts
from prompt_files import CHAT, PLAIN, jsonl, numbered, one_line, settings_for, word_tokenizer

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(count=st.integers(3, 40), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
def test_an_epoch_is_every_training_row_once(tmp_path: Path, count: int, seed: int, epoch: int) -> None:
    prompts = Prompts(settings_for(numbered(tmp_path, count), seed=seed), PLAIN)
    held_out = prompts.held_out().column("prompt_id").to_pylist()
    train = count - 2
    drawn = prompts.batch(range(epoch * train, (epoch + 1) * train)).column("prompt_id").to_pylist()
    assert len(set(held_out)) == 2
    assert Counter(drawn) == {number: 2 for number in range(count) if number not in held_out}


@FEW
@given(tickets=st.lists(st.integers(0, 100), min_size=1, max_size=12))
def test_a_batch_depends_on_its_tickets_alone(tmp_path: Path, tickets: list[int]) -> None:
    source = numbered(tmp_path, 20)
    warm, cold = (Prompts(settings_for(source, samples=3), PLAIN) for _ in range(2))
    warm.batch(range(50)), warm.held_out()
    together = warm.batch(tickets)
    assert together.column("ticket").to_pylist() == [ticket for ticket in tickets for _ in range(3)]
    assert together.column("sample").to_pylist() == [0, 1, 2] * len(tickets)
    alone = [row for ticket in reversed(tickets) for row in reversed(cold.batch([ticket]).to_pylist())]
    assert together.to_pylist() == alone[::-1]


def test_epochs_and_run_seeds_have_different_orders(tmp_path: Path) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        prompts = Prompts(settings_for(numbered(tmp_path, 52), seed=seed, samples=2), PLAIN)
        return tuple(prompts.batch(range(epoch * 50, epoch * 50 + 50)).column("prompt_id").to_pylist())

    orders = [order(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0))]
    assert len(set(orders)) == 6
    assert tuple(range(52)) not in {tuple(dict.fromkeys(item)) for item in orders}


def test_runs_of_several_seeds_share_their_held_out_rows_and_no_order_of_training(tmp_path: Path) -> None:
    def made(seed: int, held_out_seed: int = 0, samples: int = 2) -> Prompts:
        config = {"held_out": 10, "held_out_seed": held_out_seed, "samples": samples}
        return Prompts(settings_for(numbered(tmp_path, 60), seed=seed, **config), PLAIN)

    first, second = made(seed=0), made(seed=1)
    assert first.held_out(3).equals(second.held_out(3))  # the samples' seeds, too
    assert first.held_out().column("prompt_id") == made(seed=0, samples=4).held_out().column("prompt_id")
    held_out = set(first.held_out().column("prompt_id").to_pylist())
    orders = [prompts.batch(range(50)).column("prompt_id").to_pylist() for prompts in (first, second)]
    assert orders[0] != orders[1]
    assert [set(order) for order in orders] == [set(range(60)) - held_out] * 2
    assert first.batch([7]).column("seed") != second.batch([7]).column("seed")
    drawn = {tuple(made(0, seed).held_out().column("prompt_id").to_pylist()) for seed in range(8)}
    assert len(drawn) == 8


def test_evaluation_prompts_of_a_source_of_their_own(tmp_path: Path) -> None:
    """Drawn by the same seed; a training row that equals one of them is left out, the other rows all train."""
    source = numbered(tmp_path, 20)
    other = jsonl(tmp_path / "e.jsonl", [{"prompt": str(number), "of": "evaluation"} for number in range(15, 27)])
    runs = [
        Prompts(settings_for(source, seed=seed, held_out=12, evaluation={"source": str(other)}), PLAIN)
        for seed in (0, 1)
    ]
    rows = runs[0].held_out().to_pylist()
    assert runs[0].held_out(2).equals(runs[1].held_out(2))
    assert sorted(int(row["prompt"]) for row in rows) == list(range(15, 27))
    assert all(int(row["prompt"]) == row["prompt_id"] + 15 for row in rows)  # its row in its own source
    assert {json.loads(row["prompt_columns"])["of"] for row in rows} == {"evaluation"}
    assert set(runs[0].batch(range(15)).column("prompt_id").to_pylist()) == set(range(15))
    assert runs[0].counts == {"read": 20, "skipped": 0, "cut": 0, "duplicates": 5, "held_out": 12, "train": 15}
    fewer = Prompts(settings_for(source, held_out=3, evaluation={"source": str(other)}), PLAIN)
    chosen = set(fewer.held_out().column("prompt").to_pylist())
    assert len(chosen) == 3 and chosen < {str(number) for number in range(15, 27)}
    assert fewer.counts["duplicates"] == len(chosen & {str(number) for number in range(20)})


def test_mistakes_in_a_source_of_evaluation_prompts_name_it(tmp_path: Path) -> None:
    source = numbered(tmp_path, 20)

    def refused(name: str, *prompts: str, **options: Any) -> str:
        other = jsonl(tmp_path / name, [{"prompt": prompt} for prompt in prompts])
        return one_line(source, evaluation={"source": str(other)}, **options)

    assert refused("few.jsonl", "1", "2", "2", held_out=3) == (
        f"prompts.held_out=3: {tmp_path}/few.jsonl has 2 different prompts of at most 256 tokens; expected at least 3"
    )
    assert refused("empty.jsonl", "1", "").startswith(f"evaluation.source={tmp_path}/empty.jsonl: line 2")
    assert f"prompts of {tmp_path}/long.jsonl are longer" in refused("long.jsonl", "1", "2 3 4 5", max_tokens=3)
    every = refused("all.jsonl", *map(str, range(20)), held_out=20)
    assert every.startswith(f"evaluation.source={tmp_path}/all.jsonl: every prompt of {source} is among the 20")
    missing = one_line(source, evaluation={"source": str(tmp_path / "none.jsonl")})
    assert missing.startswith(f"evaluation.source={tmp_path}/none.jsonl: no such file")
    with pytest.raises(ConfigError, match=r"evaluation\.split=test: evaluation\.source is null"):
        settings_for(source, evaluation={"split": "test"})


def test_the_order_of_seed_0_stays_what_it_is(tmp_path: Path) -> None:
    """Runs are resumed across releases: a different order here would train on held-out rows."""
    prompts = Prompts(settings_for(numbered(tmp_path, 8), held_out=3), PLAIN)
    assert prompts.held_out().column("prompt_id").to_pylist() == [2, 4, 7]
    assert prompts.batch(range(5)).column("prompt_id").to_pylist()[::2] == [5, 0, 1, 6, 3]


def test_seeds_are_63_bit_hashes_of_run_ticket_and_sample(tmp_path: Path) -> None:
    prompts = Prompts(settings_for(numbered(tmp_path, 10), seed=7, samples=2), PLAIN)
    expected = [xxhash.xxh3_64(b"train:7:%d:%d" % (t, s)).intdigest() // 2 for t in (5, 3) for s in (0, 1)]
    assert prompts.batch([5, 3]).column("seed").to_pylist() == expected


def test_no_two_rows_share_a_seed(tmp_path: Path) -> None:
    seeds: list[int] = []
    for seed in (0, 1, 2**32 - 1):
        config = {"samples": 4, "held_out": 50, "held_out_seed": seed}
        prompts = Prompts(settings_for(numbered(tmp_path, 60), seed=seed, **config), PLAIN)
        seeds += prompts.batch(range(200)).column("seed").to_pylist() + prompts.held_out().column("seed").to_pylist()
    assert len(set(seeds)) == len(seeds) == 3 * (800 + 50)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # the upper bits are used


def test_held_out_is_one_row_a_prompt_and_always_the_same(tmp_path: Path) -> None:
    prompts = Prompts(settings_for(numbered(tmp_path, 30), held_out=7, samples=4), PLAIN)
    before = prompts.held_out()
    prompts.batch(range(40))
    assert before.equals(prompts.held_out())
    assert before.column("ticket").to_pylist() == list(range(7))
    assert before.column("sample").to_pylist() == [0] * 7


def test_a_held_out_prompt_is_never_trained_on_under_another_row_number(tmp_path: Path) -> None:
    rows = [{"prompt": str(number % 10), "copy": number // 10} for number in range(30)]
    prompts = Prompts(settings_for(jsonl(tmp_path / "a.jsonl", rows), held_out=4), PLAIN)
    held_out = set(prompts.held_out().column("prompt").to_pylist())
    assert len(held_out) == 4
    trained = prompts.batch(range(18)).to_pylist()
    assert not held_out & {row["prompt"] for row in trained}
    assert len({row["prompt_id"] for row in trained}) == 18  # copies of training prompts stay: 6 x 3
    expected = {"read": 30, "skipped": 0, "cut": 0, "duplicates": 8, "held_out": 4, "train": 18}
    assert prompts.counts == expected


def test_prompts_that_cutting_makes_equal_do_not_leak(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} hello world be kind"} for number in range(20)]
    rows += [{"prompt": "how"}, {"prompt": "are"}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    for seed in range(10):
        prompts = Prompts(settings_for(source, seed=seed, max_tokens=4, overlong="cut_left"), PLAIN)
        trained = {tuple(row) for row in prompts.batch(range(30)).column("prompt_tokens").to_pylist()}
        assert not trained & {tuple(row) for row in prompts.held_out().column("prompt_tokens").to_pylist()}


def test_batches_have_the_prompt_schema_and_say_where_they_come_from(tmp_path: Path) -> None:
    source = numbered(tmp_path, 10)
    prompts = Prompts(settings_for(source), CHAT)
    for batch in (prompts.batch([3, 1]), prompts.held_out(), prompts.batch([])):
        assert batch.schema.equals(schema.PROMPT, check_metadata=False)
        schema.check(batch)
        assert schema.from_bytes(schema.to_bytes(batch)).equals(batch)
        assert batch.schema.metadata[b"keel.schema_version"] == schema.SCHEMA_VERSION.encode()
        assert batch.schema.metadata[b"keel.run"] == b"test"
    tokenizers = [
        CHAT,
        word_tokenizer(numbers=200),
        PLAIN,
        word_tokenizer(numbers=201),
        word_tokenizer("other", 200),
    ]
    batches = [Prompts(settings_for(source), tokenizer).batch([0]) for tokenizer in tokenizers]
    digests = [batch.schema.metadata[b"keel.tokenizer"] for batch in batches]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4  # the template and the vocabulary both count
