"""Sweeps: which runs there are, what is refused before the first, what is skipped, what ends and what continues."""

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from keel import files
from keel.config import loader
from keel.config.sweep import SweepSettings
from keel.errors import ConfigError
from keel.observability import evaluations
from keel.stages import sweep
from rollouts import generated, prompts, referenced, scored

BASE: dict[str, Any] = {
    "run": {"name": "any", "steps": 3},
    "metrics": {"port": 0},
    "policy": {"model": "./absent"},
    "prompts": {"source": "prompts.jsonl", "held_out": 4},
    "regularizer": {"kl": {"coefficient": 0.05}},
    "rewards": [{"name": "length", "source": "keel.examples:distinct_token_ratio"}],
}
ARMS: dict[str, Any] = {"kl": None, "none": {"regularizer": {"kl": {"coefficient": 0.0}}, "rewards.length.weight": 2}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path


def settings_for(**changes: Any) -> SweepSettings:
    tree = {"base": "base.yaml", "arms": ARMS, "seeds": [0, 5], "directory": "runs/s", **changes}
    return loader.parse_as(SweepSettings, tree)


def planned(**changes: Any) -> list[sweep.SweepRun]:
    return sweep.plan(settings_for(**changes), Path("sweep.yaml"))


def finish(config_path: Path, trained: int | None = None) -> None:
    """What a run leaves: rewards of seed + 10 per unit of the reward's weight on four prompts, KL 2 nats at the end."""
    settings = loader.load(config_path)
    directory, steps = Path(settings.run_directory), settings.run.steps
    files.write(directory / "config.yaml", loader.dump(settings).encode())
    reward = settings.run.seed + 10 * settings.rewards[0].weight
    for step, kl in ((0, 0.0), (steps, 2.0)):
        rows = generated(prompts(range(4), 1), logprobs=[[-0.5, -0.5]] * 4)
        rows = referenced(rows, [[-0.5 - kl, -0.5]] * 4)
        evaluations.store(directory, step, scored(rows, [reward * (step > 0) + place for place in range(4)]))
    (directory / "metrics.jsonl").unlink(missing_ok=True)
    for step in range(1, steps + 1):
        line = {"step": step, "time": 1.0, "trained_tokens_total": 100.0 * step, "reward_component": {"a": reward}}
        files.append_json(directory / "metrics.jsonl", line | {"largest_share": "generate"})
    checkpoint = directory / "checkpoints" / f"step-{trained or steps:06d}"
    files.write_json(checkpoint / "state.json", {"finished": False})
    files.write(checkpoint / "COMMIT", b"")


def run(monkeypatch: pytest.MonkeyPatch, codes: dict[str, int] | None = None, **changes: Any) -> tuple[list[str], str]:
    """The runs that were started, and what was printed; runs not named in `codes` finish."""
    started: list[str] = []

    def train(config_path: Path, end: float, signals: list[int], output: Path | None) -> int:
        started.append(config_path.stem)
        code = (codes or {}).get(config_path.stem, 0)
        if code == 0:
            finish(config_path)
        return code

    monkeypatch.setattr(sweep, "train", train)
    console = Console(file=io.StringIO(), width=150)
    try:
        sweep.run(settings_for(**changes), planned(**changes), console)
    except (SystemExit, sweep.SweepFailed) as end:
        console.print(f"ended: {end}", soft_wrap=True)
    return started, console.file.getvalue()  # type: ignore[attr-defined]


# ---- which runs


def test_every_arm_has_a_run_of_every_seed_the_first_seeds_first(folder: Path) -> None:
    runs = planned()
    assert [(each.arm, each.seed) for each in runs] == [("kl", 0), ("none", 0), ("kl", 5), ("none", 5)]
    settings = runs[3].settings
    assert (settings.run.name, settings.run.seed, settings.run.steps) == ("none-seed-5", 5, 3)
    assert settings.run_directory == str(runs[3].directory) == str(folder / "runs/s/none/seed-5")
    assert (settings.regularizer.kl.coefficient, settings.rewards[0].weight) == (0, 2)
    assert (runs[2].settings.regularizer.kl.coefficient, runs[2].settings.rewards[0].weight) == (0.05, 1)


def test_a_base_can_be_its_blocks_and_stays_what_it_is(folder: Path) -> None:
    tree = json.loads(json.dumps(BASE))
    inside = planned(base=tree)
    assert tree == BASE
    assert [each.settings for each in inside] == [each.settings for each in planned()]


def test_a_grid_multiplies_the_arms(folder: Path) -> None:
    grid = {"learners.learning_rate": [1e-5, 1e-4], "buffer.groups_per_step": [2, 4]}
    runs = planned(grid=grid, seeds=[0])
    assert len(runs) == 2 * 2 * 2
    assert runs[1].arm == "kl-learning_rate-1e-05-groups_per_step-4"
    assert {(r.settings.learners.learning_rate, r.settings.buffer.groups_per_step) for r in runs[4:]} == {
        (1e-5, 2), (1e-5, 4), (1e-4, 2), (1e-4, 4)
    }  # fmt: skip
    named = planned(grid={"learners.threads": [1], "reference.threads": [2]}, seeds=[0])[0].arm
    assert named == "kl-learners.threads-1-reference.threads-2"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"arms": {}}, "arms={}: dictionary should have at least 1 item"),
        ({"arms": {"a b": None}}, "arms.a b"),
        ({"arms": {"a": {"run": {"seed": 1}}}}, "arms.a: run.seed is set by the sweep; expected other settings"),
        ({"grid": {"run.seed": [1, 2]}}, "arms.kl-seed-1: run.seed is set by the sweep"),
        ({"grid": {"run.steps": []}}, "grid.run.steps=[]: list should have at least 1 item"),
        ({"grid": {"policy.model": ["a/b", "a:b"]}}, "grid: two arms are called kl-model-a_b"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 is there twice"),
        ({"seeds": []}, "seeds=[]"),
        ({"budget_seconds": 0}, "budget_seconds=0"),
        ({"base": "absent.yaml"}, "arms.kl: config absent.yaml: no such file"),
        ({"arms": {"kl": None, "typo": {"learner.learning_rate": 1}}}, "arms.typo: learner: unknown setting"),
        ({"arms": {"kl": None, "odd": {"rewards.absent.weight": 1}}}, "arms.odd: override"),
        ({"arms": {"kl": None, "other": {"prompts.held_out": 8}}}, "arms.other: prompts.held_out=8, but 4 in arm kl"),
        ({"arms": {"kl": None, "other": {"evaluation.source": "e.jsonl"}}}, "arms.other: evaluation.source=e.jsonl"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_starts(folder: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        planned(**changes)
    assert str(caught.value).startswith(line)
    assert not (folder / "runs").exists()


def test_arms_may_train_on_other_prompts_where_they_share_those_of_evaluation(folder: Path) -> None:
    shared = BASE | {"evaluation": {"source": "e.jsonl"}}
    runs = planned(base=shared, arms={"kl": None, "other": {"prompts.source": "q.jsonl"}})
    assert [each.settings.prompts.source for each in runs[:2]] == ["prompts.jsonl", "q.jsonl"]


def test_models_and_prompts_of_every_arm_are_checked(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^arms\.(kl|none): policy\.model=\./absent: no such folder"):
        sweep.check(planned())


def test_a_run_of_other_settings_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch)
    with pytest.raises(ConfigError, match=r"^arms\.none: run\.directory=.* holds a run with other settings"):
        planned(arms=ARMS | {"none": {"learners.learning_rate": 0.5}})


# ---- what happens


def test_done_runs_are_skipped_and_longer_ones_continue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch)[0] == ["kl-seed-0", "none-seed-0", "kl-seed-5", "none-seed-5"]
    started, text = run(monkeypatch)
    assert started == [] and text.count("  done (") == 4
    assert run(monkeypatch, arms=ARMS | {"more": {"run.steps": 2}})[0] == ["more-seed-0", "more-seed-5"]
    assert len(run(monkeypatch, base=BASE | {"run": {"name": "any", "steps": 6}})[0]) == 4


def test_an_unfinished_run_is_no_done_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned()[0]
    files.write(first.config_path, loader.dump(first.settings).encode())
    finish(first.config_path, trained=2)
    assert (planned()[0].trained, planned()[0].done) == (2, False)
    files.write_json(first.directory / "checkpoints/step-000002/state.json", {"finished": True})
    assert planned()[0].done  # the objective wanted no further step


def test_a_failed_run_is_named_and_the_others_continue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, text = run(monkeypatch, {"kl-seed-0": 1})
    assert len(started) == 4 and "kl, seed 0 failed with exit code 1; the others continue" in text
    assert "ended: 1 of 4 runs failed: kl, seed 0 (exit code 1)" in text and "equal steps (3)" in text
    assert run(monkeypatch)[0] == ["kl-seed-0"]


def test_an_interrupted_sweep_ends_there_and_continues(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, text = run(monkeypatch, {"none-seed-0": loader.INTERRUPTED})
    assert started == ["kl-seed-0", "none-seed-0"]
    assert "interrupted: 1 of 4 runs are done; the same command continues" in text and text.endswith("ended: 130\n")
    assert run(monkeypatch)[0] == ["none-seed-0", "kl-seed-5", "none-seed-5"]


def test_the_budget_ends_a_sweep_before_the_next_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 10.0, 60.0, 70.0])
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(ticks))
    started, text = run(monkeypatch, budget_seconds=60)
    assert started == ["kl-seed-0"] and "budget_seconds=60 are over: 1 of 4 runs are done" in text


