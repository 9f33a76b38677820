"""Whole runs through the command line on a tiny model: files, repetition, death and resume, staleness, refusals."""

import json
import re
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from commands import finish, kill
from keel import checkpoint, files, schema
from keel.learner import model_files
from live import last_step, title_of, wait

TIMES = ("time", "free_memory_bytes", "generate_tokens_per_second", "batches_waiting")
Start = Callable[..., Any]
ADAPTING: dict[str, Any] = {
    "run": {"steps": 6},
    "checkpoint": {"every_steps": 3},
    "evaluation": {"every_steps": 3},
    "objective": {
        "advantage": "gae",
        "critic": {"trunk": "own", "popart": True, "learning_rate": 1e-2},
        "normalize_reward": True,
        "epochs": 2,
        "clip_low": 0.2,
        "clip_high": 0.2,
    },
    "regularizer": {"kl": {"coefficient": 0.05, "controller": {"kind": "dual", "target_nats": 1.0}}},
    "reference": {"threads": 1, "dtype": "float32", "ref_policy": "previous", "iteration_steps": 2},
    "rewards": [
        {"name": "even", "source": "rewards:mostly_even"},
        {"name": "low", "source": "rewards:paced", "role": "monitor"},
    ],
    "buffer": {"groups_per_step": 2, "dynamic_sampling_refills": 2},
}
"""Critic with PopArt, reward normalizer, dual KL, dynamic sampling, a new reference every two steps."""


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or this machine's memory wrote."""
    lines = files.read_json_lines(run / "metrics.jsonl")
    return [
        {name: value for name, value in line.items() if name not in TIMES and "seconds" not in name} for line in lines
    ]


def policy_of(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run)
    assert newest is not None
    return load_file(newest / "policy" / "model.safetensors")


def rollouts_of(run: Path) -> list[list[dict[str, Any]]]:
    timings = ("generate_seconds", "score_seconds", "generator")
    batches = [schema.from_bytes(path.read_bytes()) for path in sorted((run / "rollouts").glob("*.arrow"))]
    return [[{k: v for k, v in row.items() if k not in timings} for row in batch.to_pylist()] for batch in batches]


def same_policy(one: Path, other: Path) -> bool:
    a, b = policy_of(one), policy_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(write_config: Start, keel: Start, tmp_path: Path, pace: Path) -> None:
    """With all that adapts (ADAPTING). Also: every file is there; a tracker sees every step once and changes nothing."""
    whole, broken = (tmp_path / name / "run" for name in ("whole", "broken"))
    code, out, err = finish(keel("train", str(write_config("whole", **with_directory(whole, ADAPTING)))))
    assert code == 0, err
    tracked = ADAPTING | {"tracking": {"trackers": ["tensorboard"]}}
    pace.write_text("3.0")  # or the run could end before it is killed
    process = keel("train", str(write_config("broken", **with_directory(broken, tracked))))
    wait(process, lambda: last_step(broken) >= 4 and checkpoint.latest(broken), "four steps")
    kill(process)
    pace.unlink()
    assert len(metrics_of(broken)) < 6
    code, resumed_out, err = finish(keel("resume", str(broken)))
    assert code == 0, err
    assert "resuming from step-" in resumed_out
    lines = metrics_of(whole)
    assert metrics_of(broken) == lines
    assert rollouts_of(broken) == rollouts_of(whole)
    assert same_policy(broken, whole)
    assert (broken / "frontier.arrow").read_bytes() == (whole / "frontier.arrow").read_bytes()
    states = [json.loads((checkpoint.latest(run) / "state.json").read_text())["objective"] for run in (whole, broken)]
    assert states[0] == states[1]
    check_adaptation(lines, states[0])
    assert [path.name for path in sorted((broken / "references").glob("step-*"))] == ["step-000002", "step-000004"]
    check_files(whole, out)
    check_tracked(broken)


