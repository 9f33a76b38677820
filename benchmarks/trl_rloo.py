"""TRL's RLOOTrainer on the work of benchmarks/end_to_end.py; run by the Python of TRL's own environment.

Usage: python trl_rloo.py JOB.json     writes JOB's `result`: a list of {stages, wall, tokens}, one a step
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYZER = SentimentIntensityAnalyzer()


def vader(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """VADER's compound sentiment of each completion, as keel.examples:vader_compound."""
    return [ANALYZER.polarity_scores(turns[-1]["content"])["compound"] for turns in completions]


class Clock(TrainerCallback):
    """Wall seconds from the end of a step to the end of the next, and the seconds of timed calls within."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        """Seconds of this step's calls so far; `rollout` holds the others."""
        self.tokens = 0
        self._ended = 0.0

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        """The first step starts here."""
        self._ended = time.monotonic()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        """Close the step. TRL trains in the same call that asks for the rollouts: training is the rest of the step."""
        now = time.monotonic()
        wall, calls = now - self._ended, self.calls
        stages = {
            "generate": calls["generate"],
            "score": calls["rollout"] - calls["generate"] - calls["recompute"],
            "recompute": calls["recompute"],
            "train": wall - calls["rollout"],
        }
        self.steps.append({"stages": stages, "wall": wall, "tokens": self.tokens})
        self.calls, self.tokens, self._ended = Counter(), 0, now


class TimedTrainer(RLOOTrainer):
    """RLOOTrainer that tells a clock how long its stages take, and nothing else."""

    def __init__(self, clock: Clock, **named: Any) -> None:
        self.clock = clock
        super().__init__(callbacks=[clock], **named)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started = time.monotonic()
        outputs = super()._generate_and_score_completions(inputs)
        self.clock.calls["rollout"] += time.monotonic() - started
        self.clock.tokens += int(outputs["completion_mask"].sum())
        return outputs

    def _generate(self, prompts: list[Any]) -> Any:
        started = time.monotonic()
        outputs = super()._generate(prompts)
        self.clock.calls["generate"] += time.monotonic() - started
        return outputs

    def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **named: Any) -> Any:
        """Three uses: the sampling policy's log-probs, the reference's, and (with gradient) the training forward."""
        started = time.monotonic()
        outputs = super()._get_per_token_logps_and_entropies(model, *arguments, **named)
        if model is not self.ref_model and not torch.is_grad_enabled():
            self.clock.calls["recompute"] += time.monotonic() - started
        return outputs


def main(job: dict[str, Any]) -> None:
    """Train for the job's steps and write what the clock saw."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    system = {"role": "system", "content": job["system_prompt"]}
    rows = [{"prompt": [system, {"role": "user", "content": prompt}]} for prompt in job["prompts"]]
    settings = RLOOConfig(
        output_dir=job["scratch"],
        per_device_train_batch_size=job["rows"],
        num_generations=job["samples"],
        max_completion_length=job["tokens"],
        generation_kwargs={"min_new_tokens": job["tokens"]},  # no early end
        temperature=1.0,
        beta=job["beta"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=job["adam_betas"][0],
        adam_beta2=job["adam_betas"][1],
        max_grad_norm=job["max_grad_norm"],
        max_steps=job["steps"],
        shuffle_dataset=False,  # the prompts in Keel's order
        gradient_checkpointing=False,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = TimedTrainer(
        clock,
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16),
        processing_class=tokenizer,
        reward_funcs=vader,
        args=settings,
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    Path(job["result"]).write_text(json.dumps(clock.steps))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
