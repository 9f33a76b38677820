"""The DeepSpeed learner against a plain PyTorch loop, and 1 rank against 2 at every ZeRO stage."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from keel import schema
from keel.cluster import actors
from keel.config import loader
from keel.config.run import Settings
from keel.learner import tiny, weights
from keel.learner.policy_learner import DeepSpeedLearner
from probe import rendezvous

STEPS = 3
RATE = 1e-2
SAMPLES, GROUPS = 4, 3


@pytest.fixture(scope="module")
def small_ray() -> Iterator[None]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    actors.embedded(num_cpus=4, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


def settings(**learners: Any) -> Settings:
    return loader.parse(
        {
            "policy": {"model": "unused"},
            "prompts": {"source": "unused", "max_tokens": 16},
            "sampling": {"samples_per_prompt": SAMPLES, "max_tokens": 12, "temperature": 0.7},
            "rewards": [{"name": "a", "source": "a:b"}],
            "regularizer": {
                "kl": {"coefficient": 0.05, "placement": "loss", "estimator": "k2"},
                "entropy": {"form": "token_bonus", "coefficient": 0.01},
            },
            "objective": {"correction": "none"},
            "buffer": {"groups_per_step": GROUPS},
            "generators": {"dtype": "float32"},
            "run": {"steps": STEPS},
            "learners": {
                "precision": "fp32",
                "learning_rate": RATE,
                "max_grad_norm": 0.5,
                "threads": 1,
                "tokens_per_batch": 64,
                "head_chunk_tokens": 7,
                "adam_epsilon": 1e-3,  # Adam divides tiny gradients by their own noise otherwise
                **learners,
            },
        }
    )


def rollouts(step: int, vocabulary: int = 300) -> pa.RecordBatch:
    """A step of random rows with uneven lengths; log-probs of sampler and reference are made up."""
    rng = np.random.default_rng(step)
    rows = GROUPS * SAMPLES
    lengths = rng.integers(1, 12, rows)
    prompts = [rng.integers(3, vocabulary, rng.integers(2, 16)).tolist() for _ in range(GROUPS)]
    tickets = np.repeat(np.arange(GROUPS), SAMPLES)
    reason = pa.array(["stop"] * rows).dictionary_encode().cast(schema.GENERATE.field("finish_reason").type)

    def nats() -> pa.ListArray:
        return schema.from_ragged(-rng.exponential(2.0, lengths.sum()).astype(np.float32), lengths, schema.NATS)

    batch = schema.build(
        schema.PROMPT,
        {
            "ticket": tickets,
            "sample": np.tile(np.arange(SAMPLES), GROUPS),
            "prompt_id": tickets,
            "prompt_tokens": [prompts[ticket] for ticket in tickets],
            "prompt": ["p"] * rows,
            "prompt_messages": ["[]"] * rows,
            "prompt_columns": ["{}"] * rows,
            "seed": np.arange(rows),
        },
    )
    generated = {
        "completion_tokens": [rng.integers(3, vocabulary, n).tolist() for n in lengths],
        "completion_logprobs": nats(),
        "weight_versions": schema.from_ragged(np.full(lengths.sum(), step), lengths, schema.TOKENS),
        "completion": ["c"] * rows,
        "finish_reason": reason,
        "generator": ["g"] * rows,
        "generate_seconds": [0.0] * rows,
    }
    scored = {
        "reward": rng.normal(size=rows).astype(np.float32),
        "failure": [None] * rows,
        "score_seconds": [0.0] * rows,
        "scorer": ["s"] * rows,
    }
    batch = schema.append(batch, schema.build(schema.GENERATE, generated))
    batch = schema.append(batch, schema.build(schema.REFERENCE, {"reference_logprobs": nats()}))
    return schema.append(batch, schema.build(schema.SCORE, scored))


def train(folder: Path, ranks: int, **learners: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights after STEPS steps of a learner group, and what each step reported."""
    from keel.cluster import learner_group

    chosen = settings(count=ranks, **learners)
    learner = learner_group.LearnerGroup(chosen, str(folder))
    asyncio.run(learner.ready())
    reports = [ray.get([rank.step.remote(rollouts(step)) for rank in learner.ranks])[0] for step in range(STEPS)]
    answers = [rank.publish.options(num_returns=2).remote() for rank in learner.ranks]
    ray.get([receipt for _, receipt in answers])
    named = {name: tensor.clone() for name, tensor in weights.unpack(ray.get(answers[0][0]))}
    learner.stop()
    return named, [dict(report.metrics) for report in reports]


def plain_pytorch(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same three steps written down once more: whole logits, one row at a time, no packing, no DeepSpeed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    norms = []
    for step in range(STEPS):
        rows = rollouts(step).to_pylist()
        total_tokens = sum(len(row["completion_tokens"]) for row in rows)
        optimizer.zero_grad()
        for row in rows:
            siblings = [other["reward"] for other in rows if other["ticket"] == row["ticket"]]
            advantage = (row["reward"] - np.mean(siblings)) * SAMPLES / (SAMPLES - 1)
            prompt, completion = row["prompt_tokens"], row["completion_tokens"]
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
            log_p = logits.log_softmax(-1)
            chosen = log_p[torch.arange(len(completion)), torch.tensor(completion)]
            k2 = 0.5 * (chosen - torch.tensor(row["reference_logprobs"])).square().sum()
            entropy = -(log_p.exp() * log_p).sum()
            loss = (-advantage * chosen.sum() + 0.05 * k2) / len(rows) - 0.01 * entropy / total_tokens
            loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, norms


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
def test_every_stage_and_size_takes_the_steps_of_a_plain_loop(small_ray: None, tiny_model: Path) -> None:
    expected, norms = plain_pytorch(tiny_model)
    start, _ = plain_start(tiny_model)
    assert largest_difference(expected, start) > 1e-2  # the steps moved the weights, so equality says something
    for stage in (1, 2, 3):
        for ranks in (1, 2):
            got, reports = train(tiny_model, ranks, zero_stage=stage)
            assert largest_difference(got, expected) < 1e-5, (stage, ranks)
            assert [r["grad_norm"] for r in reports] == pytest.approx(norms, rel=1e-4), (stage, ranks)


def plain_start(folder: Path) -> tuple[dict[str, torch.Tensor], None]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, None


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (3, 2)])
def test_layers_that_run_forward_again_take_the_same_steps(
    small_ray: None, tiny_model: Path, stage: int, ranks: int
) -> None:
    plain, checkpointed = (
        train(tiny_model, ranks, zero_stage=stage, activation_checkpointing=wanted)[0] for wanted in (False, True)
    )
    assert largest_difference(plain, plain_start(tiny_model)[0]) > 1e-2
    assert largest_difference(plain, checkpointed) == 0