@pytest.mark.slow
def test_an_extended_run_equals_one_of_that_length(write_config: Start, keel: Start, tmp_path: Path) -> None:
    """Four steps, then two more, with all that adapts; at step 4 a new reference is due, which the end left out."""
    whole, longer = (tmp_path / name / "run" for name in ("whole", "longer"))
    changes = ADAPTING | {"evaluation": {"every_steps": 2}, "checkpoint": {"every_steps": 2}}
    code, _, err = finish(keel("train", str(write_config("whole", **with_directory(whole, changes)))))
    assert code == 0, err
    short = with_directory(longer, changes)
    short["run"] = {**short["run"], "steps": 4}
    code, _, err = finish(keel("train", str(write_config("longer", **short))))
    assert code == 0, err
    code, out, err = finish(keel("resume", str(longer), "--steps", "6"))
    assert code == 0 and "resuming from step-000004" in out, err
    lines = [[line | {"steps_wanted": None} for line in metrics_of(run)] for run in (longer, whole)]
    assert lines[0] == lines[1] and rollouts_of(longer) == rollouts_of(whole)
    assert same_policy(longer, whole)
    assert (longer / "frontier.arrow").read_bytes() == (whole / "frontier.arrow").read_bytes()
    code, out, err = finish(keel("verify", str(longer)))
    assert code == 0, out
    code, _, err = finish(keel("resume", str(longer), "--steps", "5"))
    assert code == 2 and "has trained 6 steps; expected at least 6" in " ".join(err.split())


