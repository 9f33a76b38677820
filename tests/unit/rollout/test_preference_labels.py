"""Preference pairs from judged completions: who is left out, who is compared, who is called chosen."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy import special, stats

from judged_pairs import judged, replaced, settings_for
from keel import files, schema
from keel.config.label import NoiseSettings
from keel.errors import ConfigError
from keel.observability.console import ONLINE_COLUMNS, PlainProgress
from keel.rollout import preference_labels
from keel.stages import label as stage
from rollouts import referenced, rollouts, scored


def pairs(result: preference_labels.Labeled) -> list[tuple[str, str]]:
    table = result.table
    return sorted(zip(table.column("chosen").to_pylist(), table.column("rejected").to_pylist(), strict=True))


def test_the_judge_orders_every_pair() -> None:
    result = preference_labels.label(
        judged([["a", "b", "c"], ["d", "e", "f"]], [[1, 3, 2], [-1, -3, -2]]), settings_for()
    )
    assert pairs(result) == [("b", "a"), ("b", "c"), ("c", "a"), ("d", "e"), ("d", "f"), ("f", "e")]
    chosen, rejected = (result.table.column(f"score_{side}").to_numpy() for side in ("chosen", "rejected"))
    assert (chosen > rejected).all()
    assert result.dropped == {} and result.flipped_ratio == 0.0
    assert result.table.column("prompt_id").to_pylist() == [0, 0, 0, 1, 1, 1]
    assert set(result.table.column("prompt").to_pylist()) == {"prompt 0", "prompt 1"}


def test_who_is_left_out_is_counted_by_reason() -> None:
    texts = [["a", " \n", "b", " a "], ["c", "d", "e", "f"], ["g", "h", "", "g"]]
    rewards: list[list[float | None]] = [[1, 9, 0, 5], [0, None, 2, 2], [None, 1, None, 3]]
    result = preference_labels.label(judged(texts, rewards, cut=((1, 0),)), settings_for(truncated="drop"))
    # a failed judge comes before an empty text; the second of two equal texts goes, whatever it scores
    assert result.dropped == {"empty": 1, "equal": 1, "judge_failed": 3, "truncated": 1, "tie": 1}
    assert pairs(result) == [("a", "b"), ("g", "h")]  # of g and g the first was not judged: the second stays
    kept = preference_labels.label(judged(texts, rewards, cut=((1, 0),)), settings_for())
    assert kept.dropped == {"empty": 1, "equal": 1, "judge_failed": 3, "tie": 1}
    assert pairs(kept) == [("a", "b"), ("e", "c"), ("f", "c"), ("g", "h")]


def test_a_prompt_with_one_completion_left_is_counted() -> None:
    result = preference_labels.label(judged([["a", "a"], ["b", "c"]], [[0, 1], [0, 1]]), settings_for())
    assert result.dropped == {"equal": 1, "too_few": 1} and pairs(result) == [("c", "b")]


def test_nothing_usable_is_an_empty_table() -> None:
    result = preference_labels.label(judged([["", ""]], [[0, 1]]), settings_for())
    assert result.table.num_rows == 0 and result.dropped == {"empty": 2} and result.flipped_ratio == 0.0


def test_a_margin_that_is_too_small_is_a_tie() -> None:
    batch = judged([["a", "b"], ["c", "d"]], [[0, 0.25], [0, 0.5]])
    result = preference_labels.label(batch, settings_for(pairs={"min_margin": 0.25}))
    assert pairs(result) == [("d", "c")] and result.dropped == {"tie": 1}


def test_cut_completions_are_kept_and_marked() -> None:
    table = preference_labels.label(
        judged([["a", "b"], ["c", "d"]], [[0, 1], [0, 1]], cut=((0, 1), (1, 0))), settings_for()
    ).table
    assert table.column("chosen").to_pylist() == ["b", "d"]
    assert table.column("chosen_finished").to_pylist() == [False, True]
    assert table.column("rejected_finished").to_pylist() == [True, False]


def test_labels_are_a_function_of_completions_and_seed() -> None:
    texts = [[f"{ticket} {sample}" for sample in range(4)] for ticket in range(30)]
    batch = judged(texts, [[0, 1, 2, 3]] * 30)
    noisy = {"noise": {"flip_ratio": 0.3, "temperature": 1.0}, "pairs": {"selection": "max_random"}}
    one, again = (preference_labels.label(batch, settings_for(**noisy)).table for _ in range(2))
    assert one.equals(again)
    assert not one.equals(preference_labels.label(batch, settings_for(**noisy, run={"seed": 1})).table)


def test_pairs_of_a_prompt_do_not_depend_on_the_other_prompts() -> None:
    texts = [[f"{ticket} {sample}" for sample in range(4)] for ticket in range(10)]
    batch = judged(texts, [[0, 1, 2, 3]] * 10)
    config = settings_for(noise={"flip_ratio": 0.5}, pairs={"selection": "max_random"})
    whole = preference_labels.label(batch, config).table
    half = preference_labels.label(schema.select(batch, batch.column("ticket").to_numpy() >= 5), config).table
    assert whole.slice(5).to_pylist() == half.to_pylist()


# ---- noise


PAIRS = 2000


def two_thousand(difference: float) -> pa.RecordBatch:
    return judged([[f"low {t}", f"high {t}"] for t in range(PAIRS)], [[0, difference]] * PAIRS)


def within(flipped: np.ndarray, chance: float) -> bool:
    """A two-sided binomial test at 1e-4: one run in ten thousand seeds would fail."""
    return stats.binomtest(int(flipped.sum()), len(flipped), chance).pvalue > 1e-4


@pytest.mark.parametrize(
    ("noise", "difference", "chance"),
    [
        ({"flip_ratio": 0.1}, 1.0, 0.1),
        ({"flip_ratio": 0.4}, 1.0, 0.4),
        ({"temperature": 1.0}, 1.0, special.expit(-1.0)),
        ({"temperature": 0.5}, 1.0, special.expit(-2.0)),
        ({"temperature": 4.0}, 1.0, special.expit(-0.25)),
        # wrong by one of the two, not by both
        ({"temperature": 1.0, "flip_ratio": 0.2}, 1.0, 0.8 * special.expit(-1.0) + 0.2 * special.expit(1.0)),
    ],
)
def test_the_share_of_wrong_labels(noise: dict[str, float], difference: float, chance: float) -> None:
    result = preference_labels.label(two_thousand(difference), settings_for(noise=noise))
    table = result.table
    flipped = table.column("flipped").to_numpy()
    assert table.num_rows == PAIRS and within(flipped, chance)
    assert result.flipped_ratio == pytest.approx(flipped.mean())
    wrong = np.array([text.startswith("low") for text in table.column("chosen").to_pylist()])
    assert np.array_equal(wrong, flipped)
    assert np.array_equal(table.column("score_chosen").to_numpy() < table.column("score_rejected").to_numpy(), flipped)


def test_without_noise_no_label_is_wrong_and_with_certainty_all_are() -> None:
    differences, seeds = np.full(PAIRS, 1e-6), np.arange(PAIRS)
    assert not preference_labels.flips(differences, seeds, NoiseSettings(), 0).any()
    assert preference_labels.flips(differences, seeds, NoiseSettings(flip_ratio=1.0), 0).all()


def test_the_temperature_rate_follows_each_difference() -> None:
    differences = np.repeat([0.1, 1.0, 3.0], PAIRS)
    wrong = preference_labels.flips(differences, np.arange(3 * PAIRS), NoiseSettings(temperature=2.0), 5).reshape(3, -1)
    for row, difference in zip(wrong, (0.1, 1.0, 3.0), strict=True):
        assert within(row, 1 - special.expit(difference / 2))


def test_a_flip_does_not_depend_on_the_temperature_draw() -> None:
    """The two draws of a pair are independent: their joint rate is the product."""
    ones, seeds = np.ones(PAIRS), np.arange(PAIRS)
    by_temperature = preference_labels.flips(ones, seeds, NoiseSettings(temperature=1.0), 0)
    by_ratio = preference_labels.flips(ones, seeds, NoiseSettings(flip_ratio=0.3), 0)
    both = preference_labels.flips(ones, seeds, NoiseSettings(temperature=1.0, flip_ratio=0.3), 0)
    assert np.array_equal(both, by_temperature ^ by_ratio)
    assert within(by_temperature & by_ratio, 0.3 * special.expit(-1.0))


def test_pairs_that_share_a_completion_are_flipped_independently() -> None:
    tickets = 300
    texts = [[f"{ticket} {sample}" for sample in range(3)] for ticket in range(tickets)]
    batch = judged(texts, [[2, 1, 0]] * tickets)
    table = preference_labels.label(batch, settings_for(noise={"flip_ratio": 0.5})).table
    flipped = table.column("flipped").to_numpy(zero_copy_only=False).reshape(tickets, 3)
    best = [
        [max(row["score_chosen"], row["score_rejected"]) == 2 for row in table.slice(3 * t, 3).to_pylist()]
        for t in range(tickets)
    ]
    first, second = np.array([row[subject] for row, subject in zip(flipped, np.array(best), strict=True)]).T
    assert within(first == second, 0.5)


# ---- what is written


def conversational(batch: pa.RecordBatch) -> pa.RecordBatch:
    words = [
        json.dumps([{"role": "system", "content": "be kind"}, {"role": "user", "content": text}])
        for text in batch.column("prompt").to_pylist()
    ]
    return replaced(batch, prompt_messages=words)


@pytest.mark.parametrize("chat", [False, True])
def test_the_file_is_a_preference_dataset(chat: bool, tmp_path: Path) -> None:
    """TRL's columns, read back with pyarrow and with datasets; then as prompts of a stage."""
    import datasets

    from keel.config.prompts import PromptSettings
    from keel.rollout import datasets as prompt_datasets
    from keel.rollout import stored_completions

    batch = judged([["a", "b"], ["c", "d"], ["e", "f"]], [[0, 1], [1, 0], [0, 1]], cut=((1, 0),))
    table = preference_labels.label(conversational(batch) if chat else batch, settings_for()).table
    path = tmp_path / "pairs.parquet"
    pq.write_table(table, path)
    read = pq.read_table(path).to_pylist()
    assert read == table.to_pylist() and len(read) == 3
    first = read[0]
    if chat:
        assert [message["content"] for message in first["prompt"]] == ["be kind", "prompt 0"]
        assert first["chosen"] == [{"role": "assistant", "content": "b"}]
        assert first["rejected"] == [{"role": "assistant", "content": "a"}]
    else:
        assert (first["prompt"], first["chosen"], first["rejected"]) == ("prompt 0", "b", "a")
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == read
    assert set(loaded.column_names) >= {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}
    rows = prompt_datasets.read_rows(PromptSettings(source=str(path)))
    stored_completions.check(rows, 2, str(path))
    assert [row.conversational for row in rows] == [chat] * 3
    columns = [json.loads(row.further) for row in rows]
    assert [stored_completions.completions(one) for one in columns] == [["b", "a"], ["c", "d"], ["f", "e"]]
    assert [stored_completions.finished(one) for one in columns] == [[True, True], [False, True], [True, True]]


