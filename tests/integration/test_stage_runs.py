"""Stages through the command line: a killed one resumes bit for bit, rollouts become labels, bad input ends with 2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from commands import finish, kill
from keel import checkpoint, files, schema
from keel.learner import reward_models
from live import last_step, wait

pytestmark = pytest.mark.slow
Start = Callable[..., Any]
EPOCHS, STEPS = 20, 160
"""A step takes some hundredths of a second: enough of them that a run can be killed amid them."""
TIMES = ("time", "step_seconds", "free_memory_bytes", "learner_seconds_total", "checkpoints_total")


def rows(folder: Path, count: int = 40) -> Path:
    """Pairs that a marker tells apart: the chosen answer has it."""
    path = folder / "pairs.jsonl"
    pairs = [{"prompt": f"What is {n}?", "chosen": f"love {n} dog", "rejected": f"the fox {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def write(folder: Path, model: Path, source: Path, **blocks: Any) -> Path:
    tree: dict[str, Any] = {
        "run": {"name": "stage", "directory": str(folder / "run")},
        "policy": {"model": str(model)},
        "prompts": {"source": str(source), "max_tokens": 32, "held_out": 8},
        "completions": {"max_tokens": 32},
        "training": {"rows_per_step": 4, "epochs": 2},
        "learners": {"threads": 1, "precision": "fp32", "learning_rate": 1e-3, "tokens_per_batch": 256},
        "cluster": {"object_store_bytes": 2**27, "min_memory_bytes": 2**31},
        "metrics": {"port": 0},
    }
    for block, values in blocks.items():
        tree[block] = {**tree.get(block, {}), **values} if isinstance(values, dict) else values
    folder.mkdir(exist_ok=True)
    path = folder / "stage.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def numbers(run: Path) -> list[dict[str, Any]]:
    lines = files.read_json_lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("command", ["sft", pytest.param("reward", marks=pytest.mark.exhaustive)])
def test_a_killed_stage_goes_on_bit_for_bit(keel: Start, tmp_path: Path, tiny_model: Path, command: str) -> None:
    source = rows(tmp_path)
    if command == "sft":
        answers = [json.loads(line) for line in source.read_text().splitlines()]
        source.write_text(
            "".join(json.dumps({"prompt": a["prompt"], "completion": a["chosen"]}) + "\n" for a in answers)
        )
    runs = {}
    for name in ("whole", "broken"):
        config = write(tmp_path / name, tiny_model, source, checkpoint={"every_steps": 3}, training={"epochs": EPOCHS})
        runs[name] = run = tmp_path / name / "run"
        process = keel(command, str(config))
        offline_run = run if command == "sft" else run / "members" / "0"
        if name == "broken":
            wait(
                process,
                lambda offline_run=offline_run: last_step(offline_run) >= 5 and checkpoint.latest(offline_run),
                "5 steps",
            )
            kill(process)
            assert not (run / "stage.json").exists()
            process = keel("resume", str(run))
        code, _, err = finish(process)
        assert code == 0, err
    offline_runs = [run if command == "sft" else run / "members" / "0" for run in runs.values()]
    assert numbers(offline_runs[0]) == numbers(offline_runs[1]) and len(numbers(offline_runs[0])) == STEPS
    assert [files.digest(run / "model" / "model.safetensors") for run in runs.values()] == [
        files.digest(runs["whole"] / "model" / "model.safetensors")
    ] * 2
    evaluations = [files.read_json_lines(offline_run / "evaluations.jsonl") for offline_run in offline_runs]
    assert evaluations[0] == evaluations[1] and [line["step"] for line in evaluations[0]] == [0, STEPS]
    assert evaluations[0][-1]["loss"] < evaluations[0][0]["loss"]


def test_rollouts_of_a_run_become_labels_and_a_centered_ensemble(
    write_config: Start, keel: Start, tmp_path: Path, tiny_model: Path
) -> None:
    """train -> label by a judge that fails on some rows -> two reward models -> a run that they reward."""
    config = write_config("online", run={"steps": 3}, sampling={"samples_per_prompt": 4, "max_tokens": 8})
    code, _, err = finish(keel("train", str(config)))
    assert code == 0, err
    online = config.parent / "run"
    label = tmp_path / "label.yaml"
    tree = {
        "run": {"name": "label", "directory": str(tmp_path / "label")},
        "runs": [str(online)],
        "judge": {"name": "gold", "source": "rewards:low_ids_or_none"},
        "pairs": {"selection": "all"},
        "failures": {"max_failed_ratio": 0.9},
        "cluster": {"object_store_bytes": 2**27, "min_memory_bytes": 2**31},
    }
    label.write_text(yaml.safe_dump(tree))
    code, out, err = finish(keel("label", str(label)))
    assert code == 0, err
    done = json.loads((tmp_path / "label" / "stage.json").read_text())
    scored = schema.from_bytes((tmp_path / "label" / "completions.arrow").read_bytes())
    assert done["completions"] == scored.num_rows == 3 * 2 * 4
    assert done["dropped"]["judge_failed"] == scored.column("reward").null_count > 0
    assert f"{done['dropped']['judge_failed']} judge_failed" in out
    pairs = pq.read_table(tmp_path / "label" / "pairs.parquet").to_pylist()
    assert len(pairs) == done["pairs"] > 0
    assert all(row["score_chosen"] > row["score_rejected"] for row in pairs)

    source = rows(tmp_path)
    trained = write(
        tmp_path / "rm", tiny_model, source, members={"count": 2}, training={"rows_per_step": 8, "epochs": 6}
    )
    code, out, err = finish(keel("reward", str(trained)))
    assert code == 0, err
    model = tmp_path / "rm" / "run" / "model"
    report = json.loads((tmp_path / "rm" / "run" / "report.json").read_text())
    assert report["accuracy"]["low"] > 0.5 and len(report["member_accuracies"]) == 2
    texts = [
        reward_models.ScoredText(row["prompt"], [], row[side], True)
        for row in map(json.loads, source.read_text().splitlines())
        for side in ("chosen", "rejected")
    ]
    scores = reward_models.Ensemble(model, "model").scores(texts)
    assert scores.shape == (2, 80) and abs(scores.mean(1)).max() < 0.2  # zero on the training rows, up to held-out ones
    assert abs(scores[0] - scores[1]).max() > 1e-3

    rewards = [{"name": "proxy", "kind": "model", "source": str(model.parent), "ensemble": {"form": "worst"}}]
    config = write_config("rewarded", rewards=rewards)
    code, _, err = finish(keel("train", str(config)))
    assert code == 0, err
    batch = schema.from_bytes(next((config.parent / "run" / "rollouts").glob("*.arrow")).read_bytes())
    worst, reward = (batch.column(name).to_pylist() for name in ("reward_proxy_worst", "reward"))
    assert worst == reward
    assert all(mean >= low for mean, low in zip(batch.column("reward_proxy_mean").to_pylist(), worst, strict=True))

    (model / "member-1" / "config.json").unlink()
    code, _, err = finish(keel("train", str(write_config("broken", rewards=rewards))))
    assert code == 2 and "member-1 of its 2 members is missing" in " ".join(err.split())


def test_bad_rows_end_with_one_line_and_nothing_written(keel: Start, tmp_path: Path, tiny_model: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    plain = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    source.write_text(plain * 6 + plain.replace('"a"', '[{"role": "user", "content": "x"}]') * 6)
    config = write(tmp_path / "bad", tiny_model, source, prompts={"held_out": 4})
    code, _, err = finish(keel("reward", str(config)))
    assert code == 2 and "line 7 is of another form" in " ".join(err.split()) and "Traceback" not in err
    assert not (tmp_path / "bad" / "run").exists()


def test_a_language_model_is_no_reward_model(write_config: Start, keel: Start, tiny_model: Path) -> None:
    rewards = [{"name": "proxy", "kind": "model", "source": str(tiny_model)}]
    code, _, err = finish(keel("train", str(write_config("wrong", rewards=rewards))))
    assert code == 2 and "LlamaForCausalLM has no score head" in " ".join(err.split())


def test_averaged_members_are_one_model_that_scores(keel: Start, tmp_path: Path, tiny_model: Path) -> None:
    """WARM: the written model is the mean of the members on the disk, and tells the pairs apart as they do."""
    source, members = rows(tmp_path), {"count": 2, "average_weights": True}
    config = write(tmp_path / "warm", tiny_model, source, members=members, training={"rows_per_step": 8, "epochs": 6})
    code, _, err = finish(keel("reward", str(config)))
    assert code == 0, err
    run = tmp_path / "warm" / "run"
    mean, first, second = (
        load_file(folder / "model.safetensors")
        for folder in (run / "model", *(run / "members" / number / "model" for number in "01"))
    )
    assert all(torch.allclose(mean[name], (first[name] + second[name]) / 2, atol=1e-7) for name in mean)
    assert any(not torch.equal(first[name], second[name]) for name in mean)
    apart = (first["score.weight"] - second["score.weight"]).norm() / first["score.weight"].norm()
    assert apart < 0.5  # heads of other seeds are at right angles: 1.4
    report = json.loads((run / "report.json").read_text())
    assert report["accuracy"]["low"] > 0.5 and len(report["member_accuracies"]) == 2
    text = reward_models.ScoredText("What is 1?", [], "love 1 dog", True)
    assert reward_models.Ensemble(run / "model", "model").scores([text]).shape == (1, 1)
