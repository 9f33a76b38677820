"""Objectives through the command line: what adapts survives a kill, stored pairs train offline, a stopping rule stops."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import finish, kill, wait_for
from test_runs import metrics_of, policy_of, rollouts_of, same_policy, with_directory

from keel import checkpoint, durable

pytestmark = pytest.mark.timeout(600)
Start = Callable[..., Any]


def test_everything_that_adapts_goes_on_after_a_kill(
    write_config: Start, keel: Start, tmp_path: Path, pace: Path
) -> None:
    """Critic with PopArt, reward normaliser, dual KL, dynamic sampling, a new reference every two steps."""
    changes: dict[str, Any] = {
        "run": {"steps": 6},
        "checkpoint": {"every_steps": 3},
        "evaluation": {"every_steps": 0},
        "objective": {
            "advantage": "gae",
            "critic": {"trunk": "own", "popart": True, "learning_rate": 1e-2},
            "normalise_reward": True,
            "epochs": 2,
            "clip_low": 0.2,
            "clip_high": 0.2,
        },
        "regulariser": {"kl": {"coefficient": 0.05, "controller": {"kind": "dual", "target_nats": 1.0}}},
        "reference": {"threads": 1, "dtype": "float32", "ref_policy": "previous", "iteration_steps": 2},
        "rewards": [
            {"name": "low", "source": "rewards:mostly_even"},
            {"name": "pace", "source": "rewards:paced", "role": "monitor"},
        ],
        "buffer": {"groups_per_step": 2, "dynamic_sampling_refills": 2},
    }
    runs = {name: tmp_path / name / "run" for name in ("whole", "broken")}
    whole = write_config("whole", **with_directory(runs["whole"], changes))
    code, _, err = finish(keel("train", str(whole)))
    assert code == 0, err
    pace.write_text("1.0")  # or the run could end before it is killed
    process = keel("train", str(write_config("broken", **with_directory(runs["broken"], changes))))
    broken = runs["broken"]
    wait_for(lambda: len(metrics_of(broken)) >= 4 and checkpoint.latest(broken) is not None, 200, "four steps")
    kill(process)
    pace.unlink()
    assert len(metrics_of(broken)) < 6
    code, _, err = finish(keel("resume", str(broken)))
    assert code == 0, err
    lines = metrics_of(runs["whole"])
    assert metrics_of(broken) == lines
    assert rollouts_of(broken) == rollouts_of(runs["whole"])
    assert same_policy(broken, runs["whole"])
    states = [json.loads((checkpoint.latest(run) / "state.json").read_text())["objective"] for run in runs.values()]
    assert states[0] == states[1]
    check_adaptation(lines, states[0])
    assert [path.name for path in sorted((broken / "references").glob("step-*"))] == ["step-000002", "step-000004"]


def check_adaptation(lines: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Every number that moves is in both files, and has moved; the reference is new after steps 2 and 4."""
    coefficients = [line["kl_coefficient"] for line in lines]
    assert coefficients[0] == 0.05 and len(set(coefficients)) == len(lines)
    assert state["kl"]["value"] != coefficients[-1]  # the file holds what the next step would have used
    assert state["popart"]["value"]["mean"] != 0 and lines[-1]["popart_mean"]["value"] != 0
    assert state["moments"]["count"] > 10 and lines[-1]["normaliser_std"] > 0
    assert {"critic_loss", "explained_variance", "advantage_std"} <= set(lines[-1])
    kl = [abs(line["kl_nats"]) for line in lines]
    assert max(kl[0], kl[2], kl[4]) < 1e-3 < min(kl[1], kl[3], kl[5])
    assert lines[-1]["groups_dropped_total"].get("uniform_rewards", 0) > 0


def test_simpo_learns_offline_from_stored_pairs(write_config: Start, keel: Start, tmp_path: Path) -> None:
    """chosen and rejected of the prompt source, read by vLLM, scored, buffered and trained like samples."""
    run = tmp_path / "offline" / "run"
    config = write_config(
        "offline",
        run={"name": "offline", "steps": 8, "directory": str(run)},
        sampling={"samples_per_prompt": 2, "max_tokens": 12, "stored_ratio": 1.0},
        objective={"kind": "preference", "loss": "simpo", "beta": 2.0, "target_margin": 0.5},
        regulariser={"kl": {"coefficient": 0.0}},
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
        regulariser={"kl": {"coefficient": 0.0}},
        ensemble={"form": "worst"},
        rewards=[{"name": "a", **member}, {"name": "b", **member}, {"name": "gold", "role": "judge", **member}],
    )
    code, _, err = finish(keel("train", str(config)))
    assert code == 0, err
    lines = metrics_of(run)
    assert len(lines) == 1 and lines[0]["settled_ratio"] == 1.0
    assert lines[0]["pairs_dropped_total"] == {"settled": 2.0}
    assert [e["event"] for e in durable.read_json_lines(run / "events.jsonl")][-2:] == [
        "objective_finished",
        "checkpoint",
    ]
    code, _, err = finish(keel("resume", str(run)))
    assert code == 0, err
    assert len(metrics_of(run)) == 1
