"""Order, seeds and held-out rows: pure functions of the run seed, the epoch and the ticket."""

from collections import Counter
from pathlib import Path

import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel import schema
from keel.rollout.prompts import Prompts
from prompt_files import CHAT, PLAIN, jsonl, numbered, settings_for, word_tokenizer

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
    assert tuple(range(52)) not in {tuple(dict.fromkeys(each)) for each in orders}


def test_the_held_out_rows_follow_from_the_run_seed(tmp_path: Path) -> None:
    def held_out(seed: int, samples: int) -> frozenset[int]:
        prompts = Prompts(settings_for(numbered(tmp_path, 60), seed=seed, held_out=10, samples=samples), PLAIN)
        return frozenset(prompts.held_out().column("prompt_id").to_pylist())

    assert held_out(0, 2) == held_out(0, 4)
    assert len({held_out(seed, 2) for seed in range(8)}) == 8


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
        prompts = Prompts(settings_for(numbered(tmp_path, 60), seed=seed, samples=4, held_out=50), PLAIN)
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
