"""Reward models: Hugging Face sequence classifiers with one output, and ensembles of them.

    FOLDER/config.json, model.safetensors, tokenizer.json        one model
    FOLDER/ensemble.json, member-0/, member-1/, ...              several, each a model of its own

A text is prompt and completion in one form for training and scoring: through the tokenizer's chat template where it
has one and the prompt is conversational, as a text pair for encoders, else one behind the other. A completion that was
cut has no end token behind it. `keel_reward` in config.json holds what transformers has no field for: `offset`
(subtracted from the logit, so that the reference set scores 0 on average) and `max_tokens`.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keel import files
from keel.errors import ConfigError
from keel.learner import loading, model_files, packing
from keel.learner.reward_text import RewardText, ScoredText

ENSEMBLE = "ensemble.json"
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
_NO_LIMIT = 1 << 30
_FIELDS = "completion_fields"
"""Column of what a stored answer's message has beside its content; sampled completions have none."""
_COUNT_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
"""Families that number positions from the padding token's id on."""


def members(folder: Path, setting: str) -> list[Path]:
    """Folders of a reward's models: itself, or the members in ensemble.json. Raises ConfigError for a bad member."""
    if not (folder / ENSEMBLE).is_file():
        check_head(folder, setting)
        return [folder]
    names, named = _names(folder, setting), f"{setting}={folder}"
    for name in names:
        if not (folder / name / "config.json").is_file():
            raise ConfigError(f"{named}: {name} of its {len(names)} members is missing; expected all of them")
        check_head(folder / name, setting)
        loading.check_intact(folder / name, named)
    return [folder / name for name in names]


def _names(folder: Path, setting: str) -> list[str]:
    try:
        names = json.loads((folder / ENSEMBLE).read_bytes())["members"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'{setting}={folder}: {ENSEMBLE} names no members; expected {{"members": [folder, ...]}}')
    return names


def check_head(folder: Path, setting: str) -> None:
    """The folder holds a sequence classifier with one output. Raises ConfigError that says what it holds instead."""
    loading.check_harmless(folder, f"{setting}={folder}")
    known = loading.read_config(folder, f"{setting}={folder}").get("architectures") or ["no architecture"]
    heads = [
        (name, file.get_slice(name).get_shape()[0])
        for path in model_files.weight_files(folder)
        for file in [safe_open(path, "pt")]
        for name in _HEADS
        if name in file.keys()  # noqa: SIM118 a safetensors file is no mapping
    ]
    if not heads:
        raise ConfigError(
            f"{setting}={folder}: {known[0]} has no score head ({' or '.join(_HEADS[:2])}); expected a sequence"
            " classifier with one output, for instance what keel reward writes"
        )
    if heads[0][1] != 1:
        raise ConfigError(f"{setting}={folder}: its score head has {heads[0][1]} outputs; expected one")