# ---- rollouts of runs


def run_with(root: Path, *steps: pa.RecordBatch) -> str:
    (root / "rollouts").mkdir(parents=True)
    for number, batch in enumerate(steps, start=1):
        (root / "rollouts" / f"step-{number:06d}.arrow").write_bytes(schema.to_bytes(batch))
    return str(root)


def test_rollouts_of_different_steps_and_runs_are_different_groups(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / "a", rollouts([0, 1]), rollouts([2, 0])), run_with(tmp_path / "b", rollouts([0]))]
    batch = stage._rollouts(runs)
    tickets = batch.column("ticket").to_pylist()
    assert [tickets.count(ticket) for ticket in dict.fromkeys(tickets)] == [2] * 5
    assert batch.column("prompt_id").to_pylist() == [0, 0, 1, 1, 2, 2, 0, 0, 0, 0]
    assert not [name for name in batch.schema.names if name.startswith(("reward", "score", "failure"))]
    judged_again = scored(batch, list(range(10)))
    result = preference_labels.label(judged_again, settings_for())
    assert result.table.num_rows == 5 and sorted(result.table.column("score_chosen").to_pylist()) == [1, 3, 5, 7, 9]


def test_a_run_without_usable_rollouts_is_one_line(tmp_path: Path) -> None:
    empty, old = str(tmp_path), run_with(tmp_path / "old", rollouts([0]).drop_columns(["prompt_messages"]))
    with pytest.raises(ConfigError, match=r"no rollouts/step-\*\.arrow in it; expected the directory of a run"):
        stage._rollouts([empty])
    with pytest.raises(
        ConfigError, match=r"step-000001\.arrow has no column prompt_messages; expected rollouts of this version"
    ):
        stage._rollouts([old])


def test_rollouts_can_be_read_by_a_reference_again(tmp_path: Path) -> None:
    batch = stage._rollouts([run_with(tmp_path / "a", rollouts([0, 1]))])
    again = referenced(batch)
    assert again.column("completion_tokens").equals(batch.column("completion_tokens"))
    assert again.schema.names == [*batch.schema.names, "reference_logprobs"]


def test_two_processes_do_not_label_into_one_directory(tmp_path: Path) -> None:
    settings = settings_for()
    prepared = stage.Labeling(settings, settings.scoring_spec(), tmp_path, None, None, None, rollouts([0]))
    with files.lock(tmp_path), pytest.raises(ConfigError, match="another process works on it"):
        stage.run(prepared, PlainProgress(Console(), 1, ONLINE_COLUMNS))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
