"""The files of configs/tldr one after the other, as README.md there shows them, on a tiny GPT-NeoX of Pythia's shape.

Everything but sizes, devices, the start model and the data is what the files say; the stages find each other's folders
under runs/tldr. Like Pythia's, the tokenizer has one token that begins and ends everything, no padding token of its
own, and no chat template.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import finish, kill, start_keel
from keel import checkpoint, files
from keel.learner import reward_models, tiny
from keel.learner.reward_models import ScoredText
from test_runs import metrics_of, rollouts_of, same_policy

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]  # test_stage_runs.py: other files
CONFIGS = Path(__file__).parents[2] / "configs" / "tldr"
END, PADDING = "<|endoftext|>", "<|padding|>"
TOPICS = ["cats", "dogs", "rain", "snow", "love", "work", "cars", "food", "time", "money", "music", "sleep"]
PLACES = ["advice", "tifu", "pets", "jobs"]
MACHINE = ["cluster.object_store_bytes=134217728", "cluster.min_memory_bytes=2147483648", "metrics.port=0"]
LEARNER = ["count=1", "gpus=0", "threads=1", "precision=fp32", "tokens_per_batch=1024", "adam_epsilon=1e-8"]
SMALL = [*MACHINE, "checkpoint.every_steps=0", *(f"learners.{setting}" for setting in LEARNER)]
ARM = [
    *SMALL,
    "run.steps=3",
    "prompts.source=demonstrations.jsonl",
    "prompts.max_tokens=96",
    "prompts.held_out=8",
    "sampling.max_tokens=16",
    "buffer.groups_per_step=4",
    "learners.learning_rate=2e-4",
    "evaluation.every_steps=0",
    *(f"generators.{setting}" for setting in ("gpus=0", "threads=1", "dtype=float32", "enforce_eager=true")),
    "generators.kv_cache_bytes=67108864",
    *(f"{actor}.{setting}" for actor in ("scorers", "reference") for setting in ("gpus=0", "threads=1")),
    "reference.dtype=float32",
]


def pythia(folder: Path) -> Path:
    """A tiny random GPT-NeoX, untied, with a tokenizer of Pythia's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tiny.write(folder, "gpt_neox", tied=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END, PADDING], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([prompt(number) for number in range(48)], trainer)
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    named = {"bos_token": END, "eos_token": END, "unk_token": END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert len(tokenizer.get_vocab()) <= config["vocab_size"]
    config |= {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def prompt(number: int) -> str:
    topic, place = TOPICS[number % 12], PLACES[number // 12]
    return f"SUBREDDIT: r/{place}\n\nTITLE: My {topic}\n\nPOST: It is about {topic}.\n\nTL;DR:"


def write_rows(folder: Path) -> None:
    """Demonstrations, and pairs whose better summary says `good`; both in the columns of the hub's datasets."""
    topics = [TOPICS[number % 12] for number in range(48)]
    demonstrations = [{"prompt": prompt(n), "completion": f" My {topic} again."} for n, topic in enumerate(topics)]
    pairs = [
        {"prompt": prompt(n), "chosen": f" good {topic}", "rejected": f" {topic} zzz"} for n, topic in enumerate(topics)
    ]
    pairs[0]["rejected"] = " a much longer text than anybody would ever want to read here" * 4
    for name, rows in (("demonstrations", demonstrations), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def keel(folder: Path, *arguments: str) -> str:
    process = start_keel(*arguments, folder=folder)
    try:
        code, out, err = finish(process)
    finally:
        kill(process)
    assert code == 0, f"keel {' '.join(arguments[:2])}: {out[-1000:]}{err[-4000:]}"
    return out


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all commands have run."""
    folder = tmp_path_factory.mktemp("tldr")
    model = pythia(folder / "pythia")
    write_rows(folder)
    sizes = ["training.rows_per_step=8", "training.evaluate_every_steps=0", "learners.learning_rate=3e-3"]
    data = ["prompts.source=demonstrations.jsonl", "prompts.max_tokens=96", "prompts.held_out=8"]
    overrides = [f"policy.model={model}", "completions.max_tokens=24", "training.epochs=4"]
    keel(folder, "sft", str(CONFIGS / "sft-1b.yaml"), *SMALL, *sizes, *data, *overrides)
    data = ["prompts.source=pairs.jsonl", "prompts.held_out=12", "center.source=demonstrations.jsonl"]
    overrides = ["completions.max_tokens=128", "training.epochs=5"]
    keel(folder, "reward", str(CONFIGS / "reward-1b.yaml"), *SMALL, *sizes, *data, *overrides)
    for arm in ("rloo-kl", "rloo-entropy-sum"):
        keel(folder, "train", str(CONFIGS / f"{arm}.yaml"), *ARM)
    keel(folder, "evaluate", "runs/tldr/rloo-kl", "evaluation.against=runs/tldr/sft-1b", *MACHINE)
    out = keel(folder, "compare", "runs/tldr/rloo-kl", "runs/tldr/rloo-entropy-sum", "--json")
    (folder / "compare.json").write_text(out)
    return folder


def run_of(work: Path, name: str) -> Path:
    return work / "runs" / "tldr" / name


def stage(work: Path, name: str) -> dict[str, Any]:
    return json.loads((run_of(work, name) / "stage.json").read_text())


def generates(folder: Path) -> None:
    """transformers loads the folder as a language model that says something finite."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**tokenizer(prompt(0), return_tensors="pt")).logits
    assert torch.isfinite(logits).all() and logits.std() > 0


def test_sft_learns_the_demonstrations(work: Path) -> None:
    answer = stage(work, "sft-1b")
    assert (answer["stage"], answer["rows"], answer["steps"], answer["dropped"]) == ("sft", 40, 20, {})
    first, last = answer["evaluations"][0], answer["evaluations"][-1]
    assert last["loss"] < first["loss"] - 0.5
    assert len(metrics_of(run_of(work, "sft-1b"))) == 20
    generates(run_of(work, "sft-1b") / "model")


def test_the_reward_model_knows_the_marker_and_demonstrations_score_zero(work: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    answer = stage(work, "reward-1b")
    assert (answer["stage"], answer["rows"], answer["dropped"]) == ("reward", 35, {"too_long": 1})
    assert answer["report"]["accuracy"]["mean"] >= 0.9, answer["report"]
    folder = run_of(work, "reward-1b") / "model"
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert plain.num_labels == 1 and type(plain).__name__ == "GPTNeoXForSequenceClassification"
    rows = files.read_json_lines(work / "demonstrations.jsonl")
    model = reward_models.load_reward_model(folder)
    scores = model.scores([ScoredText(row["prompt"], [], row["completion"], True) for row in rows])
    assert abs(sum(scores) / len(scores)) < 1e-3 and answer["report"]["reference_rows"] == len(rows)
    good, bad = model.scores([ScoredText(prompt(3), [], text, True) for text in (" good snow", " snow zzz")])
    assert good > bad + 0.5


@pytest.mark.parametrize("arm", ["rloo-kl", "rloo-entropy-sum"])
def test_an_arm_trains_from_the_sft_model_against_the_reward_model(work: Path, arm: str) -> None:
    run = run_of(work, arm)
    lines = metrics_of(run)
    assert [line["version"] for line in lines] == [1, 2, 3]
    names = ("reward", "kl_nats", "sequence_entropy_nats", "entropy_nats", "gap_nats", "grad_norm", "length_tokens")
    assert all(math.isfinite(line[name]) for line in lines for name in names)
    assert max(line["gap_nats"] for line in lines) < 1e-3  # learner and sampler are one function
    assert abs(lines[0]["kl_nats"]) < 1e-3  # the reference is the SFT model, and the policy leaves it
    assert abs(lines[2]["kl_nats"]) > abs(lines[0]["kl_nats"])
    batches = rollouts_of(run)
    assert [len(rows) for rows in batches] == [8, 8, 8]
    assert all(math.isfinite(row["reward_proxy"]) and row["reward"] == row["reward_proxy"] for row in batches[0])
    unfinished = [row["finish_reason"] != "stop" for row in batches[0]]
    assert lines[0]["shaping_term"] == pytest.approx(-sum(unfinished) / 8)  # the missing-end penalty
    model = reward_models.load_reward_model(run_of(work, "reward-1b") / "model")
    texts = [ScoredText(row["prompt"], [], row["completion"], row["finish_reason"] == "stop") for row in batches[0]]
    assert [row["reward_proxy"] for row in batches[0]] == pytest.approx(model.scores(texts), abs=1e-4)
    generates(checkpoint.latest(run) / "policy")


def test_the_arms_start_alike_and_part(work: Path) -> None:
    """The same completions in the first step; then one pays for KL, the other is paid for entropy."""
    runs = [run_of(work, arm) for arm in ("rloo-kl", "rloo-entropy-sum")]
    kl, entropy = (rollouts_of(run)[0] for run in runs)
    assert [row["completion_tokens"] for row in kl] == [row["completion_tokens"] for row in entropy]
    assert not same_policy(*runs)
    paid, earned = (metrics_of(run) for run in runs)
    assert paid[0]["reward"] == earned[0]["reward"] and paid[2]["kl_nats"] != earned[2]["kl_nats"]
    assert paid[2]["reward_kl_term"] != 0 and all(line["reward_entropy_term"] == 0 for line in paid)
    assert all(line["reward_entropy_term"] > 0 for line in earned) and earned[2]["reward_kl_term"] == 0


def test_evaluation_and_comparison(work: Path) -> None:
    result = json.loads((run_of(work, "rloo-kl") / "evaluation" / "evaluation.json").read_text())
    assert (result["against"], result["prompts"]) == ("runs/tldr/sft-1b", 8)
    assert set(result["means"]) == {f"{model}, {how}" for model in ("policy", "other") for how in ("sampled", "greedy")}
    assert abs(result["means"]["other, sampled"]["kl_nats"]["mean"]) < 1e-3  # the SFT model is the reference
    for how in ("sampled", "greedy"):
        assert math.isfinite(result["means"][f"policy, {how}"]["reward_proxy"]["mean"])
        assert 0 <= result["win_rates"][how]["win_rate"]["mean"] <= 1
    compared = json.loads((work / "compare.json").read_text())
    assert [arm["name"] for arm in compared["arms"]] == ["rloo-kl", "rloo-entropy-sum"] and compared["prompts"] == 8
    steps = compared["matchings"]["steps"]
    assert steps["level"] == 3 and set(steps["arms"]) == {"rloo-kl", "rloo-entropy-sum"}
    for arm in steps["arms"].values():
        assert all(math.isfinite(arm["values"][name]["mean"]) for name in ("reward", "kl_nats", "length_tokens"))
