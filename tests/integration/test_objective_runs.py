"""Objectives through the command line: stored pairs train offline, a stopping rule stops."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import finish
from keel import files
from test_runs import metrics_of, policy_of, rollouts_of

pytestmark = pytest.mark.slow

Start = Callable[..., Any]


def test_simpo_learns_offline_from_stored_pairs(write_config: Start, keel: Start, tmp_path: Path) -> None:
    """chosen and rejected of the prompt source, read by vLLM, scored, buffered and trained like samples."""
    run = tmp_path / "offline" / "run"
    config = write_config(
        "offline",
        run={"name": "offline", "steps": 8, "directory": str(run)},
        sampling={"samples_per_prompt": 2, "max_tokens": 12, "stored_ratio": 1.0},
        objective={"kind": "preference", "loss": "simpo", "beta": 2.0, "target_margin": 0.5},
        regularizer={"kl": {"coefficient": 0.0}},
        rewards=[
            {"name": "label", "kind": "stored"},
            {"name": "distinct", "source": "keel.examples:distinct_token_ratio", "role": "monitor"},
        ],
        learners={"threads": 1, "precision": "fp32", "learning_rate": 3e-3},
    )
    topics = ["love", "money", "music", "time", "rain", "snow"]
    rows = [
        {"prompt": f"What is {t}?", "chosen": f"{t} is good", "rejected": f"no idea about {t} at all"} for t in topics
    ]
    (config.parent / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = finish(keel("train", str(config)))
    assert code == 0, err
    lines = metrics_of(run)
    assert lines[-1]["preference_loss"] < lines[0]["preference_loss"] - 0.3
    assert lines[-1]["preference_accuracy_ratio"] == 1.0
    assert abs(lines[0]["chosen_log_ratio_nats"]) < 1e-3  # at the start the policy is the reference
    assert lines[-1]["chosen_log_ratio_nats"] > lines[-1]["rejected_log_ratio_nats"] + 1
    assert max(line["gap_nats"] for line in lines) < 1e-4  # vLLM reads stored tokens under the weights of now
    first = rollouts_of(run)[0]
    assert {row["completion"] for row in first if row["sample"] == 0} <= {f"{t} is good" for t in topics}
    assert [row["reward"] for row in first] == [1.0, 0.0] * 2
    cut = max(len(row["completion_tokens"]) for row in first)
    assert all((row["finish_reason"] == "stop") == (row["completion_tokens"][-1] == 2) for row in first) and cut <= 12
    assert "held-out prompts" in out and policy_of(run)


def test_a_stopping_rule_ends_the_run_for_good(write_config: Start, keel: Start, tmp_path: Path) -> None:
    """Two members that never disagree: every prompt is settled at once, and resuming does not go on."""
    run = tmp_path / "settled" / "run"
    member = {"source": "rewards:share_of_low_ids"}
    config = write_config(
        "settled",
        run={"name": "settled", "steps": 30, "directory": str(run)},
        objective={
            "kind": "preference",
            "pairs": {"selection": "most_disagreeing", "stop_settled_ratio": 0.9, "judge": "gold"},
        },
        regularizer={"kl": {"coefficient": 0.0}},
        ensemble={"form": "worst"},
        rewards=[{"name": "a", **member}, {"name": "b", **member}, {"name": "gold", "role": "judge", **member}],
    )
    code, _, err = finish(keel("train", str(config)))
    assert code == 0, err
    lines = metrics_of(run)
    assert len(lines) == 1 and lines[0]["settled_ratio"] == 1.0
    assert lines[0]["pairs_dropped_total"] == {"settled": 2.0}
    ends = ("objective_finished", "checkpoint")
    events = [event["event"] for event in files.read_json_lines(run / "events.jsonl")]
    assert [event for event in events if event in ends][-2:] == list(ends)
    code, _, err = finish(keel("resume", str(run)))
    assert code == 0, err
    assert len(metrics_of(run)) == 1
