"""The stage around reward models: members one after the other, what is left when it is killed, and its end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keel import files
from keel.config.stages import MemberSettings
from keel.learner import reward_models
from keel.stages import offline_loop, reward
from offline_runs import Killed
from prompt_files import jsonl
from quiet_display import Quiet
from reward_stages import LOSSES, FakeRankGroup, Stage


async def test_every_member_is_trained_and_assembled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, group = Stage(tmp_path, monkeypatch), FakeRankGroup(LOSSES)
    summary = await stage.train(group)
    assert stage.judged == [["4", "4"]] and group.stopped
    assert group.log.count(("step", 1)) == group.log.count(("begin", 0)) == 2
    folder = stage.directory / "model"
    assert (folder / reward_models.ENSEMBLE).is_file()
    assert [(folder / f"member-{n}" / "weights").read_text() for n in (0, 1)] == ["4", "4"]
    for number in (0, 1):
        steps = [line["step"] for line in files.read_json_lines(stage.member(number) / "metrics.jsonl")]
        assert steps == [1, 2, 3, 4]
    assert stage.metrics.totals["rows_dropped_total"] == {"empty": 1.0}
    assert summary["stage"] == "reward" and summary["report"] == {"pairs": 3} and summary["dropped"] == {"empty": 1}


async def test_one_member_is_the_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, members={"count": 1})
    await stage.train(FakeRankGroup(LOSSES))
    assert [path.name for path in (stage.directory / "model").iterdir()] == ["weights"]


@pytest.mark.parametrize("killed", [(0, 4), (1, 1), (1, 4)])
async def test_a_killed_stage_goes_on_with_the_member_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: tuple[int, int]
) -> None:
    stage = Stage(tmp_path, monkeypatch)
    with pytest.raises(Killed, match=f"at step {killed[1]}"):
        await stage.train(FakeRankGroup(LOSSES, killed))
    group = FakeRankGroup(LOSSES)
    await stage.train(group)
    assert group.log.count(("begin", 0)) == 2 - killed[0]  # a finished member is left alone
    assert group.log.count(("restore_checkpoint", 2)) == (killed[1] > 2)
    assert stage.judged == [["4", "4"]]
    for number in (0, 1):
        assert [line["step"] for line in files.read_json_lines(stage.member(number) / "evaluations.jsonl")] == [
            0,
            1,
            2,
            3,
            4,
        ]


async def test_a_killed_member_with_patience_is_trained_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"rows_per_step": 5, "evaluate_every_steps": 1, "patience": 2}
    stage = Stage(tmp_path, monkeypatch, training=training)
    with pytest.raises(Killed, match="at step 2"):
        await stage.train(FakeRankGroup(LOSSES, killed=(0, 2)))
    await stage.train(FakeRankGroup(LOSSES))
    assert stage.judged == [["4", "4"]]


async def test_a_finished_stage_is_said_to_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch)
    summary = await stage.train(FakeRankGroup(LOSSES))
    assert offline_loop.finished(stage.directory) == summary


async def test_no_checkpoint_is_left_of_a_finished_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch)
    await stage.train(FakeRankGroup(LOSSES))
    assert not list(stage.directory.rglob("step-*"))


async def test_dropped_rows_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch)
    with pytest.raises(Killed, match="at step 4"):
        await stage.train(FakeRankGroup(LOSSES, killed=(0, 4)))
    await stage.train(FakeRankGroup(LOSSES))
    assert stage.metrics.totals["rows_dropped_total"] == {"empty": 1.0}


async def test_the_summary_names_the_step_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"rows_per_step": 5, "evaluate_every_steps": 1, "patience": 1}
    stage = Stage(tmp_path, monkeypatch, training=training, members={"count": 1})
    summary = await stage.train(FakeRankGroup([5.0, 4.0, 6.0, 7.0, 8.0]))
    assert stage.judged == [["1"]] and summary["model_step"] == 1


def demonstrations(path: Path, words: list[int]) -> str:
    rows = [{"prompt": f"{number} ", "completion": " ".join(["0"] * count)} for number, count in enumerate(words)]
    return str(jsonl(path, rows))


@pytest.mark.parametrize(
    ("center", "completions"),
    [
        ({"rows": "all"}, {"n", "n n"}),
        ({"rows": "chosen"}, {"n n"}),
        ({"rows": "rejected"}, {"n"}),
        ({"rows": "none"}, set()),
        ({"rows": "all", "max_rows": 5}, {"n", "n n"}),
    ],
)
def test_what_scores_zero_on_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, center: dict[str, Any], completions: set[str]
) -> None:
    """Training pairs alone, every text once; the same ones every time."""
    stage = Stage(tmp_path, monkeypatch, center=center)
    result = reward._reference(stage.settings, stage.rows)
    answer = [(text.prompt.strip(), text.completion) for text in result]
    assert len(result) == len(set(answer)) == center.get("max_rows", 20 * len(completions))
    assert {" ".join("n" for _ in completion.split()) for _, completion in answer} <= completions
    train = set(stage.rows.train.tolist())
    assert {int(prompt) for prompt, _ in answer} <= train
    assert result == reward._reference(stage.settings, stage.rows)


def test_demonstrations_can_score_zero_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = demonstrations(tmp_path / "d.jsonl", [1, 2, 3])
    stage = Stage(tmp_path, monkeypatch, center={"source": source})
    result = reward._reference(stage.settings, stage.rows)
    assert sorted(text.completion for text in result) == ["0", "0 0", "0 0 0"]


def test_demonstrations_that_are_too_long_score_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = demonstrations(tmp_path / "d.jsonl", [1, 70])
    stage = Stage(tmp_path, monkeypatch, center={"source": source})
    assert all(stage.rows.text.tokens(text) for text in reward._reference(stage.settings, stage.rows))


async def test_members_that_are_averaged_become_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(target: Path, folders: list[Path]) -> None:
        target.mkdir()
        (target / "weights").write_text("+".join((folder / "weights").read_text() for folder in folders))

    monkeypatch.setattr(reward_models, "average_weights", mean)
    stage = Stage(tmp_path, monkeypatch, members={"count": 3, "average_weights": True})
    await stage.train(FakeRankGroup(LOSSES))
    assert stage.judged == [["4+4+4"]]
    assert [path.name for path in (stage.directory / "model").iterdir()] == ["weights"]


def test_members_that_are_averaged_start_from_one_head() -> None:
    averaged, apart = (MemberSettings(count=3, average_weights=average) for average in (True, False))
    assert [averaged.head_seed(7, member) for member in range(3)] == [7000, 7000, 7000]
    assert [apart.head_seed(7, member) for member in range(3)] == [7000, 7001, 7002]


async def test_the_report_of_a_mean_has_the_accuracies_of_its_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three held-out pairs: the mean is right in two, its members in three, one (a tie is half) and none."""
    judge = reward._judge
    stage = Stage(tmp_path, monkeypatch, members={"count": 3, "average_weights": True})
    scores = [[2, 1, 4, 1, 0, 1], [1, 0, 1, 0, 1, 0], [1, 1, 0, 2, 3, 3], [0, 1, 0, 1, 0, 1]]

    async def given(settings: Any, folders: list[Path], scored: Any, display: Any) -> np.ndarray:
        assert [folder.name for folder in folders] == ["mean", "a", "b", "c"] and len(scored) == 6
        return np.array(scores, float)

    monkeypatch.setattr(reward, "_scores", given)
    offsets: list[tuple[str, float]] = []
    monkeypatch.setattr(reward_models, "center", lambda folder, offset: offsets.append((folder.name, offset)))
    prepared = reward.RewardTraining(stage.settings, stage.directory, "m", stage.rows, [], 4)
    trained = [tmp_path / name for name in "abc"]
    report = await judge(prepared, [tmp_path / "mean"], trained, Quiet())
    assert report["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert report["member_accuracies"] == pytest.approx([1.0, 1 / 3, 0.0])
    assert offsets == [("mean", 0.0)]  # members are sealed, so they stay uncentered
