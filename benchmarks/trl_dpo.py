"""TRL's DPOTrainer on the Parquet files of `keel label`, as they are: plain and conversational prompts, a tiny Llama.

Usage: python benchmarks/trl_dpo.py [PYTHON]     PYTHON: of TRL's environment, made by benchmarks/end_to_end.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = 9  # three epochs


def write_pairs(folder: Path, conversational: bool) -> None:
    """pairs.parquet of twelve prompts with three scored completions each, one of them cut."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from keel.config.label import LabelSettings
    from keel.rollout import preference_labels

    places = [(ticket, sample) for ticket in range(12) for sample in range(3)]
    asked = [f"What is {ticket} plus one?" for ticket, _ in places]
    said = [[{"role": "user", "content": text}] if conversational else [] for text in asked]
    columns: dict[str, Any] = {
        "ticket": [ticket for ticket, _ in places],
        "seed": [10 * ticket + sample for ticket, sample in places],
        "prompt_id": [ticket for ticket, _ in places],
        "prompt": asked,
        "prompt_messages": [json.dumps(messages) for messages in said],
        "completion": [f" It is {ticket + sample}." for ticket, sample in places],
        "completion_tokens": [[5] * (4 + sample) for _, sample in places],
        "finish_reason": ["length" if sample == 2 else "stop" for _, sample in places],
        "reward": [-abs(sample - 1.0) - sample / 10 for _, sample in places],
    }
    judge = {"name": "gold", "source": "keel.examples:distinct_token_ratio"}
    settings = LabelSettings(policy={"model": "-"}, prompts={"source": "-"}, judge=judge)
    folder.mkdir()
    pq.write_table(
        preference_labels.label(pa.RecordBatch.from_pydict(columns), settings).table, folder / "pairs.parquet"
    )


def train(model: str, pairs: str, output: str) -> None:
    """In TRL's environment: DPO on the file, no column changed; prints one JSON object."""
    import torch
    import transformers
    import trl
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=pairs, split="train")
    settings = trl.DPOConfig(
        output_dir=output,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        args=settings,
        train_dataset=rows,
    )
    trainer.train()
    losses = [round(line["loss"], 4) for line in trainer.state.log_history if "loss" in line]
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    print(json.dumps({**versions, "columns": rows.column_names, "rows": len(rows), "losses": losses}))


def main(python: str) -> None:
    from keel.learner import tiny

    with tempfile.TemporaryDirectory() as name:
        model = tiny.write(Path(name) / "llama")
        for form in ("plain", "conversational"):
            folder = Path(name) / form
            write_pairs(folder, form == "conversational")
            command = [python, __file__, "--train", str(model), str(folder / "pairs.parquet"), str(folder / "trl")]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            print(f"{form}: {answer.stdout.splitlines()[-1] if answer.returncode == 0 else answer.stderr[-3000:]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(*sys.argv[2:])
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else str(ROOT / ".venv-trl" / "bin" / "python"))
