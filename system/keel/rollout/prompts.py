"""From a ticket to prompt rows: read the source once, tokenize it once, then answer as a pure function.

Nothing here depends on time, worker or call order: the held-out rows and their seeds follow from
`prompts.held_out_seed`, so runs of several seeds share them; the order of an epoch follows from (run seed, epoch), the
seed of a training row from (run seed, ticket, sample).
"""

import functools
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from keel import files, schema
from keel.config.prompts import PolicySettings, PromptSettings
from keel.config.run import LearnerSpec
from keel.config.stages import SamplingSpec
from keel.errors import ConfigError
from keel.learner.chat_text import ChatText
from keel.learner.model_text import ModelText
from keel.rollout import stored_completions
from keel.rollout.datasets import SourceRow, read_rows, wrong
from keel.rollout.row_columns import asked_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptSpec = LearnerSpec | SamplingSpec
_HELD_OUT, _TRAINING = 1, 2  # domains of randomness


@dataclass(frozen=True)
class _Tokenized:
    """The rows of a source that are not skipped."""

    rows: pa.RecordBatch
    """Prompt columns; prompt_id is the row of the source."""
    tokens: list[list[int]]
    skipped: int
    cut: int

    @property
    def identities(self) -> list[tuple[int, ...]]:
        """What makes two prompts equal: the tokens, which the model sees."""
        return [tuple(ids) for ids in self.tokens]


class Prompts:
    """All prompts of a run, tokenized, split into held-out and training rows.

    `counts` holds numbers of rows of prompts.source: `read` = `skipped` (too long) + `duplicates` (of a held-out
    prompt) + `held_out` (with evaluation.source: rows of that) + `train`; `cut` of those not skipped were shortened.
    `rows` are those of the source that are not skipped. Raises ConfigError, one line, for every mistake in a source or
    in the settings that concern it.
    """

    def __init__(
        self, settings: PromptSpec, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[SourceRow] | None = None
    ) -> None:
        """`rows`: of the source, where they were read and checked before."""
        given, samples = rows is not None, settings.sampling.samples_per_prompt
        asked = functools.cache(functools.partial(asked_columns, settings.rewards))
        if rows is None:
            rows = read_rows(settings.prompts, samples if settings.sampling.stored_ratio > 0 else 0, asked)
        rows = list(rows)
        if settings.sampling.stored_ratio > 0 and not given:
            stored_completions.check(rows, samples, settings.prompts.source)
        source = _tokenized(rows, settings.prompts, settings.policy, tokenizer)
        config, held_out = settings.evaluation_prompts, source
        if config is None:
            self._held_out, self._train = split(source.identities, settings.prompts)
        else:
            held_out = _tokenized(read_rows(config, 0, asked), config, settings.policy, tokenizer)
            self._held_out, self._train = split_by(held_out.identities, config, source.identities, settings.prompts)
        self._settings = settings
        self._metadata = _metadata(settings, tokenizer)
        self.rows, self._held_out_rows = source.rows, held_out.rows
        leaving = len(self._train) + (len(self._held_out) if held_out is source else 0)
        self.counts: dict[str, int] = {
            "read": len(rows),
            "skipped": source.skipped,
            "cut": source.cut,
            "duplicates": len(source.tokens) - leaving,
            "held_out": len(self._held_out),
            "train": len(self._train),
        }
        self.largest_token = max((max(ids) for ids in [*source.tokens, *held_out.tokens]), default=0)

    def batch(self, tickets: Sequence[int]) -> pa.RecordBatch:
        """Prompt columns of these tickets, in their order, samples_per_prompt rows each.

        Ticket t is the row at place t % n of the order of epoch t // n, n = `counts["train"]`.
        """
        assert all(ticket >= 0 for ticket in tickets), tickets
        samples = self._settings.sampling.samples_per_prompt
        count, seed = len(self._train), self._settings.run.seed
        rows = [self._train[place_of(ticket, count, seed)] for ticket in tickets]
        return self._build(
            self.rows.take(pa.array(np.repeat(np.array(rows, np.int64), samples))),
            tickets=np.repeat(np.array(tickets, np.int64), samples),
            samples=np.tile(np.arange(samples), len(tickets)),
            domain="train",
            seed=seed,
        )

    def held_out(self, samples: int = 1) -> pa.RecordBatch:
        """`samples` rows a held-out prompt: ticket 0..n-1, seeds unlike the training rows' and alike in all runs."""
        count = len(self._held_out)
        held_out = self._build(
            self._held_out_rows.take(pa.array(np.repeat(self._held_out, samples))),
            tickets=np.repeat(np.arange(count), samples),
            samples=np.tile(np.arange(samples), count),
            domain="held_out",
            seed=self._settings.prompts.held_out_seed,
        )
        return held_out.replace_schema_metadata({**self._metadata, "keel.held_out": "true"})

    def _build(
        self, rows: pa.RecordBatch, tickets: np.ndarray, samples: np.ndarray, domain: str, seed: int
    ) -> pa.RecordBatch:
        seeds = [seed_of(domain, seed, *pair) for pair in zip(tickets.tolist(), samples.tolist(), strict=True)]
        columns: dict[str, Any] = {"ticket": tickets, "sample": samples.astype(np.int16), "seed": seeds}
        columns |= {name: rows.column(name) for name in rows.schema.names}
        return schema.build(schema.PROMPT, columns).replace_schema_metadata(self._metadata)