def test_runs_at_the_same_time_print_to_files_and_share_no_port(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs wait for each other, so they are under way together; a third one starts only after one of them."""
    together, outputs = threading.Barrier(2, timeout=30), {}
    under_way, most, counting = 0, 0, threading.Lock()

    def train(config_path: Path, end: float, signals: list[int], output: Path | None) -> int:
        nonlocal under_way, most
        with counting:
            under_way += 1
            most = max(most, under_way)
        together.wait()
        time.sleep(0.2)  # a third run would begin meanwhile
        with counting:
            under_way -= 1
        outputs[config_path.stem] = output
        assert loader.load(config_path).metrics.port == 0
        finish(config_path)
        return 0

    monkeypatch.setattr(sweep, "train", train)
    fixed = BASE | {"metrics": {"port": 9464}}
    console = Console(file=io.StringIO(), width=150)
    sweep.run(settings_for(base=fixed, concurrent_runs=2), planned(base=fixed, concurrent_runs=2), console)
    assert most == 2
    assert outputs == {name: folder / f"runs/s/output/{name}.txt" for name in outputs} and len(outputs) == 4
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[1/4] kl, seed 0  starts; its output: runs/s/output/kl-seed-0.txt" in text and "equal steps (3)" in text
    assert planned(base=fixed)[0].settings.metrics.port == 9464


def test_what_a_run_prints_goes_to_the_end_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import sys\nprint('out')\nsys.exit('error')")
    output = tmp_path / "output" / "a.txt"
    for _ in range(2):
        assert sweep.train(Path("c.yaml"), float("inf"), [], output) == 1
    assert sorted(output.read_text().split()) == ["error", "error", "out", "out"]


def test_the_end_is_a_table_a_picture_and_all_metrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means 10 + {0, 5} and 20 + {0, 5}, plus the prompts' own 1.5."""
    _, text = run(monkeypatch)
    assert "minus kl (2 seeds) (paired)" in text and "14.000 [" in text and "+10.000 [" in text
    assert "several seeds: interval over seeds and prompts" in text
    assert (folder / "runs/s/frontier.png").read_bytes().startswith(b"\x89PNG")
    table = pq.read_table(folder / "runs/s/metrics.parquet")
    assert table.schema.names == ["run", "arm", "seed", "step", "metric", "value"]
    rows = {tuple(row.values())[1:5]: row["value"] for row in table.to_pylist()}
    assert len(rows) == table.num_rows
    assert rows["none", 5, 2, "reward_component.a"] == 25 and rows["kl", 0, 3, "trained_tokens_total"] == 300
    assert rows["none", 0, 3, "evaluation/proxy"] == 21.5 and rows["kl", 5, 3, "evaluation/kl_nats"] == 2
    assert {name for _, _, _, name in rows if "share" in name or name.endswith("step")} == set()


# ---- the process of a run


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a Python program stand for `keel train`."""
    popen = sweep.subprocess.Popen
    monkeypatch.setattr(
        sweep.subprocess, "Popen", lambda command, **streams: popen([sys.executable, "-c", code], **streams)
    )


def test_a_run_is_asked_to_stop_at_the_end_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    child(
        monkeypatch, "import signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(130))\ntime.sleep(60)"
    )
    assert sweep.train(Path("c.yaml"), time.monotonic() + 2, []) in (130, -signal.SIGUSR1)


def test_a_run_that_ends_gives_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "raise SystemExit(7)")
    assert sweep.train(Path("c.yaml"), float("inf"), []) == 7


def test_sigterm_is_passed_on_and_ctrl_c_is_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import time\ntime.sleep(60)")
    before = signal.getsignal(signal.SIGINT)
    with sweep._only_noting_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)
        assert sweep.train(Path("c.yaml"), float("inf"), signals) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before