class RewardModel(nn.Module):
    """A sequence classifier with one output and how texts reach it. Scores are in fp32, offset subtracted."""

    def __init__(self, model: Any, text: RewardText, offset: float) -> None:
        super().__init__()
        self.model, self.text, self.offset = model, text, offset

    def forward(self, ids: Tensor, lengths: Tensor, seconds: Tensor) -> Tensor:
        """Scores [B] of right-padded ids [B, T]; `seconds` [B]: where the second segment begins."""
        places = torch.arange(ids.shape[1], device=ids.device)
        inputs = {"input_ids": ids, "attention_mask": (places < lengths[:, None]).long()}
        if self.text.encoder and "token_type_ids" in self.text.tokenizer.model_input_names:
            inputs["token_type_ids"] = ((places >= seconds[:, None]) & (places < lengths[:, None])).long()
        if self.text.encoder:
            return self.model(**inputs).logits[:, 0].float() - self.offset
        # transformers takes for the last token the last that is not padding, which an end token may be
        states = self.model.base_model(**inputs).last_hidden_state
        last = states[torch.arange(len(ids), device=ids.device), lengths - 1]
        return self.model.score(last)[:, 0].float() - self.offset

    def padded(self, rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, T], lengths [B], seconds [B] of token rows."""
        pad = self.model.config.get_text_config().pad_token_id
        width = max(len(ids) for ids, _ in rows)
        tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
        return tokens, torch.tensor([len(ids) for ids, _ in rows]), torch.tensor([second for _, second in rows])

    @torch.inference_mode()
    def scores(self, texts: Sequence[ScoredText], tokens_per_batch: int = 4096) -> list[float | None]:
        """One score a text; None for one whose completion alone is too long.

        A pass has texts of like length and at most `tokens_per_batch` tokens, padding included; a longer text is alone.
        """
        rows = [self.text.tokens(text) for text in texts]
        scores: list[float | None] = [None] * len(rows)
        fits = [(place, row) for place, row in enumerate(rows) if row]
        if not fits:
            return scores
        lengths = np.array([len(ids) for _, (ids, _) in fits])
        device = next(self.model.parameters()).device
        for numbers in packing.share_out(lengths, 1, tokens_per_batch)[0][0]:
            places, passed = zip(*(fits[number] for number in numbers), strict=True)
            inputs = (tensor.to(device) for tensor in self.padded(passed))
            for place, score in zip(places, self(*inputs).tolist(), strict=True):
                scores[place] = score
        return scores


def load_reward_model(folder: Path, options: Mapping[str, Any] | None = None, dtype: str = "float32") -> RewardModel:
    """A trained reward model, frozen. `options` of its chat template beside those it was trained with."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    options_of_load = {"dtype": loading.DTYPES[dtype], "output_loading_info": True}
    model, report = loading.pretrained(AutoModelForSequenceClassification, folder, **options_of_load)
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"{folder}: {len(missing)} parameters are not in its weights ({missing[0]}); expected all")
    config, inner = model.config, model.config.get_text_config()
    stored = getattr(config, "keel_reward", None) or {}
    if inner.pad_token_id is None:
        inner.pad_token_id = spare_token(tokenizer, inner.vocab_size)
    options = {**stored.get("chat_template_options", {}), **(options or {})}
    text = RewardText(tokenizer, is_encoder(config), stored.get("max_tokens") or limit(config), options)
    return RewardModel(model.eval().requires_grad_(False), text, stored.get("offset", 0.0))


def start(
    folder: Path, dtype: str, max_tokens: int, seed: int, options: Mapping[str, Any] | None = None
) -> RewardModel:
    """A reward model to train: the folder's trunk, a new head N(0, 1/sqrt(H + 1)) as in 2403.17031, no dropout."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    config = loading.without_dropout(folder)
    config.num_labels, config.problem_type = 1, "regression"  # vLLM would put a sigmoid on a single label otherwise
    text = RewardText(tokenizer, is_encoder(config), min(max_tokens, limit(config)), options)
    if not text.encoder:
        inner = config.get_text_config()
        inner.pad_token_id = tokenizer.pad_token_id = spare_token(tokenizer, inner.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of heads with more than one layer
        loaded = {"config": config, "dtype": loading.DTYPES[dtype]}
        model = loading.pretrained(AutoModelForSequenceClassification, folder, **loaded)
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters())
    head = next(named[name] for name in _HEADS if name in named)
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=generator) / (head.shape[1] + 1) ** 0.5)
        if "classifier.bias" in named:
            named["classifier.bias"].zero_()
    return RewardModel(model, text, 0.0)


def check_trunk(config: Any, model: str) -> None:
    """transformers has a sequence classifier of this family. Raises ConfigError."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    family = config.model_type
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(f"policy.model={model}: {family} has no sequence classifier; expected another trunk")


def is_encoder(config: Any) -> bool:
    """It reads a text in both directions, and its score at the first token; else causally, at the last."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def limit(config: Any) -> int:
    """Tokens a model can read."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or _NO_LIMIT
    return positions - (text.pad_token_id + 1 if config.model_type in _COUNT_BEHIND_PADDING else 0)


def spare_token(tokenizer: Any, vocabulary: int = _NO_LIMIT) -> int:
    """A token to pad with that ends no text: the tokenizer's own, another special one, or the last one.

    One that the model has: a tokenizer may name a pad token beyond the embedding.
    """
    beyond = {number for number in tokenizer.get_vocab().values() if number >= vocabulary}
    pad, ends = tokenizer.pad_token_id, {tokenizer.eos_token_id} | beyond
    if pad is not None and pad not in ends:
        return int(pad)
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}  # Pythia names no pad
    named = (added | set(tokenizer.all_special_ids)) - ends
    return min(named) if named else max(set(tokenizer.get_vocab().values()) - ends)


