"""Tiny random language models with a real tokenizer: for `keel doctor` and the integration tests."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = ["The quick brown fox jumps over the lazy dog.", "What is love? A good question!", "system user assistant"]
_COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}


def write(folder: Path, architecture: str = "llama", tied: bool = True, seed: int = 0) -> Path:
    """Write a random llama, qwen2, qwen3 or gpt_neox model of some 100,000 parameters with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(architecture, len(tokenizer), tied), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # far enough from uniform that a stale or wrong weight shows
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(architecture: str, vocabulary: int, tied: bool) -> Any:
    from transformers import GPTNeoXConfig, LlamaConfig, Qwen2Config, Qwen3Config

    common = _COMMON | {
        "vocab_size": vocabulary,
        "intermediate_size": 128,
        "tie_word_embeddings": tied,
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "bos_token_id": SPECIAL.index("<|im_start|>"),
        "pad_token_id": SPECIAL.index("<pad>"),
    }
    match architecture:
        case "llama":
            return LlamaConfig(**common, num_key_value_heads=1)
        case "qwen2":
            return Qwen2Config(**common, num_key_value_heads=1)
        case "qwen3":
            return Qwen3Config(**common, num_key_value_heads=1, head_dim=32)
        case "gpt_neox":
            return GPTNeoXConfig(**common)
    raise ValueError(f"architecture {architecture!r}: expected llama, qwen2, qwen3 or gpt_neox")


def make_tokenizer() -> Any:
    """The tokenizer of all tiny models: byte-level BPE with ChatML tokens."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(_TEXT * 4, 320, SPECIAL),
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    wrapped.chat_template = _TEMPLATE
    return wrapped


def byte_level_bpe(texts: Iterable[str], vocabulary: int, special: Sequence[str]) -> Any:
    """A byte-level BPE of `tokenizers`, trained on texts; the special tokens have the first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