def _tokenized(
    rows: Sequence[SourceRow], config: PromptSettings, policy: PolicySettings, tokenizer: "PreTrainedTokenizerBase"
) -> _Tokenized:
    """Tokenize the rows of a source; refuse, skip or cut those that are too long. Raises ConfigError."""
    tokens = _tokenize(rows, config, policy, tokenizer)
    lengths = np.array([len(ids) for ids in tokens])
    overlong, kept = lengths > config.max_tokens, np.arange(len(rows))
    if overlong.any() and config.overlong == "refuse":
        raise _too_long(rows, lengths, config)
    if config.overlong == "skip":
        kept = np.flatnonzero(~overlong)
    tokens = [tokens[row][-config.max_tokens :] for row in kept]
    kept_rows = [rows[row] for row in kept.tolist()]
    columns = {
        "prompt_id": pa.array(kept, pa.int64()),
        "prompt_tokens": pa.array(tokens, schema.TOKENS),
        "prompt": pa.array([row.text for row in kept_rows], pa.string()),
        "prompt_messages": pa.array([_messages(row) for row in kept_rows], pa.string()),
        "prompt_columns": pa.array([row.further for row in kept_rows], pa.string()),
    }
    return _Tokenized(pa.record_batch(columns), tokens, len(rows) - len(kept), int(overlong[kept].sum()))


def _messages(row: SourceRow) -> str:
    """Messages of a conversational prompt as JSON, [] of a plain one."""
    return json.dumps([] if isinstance(row.prompt, str) else row.prompt, ensure_ascii=False)


def seed_of(domain: str, seed: int, ticket: int, sample: int) -> int:
    """Seed of a row; domain: train or held_out. A 63-bit hash: fits int64, the same on every machine and Python."""
    return xxhash.xxh3_64_intdigest(f"{domain}:{seed}:{ticket}:{sample}".encode()) >> 1