def check_readable(folder: Path, setting: str) -> None:
    """The model is whole, reads text alone, and has every token that its tokenizer makes of one. Raises ConfigError.

    A pad token does not count: many tokenizers name one beyond the embedding.
    """
    named = f"{setting}={folder}"
    model_files.check_text_alone(folder, named)
    model_files.check_whole(folder, named)
    vocabulary, tokenizer = model_files.vocabulary(folder, named), loading.load_tokenizer(folder, setting)
    largest = max((number for number in tokenizer.get_vocab().values() if number != tokenizer.pad_token_id), default=0)
    if largest >= vocabulary:
        raise ConfigError(
            f"{named}: its tokenizer has token {largest}, beyond the model's vocabulary of {vocabulary};"
            " expected the model's own tokenizer"
        )


def write(folder: Path, model: RewardModel, named: dict[str, Tensor]) -> None:
    """A folder that transformers and vLLM load, not centered."""
    stored = {"offset": 0.0, "max_tokens": model.text.max_tokens}
    model.model.config.keel_reward = stored | ({"chat_template_options": o} if (o := model.text.options) else {})
    model.model.save_pretrained(folder, state_dict=named)
    model.text.tokenizer.save_pretrained(folder)


def center(folder: Path, offset: float) -> None:
    """Subtract a number from all scores of a written model: in its head's bias, or by config.json where it has none.

    In place, so not of a model that a marker vouches for.
    """
    weights, path = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights) if weights.is_file() else {}
    tree = json.loads(path.read_text(encoding="utf8"))
    if "classifier.bias" in tensors:
        tensors["classifier.bias"] = tensors["classifier.bias"] - offset
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        tree["keel_reward"]["offset"] += offset
        files.write(path, json.dumps(tree, indent=2).encode())


def average_weights(target: Path, folders: Sequence[Path]) -> None:
    """Write one model whose every tensor is the mean of the folders' (WARM, 2401.12187), in their number format.

    Its scores are near the mean of theirs only where all began at the same weights, the head included, and stayed in
    one basin; then it costs one model to score. Raises ValueError for models of different shapes.
    """
    shutil.copytree(folders[0], target)
    for path in model_files.weight_files(target):
        models = [load_file(folder / path.name) for folder in folders]
        forms = [{name: (tensor.shape, tensor.dtype) for name, tensor in model.items()} for model in models]
        if any(form != forms[0] for form in forms):
            raise ValueError(f"{path.name}: the {len(models)} models differ in their tensors; expected one family")
        mean = {
            name: torch.stack([model[name].double() for model in models]).mean(0).to(tensor.dtype)
            for name, tensor in models[0].items()
        }
        save_file(mean, path, metadata={"format": "pt"})
    files.sync_tree(target)


def write_ensemble(folder: Path, names: Sequence[str]) -> None:
    """The file that makes folders an ensemble, once all of them are on the disk."""
    for name in names:
        files.sync_tree(folder / name)
    files.write_json(folder / ENSEMBLE, {"members": list(names)})


def as_batch(scored: Sequence[ScoredText]) -> pa.RecordBatch:
    """Texts in the rollout columns that a reward model reads."""
    reasons = pa.array(["stop" if text.finished else "length" for text in scored]).dictionary_encode()
    columns = {
        "ticket": pa.array(range(len(scored)), pa.int64()),
        "prompt": [text.prompt for text in scored],
        "prompt_messages": [json.dumps(list(text.messages), ensure_ascii=False) for text in scored],
        "completion": [text.completion for text in scored],
        "finish_reason": reasons,
        _FIELDS: [json.dumps(dict(text.fields), ensure_ascii=False) for text in scored],
    }
    return pa.RecordBatch.from_pydict(columns)


def from_batch(batch: pa.RecordBatch) -> list[ScoredText]:
    """Rollout columns -> texts."""
    names = ("prompt", "prompt_messages", "completion", "finish_reason")
    rows = zip(*(batch.column(name).to_pylist() for name in names), strict=True)
    further = batch.column(_FIELDS).to_pylist() if _FIELDS in batch.schema.names else ["{}"] * batch.num_rows
    return [
        ScoredText(prompt, json.loads(messages), answer, reason == "stop", json.loads(fields))
        for (prompt, messages, answer, reason), fields in zip(rows, further, strict=True)
    ]


class Ensemble:
    """All members of a reward model's folder."""

    def __init__(
        self,
        folder: Path,
        setting: str,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
        dtype: str = "float32",
    ) -> None:
        self.models = [load_reward_model(member, options, dtype).to(device) for member in members(folder, setting)]

    def scores(self, texts: Sequence[ScoredText], tokens_per_batch: int = 4096) -> np.ndarray:
        """float64 [members, texts], NaN where a text is too long."""
        rows = [model.scores(texts, tokens_per_batch) for model in self.models]
        return np.array([[np.nan if score is None else score for score in row] for row in rows])
