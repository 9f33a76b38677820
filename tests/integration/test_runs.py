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
from conftest import finish, kill, wait_for
from safetensors.torch import load_file

from keel import checkpoint, durable, schema, weights

pytestmark = pytest.mark.timeout(600)
TIMES = ("time", "free_memory_bytes", "generate_tokens_per_second", "batches_waiting")
Start = Callable[..., Any]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or this machine's memory wrote."""
    lines = durable.read_json_lines(run / "metrics.jsonl")
    return [
        {name: value for name, value in line.items() if name not in TIMES and "seconds" not in name} for line in lines
    ]


def policy_of(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run)
    assert newest is not None
    return load_file(newest / "policy" / "model.safetensors")


def rollouts_of(run: Path) -> list[list[dict[str, Any]]]:
    own = ("generate_seconds", "score_seconds", "generator")
    batches = [schema.from_bytes(path.read_bytes()) for path in sorted((run / "rollouts").glob("*.arrow"))]
    return [[{k: v for k, v in row.items() if k not in own} for row in batch.to_pylist()] for batch in batches]


def same_policy(one: Path, other: Path) -> bool:
    a, b = policy_of(one), policy_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_killed_and_resumed_equals_uninterrupted(write_config: Start, keel: Start, tmp_path: Path, pace: Path) -> None:
    """Also the newcomer's run, every file is there; and a tracker's, which sees every step once and changes nothing."""
    changes: dict[str, Any] = {"run": {"steps": 5}, "checkpoint": {"every_steps": 2}, "evaluation": {"every_steps": 2}}
    changes["rewards"] = [
        {"name": "distinct", "source": "keel.examples:distinct_token_ratio"},
        {"name": "low", "source": "rewards:paced", "role": "monitor"},
    ]
    whole = write_config("whole", **with_directory(tmp_path / "whole" / "run", changes))
    code, out, err = finish(keel("train", str(whole)))
    assert code == 0, err
    tracked = changes | {"tracking": {"trackers": ["tensorboard"]}}
    broken = write_config("broken", **with_directory(tmp_path / "broken" / "run", tracked))
    pace.write_text("1.0")  # or the run could end before it is killed
    process = keel("train", str(broken))
    run = tmp_path / "broken" / "run"
    wait_for(lambda: len(metrics_of(run)) >= 3 and checkpoint.latest(run) is not None, 200, "three steps")
    kill(process)
    pace.unlink()
    assert len(metrics_of(run)) < 5
    code, resumed_out, err = finish(keel("resume", str(run)))
    assert code == 0, err
    assert "resuming from step-" in resumed_out
    reference = tmp_path / "whole" / "run"
    assert metrics_of(run) == metrics_of(reference)
    assert rollouts_of(run) == rollouts_of(reference)
    assert same_policy(run, reference)
    assert (run / "frontier.arrow").read_bytes() == (reference / "frontier.arrow").read_bytes()
    check_files(reference, out)
    check_tracked(run)


def check_tracked(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(run / "tensorboard"))
    seen.Reload()
    lines = metrics_of(run)
    for name in ("reward", "kl_nats", "loss"):
        shown = [(event.step, event.value) for event in seen.Scalars(name)]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    assert {event.step for event in seen.Scalars("evaluation.proxy")} == {0, 2, 4, 5}


def with_directory(directory: Path, changes: dict[str, Any]) -> dict[str, Any]:
    return {**changes, "run": {"name": "same", "directory": str(directory), **changes.get("run", {})}}


def check_files(run: Path, out: str) -> None:
    """The run directory of design: columns, manifest, checkpoint, exported policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "held-out prompts" in out and "step   5 (reward" in out
    manifest = durable.read_json_lines(run / "rollouts" / "MANIFEST.jsonl")
    assert [line["step"] for line in manifest] == [1, 2, 3, 4, 5]
    for line in manifest:
        content = (run / "rollouts" / line["file"]).read_bytes()
        assert schema.digest(content) == line["xxh3_128"]
        batch = pa.ipc.open_file(content).read_all()
        assert batch.num_rows == line["rows"] == 4
        assert {"reward", "reward_distinct", "reward_low", "reference_logprobs", "completion_logprobs"} <= set(
            batch.schema.names
        )
    policy = checkpoint.latest(run) / "policy"
    model = AutoModelForCausalLM.from_pretrained(policy)
    assert weights.checkpoint_shapes(policy) == {n: tuple(p.shape) for n, p in model.named_parameters()}
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
    wait_for(lambda: len(metrics_of(run)) >= 1, 200, "one step")
    victims = [child for child in psutil.Process(process.pid).children(recursive=True) if is_generator(child)]
    assert victims, "no generator process found"
    victims[0].send_signal(signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    assert same_policy(run, tmp_path / "calm" / "run")
    assert [e["role"] for e in durable.read_json_lines(run / "events.jsonl") if e["event"] == "worker_lost"] == [
        "generator"
    ]


def is_generator(process: psutil.Process) -> bool:
    try:
        return "VllmGenerator" in " ".join(process.cmdline())
    except psutil.Error:
        return False


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
        if found := re.search(r"http://\S+/metrics", line):
            address = found.group()
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