@pytest.mark.slow
def test_options_that_deepspeed_gets_move_no_number(small_ray: None, tiny_model: Path) -> None:
    plain, _ = train(tiny_model, 1, zero_stage=2)
    assert largest_difference(plain, train(tiny_model, 1, zero_stage=2, deepspeed={"zero_optimization": {}})[0]) == 0
    options = {"zero_optimization": {"overlap_comm": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert largest_difference(plain, train(tiny_model, 2, zero_stage=3, deepspeed=options)[0]) < 1e-5


def test_packing_prompts_changes_nothing_but_the_work(small_ray: None, tiny_model: Path) -> None:
    packed, _ = train(tiny_model, 1, shared_prompt_tokens=64)
    alone, _ = train(tiny_model, 1, shared_prompt_tokens=0)
    assert largest_difference(packed, alone) < 1e-5


def test_a_second_epoch_moves_the_ratio_and_the_clip_sees_it(small_ray: None, tiny_model: Path) -> None:
    """With clipping and two updates on the same batch, the second one has ratios away from 1."""
    learner = ray.remote(DeepSpeedLearner)
    chosen = settings().model_copy(
        update={"objective": settings().objective.model_copy(update={"epochs": 2, "clip_low": 0.01, "clip_high": 0.01})}
    )
    rank = learner.remote(chosen, str(tiny_model), {}, 0, 1, *rendezvous())
    report = ray.get(rank.step.remote(rollouts(0)))
    ray.kill(rank)
    assert report.metrics["clip_ratio"] > 0.05


def exact_kl_by_row(folder: Path, reference: Path, batch: pa.RecordBatch) -> np.ndarray:
    """sum_t KL(pi, ref) over the vocabulary at a temperature of 0.7, by the models' own forward, a row at a time."""
    from transformers import AutoModelForCausalLM

    policy, other = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32) for place in (folder, reference))
    values = []
    with torch.inference_mode():
        for row in batch.to_pylist():
            tokens, before = torch.tensor([row["prompt_tokens"] + row["completion_tokens"]]), len(row["prompt_tokens"])
            log_p, log_r = (
                (model(tokens).logits[0, before - 1 : -1].double() / 0.7).log_softmax(-1) for model in (policy, other)
            )
            values.append(float((log_p.exp() * (log_p - log_r)).sum()))
    return np.array(values)


def step_that_measures(
    folder: Path, reference: Path, share: float, ranks: int, batch: pa.RecordBatch
) -> tuple[dict[str, float], str]:
    """What one step reports, and the digest of the weights after it."""
    plain = settings(count=ranks, zero_stage=3 if ranks > 1 else 1)
    kl = plain.regularizer.kl.model_copy(update={"exact_share": share})
    blocks = {"regularizer": plain.regularizer.model_copy(update={"kl": kl})}
    assert plain.reference is not None
    blocks["reference"] = plain.reference.model_copy(update={"dtype": "float32"})
    chosen = plain.model_copy(update=blocks)
    address, port = rendezvous()
    members = [
        ray.remote(DeepSpeedLearner).remote(
            chosen, str(folder), {"reference": str(reference)}, rank, ranks, address, port
        )
        for rank in range(ranks)
    ]
    reports = ray.get([rank.step.remote(batch) for rank in members])
    receipts = ray.get([rank.publish.options(num_returns=2).remote()[1] for rank in members])
    for rank in members:
        ray.kill(rank)
    return dict(reports[0].metrics), receipts[0].digest


@pytest.mark.slow
def test_the_exact_kl_is_measured_and_moves_nothing(small_ray: None, tiny_model: Path, tmp_path: Path) -> None:
    reference, batch = tiny.write(tmp_path / "reference", seed=5), rollouts(0)
    by_row = exact_kl_by_row(tiny_model, reference, batch)
    assert by_row.min() > 0.1
    without, digest = step_that_measures(tiny_model, reference, 0.0, 1, batch)
    whole, digest_of_whole = step_that_measures(tiny_model, reference, 1.0, 1, batch)
    assert "kl_exact_nats" not in without and digest == digest_of_whole
    assert {name: whole[name] for name in without if "seconds" not in name} == {
        name: without[name] for name in without if "seconds" not in name
    }
    assert whole["kl_exact_nats"] == pytest.approx(by_row.mean(), rel=1e-5)
    draws = [np.random.default_rng([seed, 0]).random() for seed in batch.column("seed").to_pylist()]
    drawn = by_row[np.argsort(draws)[:4]]
    for ranks in (1, 2):
        part, _ = step_that_measures(tiny_model, reference, 0.3, ranks, batch)  # 4 of 12 completions
        assert part["kl_exact_nats"] == pytest.approx(drawn.mean(), rel=1e-5), ranks
