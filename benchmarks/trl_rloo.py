"""TRL's RLOOTrainer on the work of benchmarks/end_to_end.py; run by the Python of TRL's own environment.

Usage: trl_rloo.py JOB.json     writes JOB's `result`: seconds of each step and of its stages, completion tokens of each
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

STAGES = {"_generate": "generate", "_get_per_token_logps_and_entropies": "log-probs", "training_step": "step"}


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    analyzer = SentimentIntensityAnalyzer()

    def vader(completions: list[Any], **columns: Any) -> list[float]:
        texts = [turn[-1]["content"] if isinstance(turn, list) else turn for turn in completions]
        return [analyzer.polarity_scores(text)["compound"] for text in texts]

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    rows = [
        {"prompt": [{"role": "system", "content": job["system"]}, {"role": "user", "content": p}]}
        for p in job["prompts"]
    ]
    arguments = RLOOConfig(
        output_dir=job["scratch"],
        per_device_train_batch_size=job["rows"],
        num_generations=job["samples"],
        max_completion_length=job["tokens"],
        generation_kwargs={"min_new_tokens": job["tokens"]},
        temperature=1.0,
        top_k=0,
        beta=job["beta"],
        learning_rate=job["learning_rate"],
        adam_beta2=0.95,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        max_steps=job["steps"],
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = RLOOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=vader,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
    )
    for method, stage in STAGES.items():
        clock.time(trainer, method, stage)
    trainer.train()
    lengths = [
        entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry
    ]
    result = {"seconds": clock.steps, "stages": clock.stages, "tokens": [length * job["rows"] for length in lengths]}
    Path(job["result"]).write_text(json.dumps(result))


class Clock(TrainerCallback):
    """Wall seconds of every step, and within it of the wrapped methods."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.stages: list[dict[str, float]] = []
        self._current: dict[str, float] = defaultdict(float)

    def time(self, trainer: Any, method: str, stage: str) -> None:
        inner = getattr(trainer, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.monotonic()
            try:
                return inner(*arguments, **named)
            finally:
                self._current[stage] += time.monotonic() - started

        setattr(trainer, method, timed)

    def on_step_begin(self, *arguments: Any, **named: Any) -> None:
        self._started = time.monotonic()
        self._current.clear()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self.steps.append(time.monotonic() - self._started)
        self.stages.append(dict(self._current))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