def check_adaptation(lines: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Every number that moves is in both files, and has moved; the reference is new after steps 2 and 4."""
    coefficients = [line["kl_coefficient"] for line in lines]
    assert coefficients[0] == 0.05 and len(set(coefficients)) == len(lines)
    assert state["kl"]["value"] != coefficients[-1]  # the file holds what the next step would have used
    assert state["popart"]["value"]["mean"] != 0 and lines[-1]["popart_mean"]["value"] != 0
    assert state["moments"]["count"] > 10 and lines[-1]["normalizer_std"] > 0
    assert {"critic_loss", "explained_variance", "advantage_std"} <= set(lines[-1])
    kl = [abs(line["kl_nats"]) for line in lines]
    assert max(kl[0], kl[2], kl[4]) < 1e-3 < min(kl[1], kl[3], kl[5])
    assert lines[-1]["groups_dropped_total"].get("uniform_rewards", 0) > 0


def check_tracked(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(run / "tensorboard"))
    seen.Reload()
    lines = metrics_of(run)
    for section, name in (("reward", "reward"), ("rollout", "kl_nats"), ("train", "loss")):
        shown = [(event.step, event.value) for event in seen.Scalars(f"{section}/{name}")]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    assert {event.step for event in seen.Scalars("evaluation/proxy")} == {0, 3, 6}


def with_directory(directory: Path, changes: dict[str, Any]) -> dict[str, Any]:
    return {**changes, "run": {"name": "same", "directory": str(directory), **changes.get("run", {})}}


def check_files(run: Path, out: str) -> None:
    """The run directory of design: columns, manifest, checkpoint, exported policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "held-out prompts" in out and "step   6 (reward" in out
    manifest = files.read_json_lines(run / "rollouts" / "MANIFEST.jsonl")
    assert [line["step"] for line in manifest] == [1, 2, 3, 4, 5, 6]
    for line in manifest:
        content = (run / "rollouts" / line["file"]).read_bytes()
        assert files.digest_of(content) == line["xxh3_128"]
        batch = pa.ipc.open_file(content).read_all()
        assert batch.num_rows == line["rows"] == 2 * len(line["tickets"])  # a uniform group is dropped
        assert {"reward", "reward_even", "reward_low", "reference_logprobs", "completion_logprobs"} <= set(
            batch.schema.names
        )
    policy = checkpoint.latest(run) / "policy"
    model = AutoModelForCausalLM.from_pretrained(policy)
    assert dict(model_files.headers(policy)) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert AutoTokenizer.from_pretrained(policy).chat_template
    assert "rlhf" in (policy / "README.md").read_text()
    checkpoint.read_state(checkpoint.latest(run))


@pytest.mark.exhaustive  # tests/chaos does it, too
def test_a_killed_generator_is_replaced_and_changes_nothing(write_config: Start, keel: Start, tmp_path: Path) -> None:
    changes = {"run": {"steps": 12}}
    calm = write_config("calm", **with_directory(tmp_path / "calm" / "run", changes))
    assert finish(keel("train", str(calm)))[0] == 0
    rough = write_config("rough", **with_directory(tmp_path / "rough" / "run", changes))
    process = keel("train", str(rough))
    run = tmp_path / "rough" / "run"
    wait(process, lambda: last_step(run) >= 1, "one step")
    victims = [child for child in psutil.Process(process.pid).children(recursive=True) if is_generator(child)]
    assert victims, "no generator process found"
    victims[0].send_signal(signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    assert same_policy(run, tmp_path / "calm" / "run")
    assert [e["role"] for e in files.read_json_lines(run / "events.jsonl") if e["event"] == "worker_lost"] == [
        "generator"
    ]


def is_generator(process: psutil.Process) -> bool:
    return "VllmGenerator" in title_of(process)


def test_late_samples_two_generators_two_ranks(write_config: Start, keel: Start, tmp_path: Path, pace: Path) -> None:
    """max_staleness 1 with ZeRO-2 on two ranks: bounded, corrected, finished; the page is served meanwhile."""
    pace.write_text("2.0")
    config = write_config(
        "late",
        run={"name": "late", "steps": 4, "directory": str(tmp_path / "late" / "run")},
        rewards=[{"name": "low", "source": "rewards:paced"}],
        buffer={"groups_per_step": 2, "max_staleness": 1},
        generators={"count": 2, "threads": 1, "kv_cache_bytes": 2**26, "dtype": "float32"},
        learners={"count": 2, "threads": 1, "precision": "fp32", "zero_stage": 2, "learning_rate": 1e-3},
    )
    process = keel("train", str(config))
    lines = []
    page = ""
    for line in process.stdout:
        lines.append(line)
        if result := re.search(r"http://\S+/metrics", line):
            address = result.group()
        if "step 2/4" in line:  # the page is read while the scorer rests
            page = urllib.request.urlopen(address, timeout=10).read().decode()
    code, _, err = finish(process)
    assert code == 0, err
    steps = metrics_of(tmp_path / "late" / "run")
    assert steps[0]["staleness_max_versions"] == 0
    assert max(line["staleness_max_versions"] for line in steps) == 1
    assert 'keel_steps_total{run="late"} 2.0' in page
    assert 'keel_reward_component{reward="low",run="late"}' in page


def test_nucleus_sampling_stops_at_the_parity_test(write_config: Start, keel: Start) -> None:
    config = write_config("nucleus", sampling={"samples_per_prompt": 2, "max_tokens": 8, "top_p": 0.5})
    code, _, err = finish(keel("train", str(config)))
    assert code == 1
    message = err.strip().splitlines()[-1]
    assert "parity.max_gap_nats=0.1" in message and "sampling.top_p=0.5" in message, err


@pytest.mark.exhaustive  # test_recovery.py ends a run by another fault
def test_a_run_whose_rewards_fail_stops_and_says_why(write_config: Start, keel: Start, tmp_path: Path) -> None:
    reward = [{"name": "broken", "source": "rewards:not_a_number"}]
    config = write_config("failing", rewards=reward, run={"name": "x", "directory": str(tmp_path / "failing" / "run")})
    code, _, err = finish(keel("train", str(config)))
    assert code == 1
    assert "failures.max_failed_ratio=0.5" in err, err
    assert not (tmp_path / "failing" / "run" / "checkpoints").exists()


@pytest.mark.exhaustive  # test_two_runs.py compares two in float32
def test_bfloat16_runs_repeat_bit_for_bit(write_config: Start, keel: Start, tmp_path: Path) -> None:
    """Two equal runs in the quickstart's precision; also a reward that fails some samples, which are counted."""
    for name in ("one", "two"):
        config = write_config(
            name,
            run={"name": "same", "steps": 3, "directory": str(tmp_path / name / "run")},
            rewards=[{"name": "length", "source": "rewards:none_for_short"}],
            sampling={"samples_per_prompt": 4, "max_tokens": 8},
            failures={"max_failed_ratio": 1.0},
            generators={"threads": 2, "kv_cache_bytes": 2**26, "dtype": "bfloat16"},
            reference={"threads": 2, "dtype": "bfloat16"},
            learners={"threads": 2, "precision": "bf16", "learning_rate": 1e-3},
            parity={"max_gap_nats": 0.5},
        )
        code, _, err = finish(keel("train", str(config)))
        assert code == 0, err
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert metrics_of(one) == metrics_of(two)
    assert rollouts_of(one) == rollouts_of(two)
    assert same_policy(one, two)
    last = metrics_of(one)[-1]
    assert last["samples_failed_total"]["length_none"] > 0
    rows = [row for step in rollouts_of(one) for row in step]
    assert all(row["failure"] is None and row["completion_tokens"][-1] % 2 == 0 for row in rows)
    assert json.dumps(rows)