@functools.lru_cache(maxsize=8)
def _permutation(domain: int, seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of 0..count-1 from raw bits: numpy keeps the stream of PCG64, not that of Generator.permutation."""
    bits = np.random.PCG64(np.random.SeedSequence([domain, seed, epoch])).random_raw(count)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


def split(prompts: Sequence[Hashable], config: PromptSettings) -> tuple[np.ndarray, np.ndarray]:
    """Places of the held-out rows, of different prompts, and of the training rows, whose prompts equal none of them.

    Equality is that of the tokens, which the model sees: also prompts that only became equal by cutting.
    """
    held_out = _drawn(prompts, config, left=1)
    return held_out, _others(prompts, {prompts[place] for place in held_out})


def split_by(
    evaluation: Sequence[Hashable], config: PromptSettings, prompts: Sequence[Hashable], training: PromptSettings
) -> tuple[np.ndarray, np.ndarray]:
    """The same where held-out rows come from a source of their own. Raises ConfigError."""
    held_out = _drawn(evaluation, config, left=0)
    train = _others(prompts, {evaluation[place] for place in held_out})
    if not len(train):
        raise ConfigError(
            f"{config.source_setting}={config.source}: every prompt of {training.source} is among the"
            f" {config.held_out} for evaluation; expected other prompts in one of the two"
        )
    return held_out, train


def _drawn(prompts: Sequence[Hashable], config: PromptSettings, left: int) -> np.ndarray:
    """Places of held-out rows, of different prompts; `left` prompts must remain. Raises ConfigError."""
    first: dict[Hashable, int] = {}
    identity = np.array([first.setdefault(prompt, place) for place, prompt in enumerate(prompts)], np.int64)
    distinct, wanted = np.unique(identity), config.held_out
    if len(distinct) < wanted + left:
        raise ConfigError(
            f"prompts.held_out={wanted}: {config.source} has {len(distinct)} different prompts of"
            f" at most {config.max_tokens} tokens; expected at least {wanted + left}"
        )
    return distinct[_permutation(_HELD_OUT, config.held_out_seed, 0, len(distinct))[:wanted]]


def _others(prompts: Sequence[Hashable], held_out: set[Hashable]) -> np.ndarray:
    return np.array([place for place, prompt in enumerate(prompts) if prompt not in held_out], np.int64)


def place_of(ticket: int, count: int, seed: int) -> int:
    """Which of `count` training rows a ticket is: place t % n of the order of epoch t // n."""
    return int(_permutation(_TRAINING, seed, ticket // count, count)[ticket % count])


def _metadata(settings: PromptSpec, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    vocabulary = sorted(tokenizer.get_vocab().items())
    options = settings.policy.chat_template_options
    content = json.dumps([vocabulary, tokenizer.chat_template, *filter(None, [options])], sort_keys=True).encode()
    return {
        "keel.schema_version": schema.SCHEMA_VERSION,
        "keel.run": settings.run.name,
        "keel.tokenizer": files.digest_of(content)[:16],
    }


def _tokenize(
    rows: Sequence[SourceRow], config: PromptSettings, policy: PolicySettings, tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """Token ids of every prompt, a beginning-of-text token once if the tokenizer or its template has one.

    No end token, also of a tokenizer that puts one behind every text: a completion follows.
    """
    text = ModelText(tokenizer, policy.chat_template_options)
    tokens: list[list[int]] = [[] for _ in rows]
    plain = [place for place, row in enumerate(rows) if isinstance(row.prompt, str)]
    conversations = [place for place, row in enumerate(rows) if not isinstance(row.prompt, str)]
    if conversations:
        require_template(rows[conversations[0]], config, policy, tokenizer)
    for places, rendered in ((plain, False), (conversations, True)):
        texts = [_render(rows[place], config, text.chat) for place in places]
        for place, ids in zip(places, text.prompt_ids(texts, rendered=rendered), strict=True):
            tokens[place] = ids
    for row, ids in zip(rows, tokens, strict=True):
        if not ids:
            raise wrong(config, f"{row.place} is an empty prompt (no tokens); expected some text")
    return tokens


def require_template(
    row: SourceRow, config: PromptSettings, policy: PolicySettings, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Raise ConfigError when a conversation cannot go through a chat template."""
    conversational = f"{row.place} of {config.source} is a list of messages"
    why = conversational if config.system_prompt is None else "prompts.system_prompt makes conversations"
    if policy.chat_template == "never":
        raise ConfigError(f"policy.chat_template=never: {why}; expected auto, or plain prompts alone")
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"policy.model={policy.model}: its tokenizer has no chat template, but {why};"
            " expected a model with one, or plain prompts alone"
        )


def _render(row: SourceRow, config: PromptSettings, chat: ChatText) -> str:
    """The text that the model reads, up to the start of the assistant's answer."""
    if isinstance(row.prompt, str):
        return row.prompt
    from jinja2 import TemplateError  # what chat templates raise, for instance "System role not supported"

    try:
        return chat.render(row.prompt)
    except TemplateError as error:
        problem = f"{row.place}: the chat template refuses it: {error}; expected other roles"
        raise wrong(config, problem) from None


def _too_long(rows: Sequence[SourceRow], lengths: np.ndarray, config: PromptSettings) -> ConfigError:
    longest, count = int(lengths.argmax()), int((lengths > config.max_tokens).sum())
    return ConfigError(
        f"prompts.max_tokens={config.max_tokens}: {count} of {len(rows)} prompts of {config.source} are longer,"
        f" the longest has {lengths[longest]} tokens ({rows[longest].place}); expected more, or"
        " prompts.overlong=skip or cut_left"
    )
