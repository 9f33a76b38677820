"""From a ticket to prompt rows: read the source once, tokenize it once, then answer as a pure function.

Nothing here depends on time, worker or call order: the held-out rows follow from the run seed, the order of
an epoch from (run seed, epoch), a seed from (run seed, ticket, sample).
"""

import functools
import json
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from keel import files, schema
from keel.config.prompts import PromptSettings
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


class Prompts:
    """All prompts of a run, tokenized, split into held-out and training rows.

    `counts` holds numbers of rows: `read` = `skipped` (too long) + `duplicates` (of a held-out prompt) +
    `held_out` + `train`; `cut` of those not skipped were shortened. Raises ConfigError, one line, for every
    mistake in the source or in the settings that concern it.
    """

    def __init__(
        self, settings: PromptSpec, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[SourceRow] | None = None
    ) -> None:
        """`rows`: of the source, where they were read and checked before."""
        given, samples = rows is not None, settings.sampling.samples_per_prompt
        if rows is None:
            asked = functools.cache(functools.partial(asked_columns, settings.rewards))
            rows = read_rows(settings.prompts, samples if settings.sampling.stored_ratio > 0 else 0, asked)
        rows = list(rows)
        if settings.sampling.stored_ratio > 0 and not given:
            stored_completions.check(rows, samples, settings.prompts.source)
        tokens = _tokenize(rows, settings, tokenizer)
        lengths = np.array([len(ids) for ids in tokens])
        kept = np.arange(len(rows))
        overlong = lengths > settings.prompts.max_tokens
        if overlong.any() and settings.prompts.overlong == "refuse":
            raise _too_long(rows, lengths, settings.prompts)
        if settings.prompts.overlong == "skip":
            kept = np.flatnonzero(~overlong)
        tokens = [tokens[row][-settings.prompts.max_tokens :] for row in kept]

        self._settings = settings
        self._metadata = _metadata(settings, tokenizer)
        self._held_out, self._train = split([tuple(ids) for ids in tokens], settings.prompts, settings.run.seed)
        self._rows = pa.record_batch(
            {
                "prompt_id": pa.array(kept, pa.int64()),
                "prompt_tokens": pa.array(tokens, schema.TOKENS),
                "prompt": pa.array([rows[row].text for row in kept], pa.string()),
                "prompt_messages": pa.array([_messages(rows[row]) for row in kept], pa.string()),
                "prompt_columns": pa.array([rows[row].further for row in kept], pa.string()),
            }
        )
        self.counts: dict[str, int] = {
            "read": len(rows),
            "skipped": len(rows) - len(kept),
            "cut": int(overlong[kept].sum()),
            "duplicates": len(kept) - len(self._held_out) - len(self._train),
            "held_out": len(self._held_out),
            "train": len(self._train),
        }
        self.largest_token = max((max(ids) for ids in tokens), default=0)

    def batch(self, tickets: Sequence[int]) -> pa.RecordBatch:
        """Prompt columns of these tickets, in their order, samples_per_prompt rows each.

        Ticket t is the row at place t % n of the order of epoch t // n, n = `counts["train"]`.
        """
        assert all(ticket >= 0 for ticket in tickets), tickets
        samples = self._settings.sampling.samples_per_prompt
        count, seed = len(self._train), self._settings.run.seed
        rows = [self._train[place_of(ticket, count, seed)] for ticket in tickets]
        return self._build(
            rows=np.repeat(np.array(rows, np.int64), samples),
            tickets=np.repeat(np.array(tickets, np.int64), samples),
            samples=np.tile(np.arange(samples), len(tickets)),
            domain="train",
        )

    def held_out(self, samples: int = 1) -> pa.RecordBatch:
        """`samples` rows a held-out prompt: ticket 0..n-1, seeds unlike the training rows'."""
        count = len(self._held_out)
        held_out = self._build(
            rows=np.repeat(self._held_out, samples),
            tickets=np.repeat(np.arange(count), samples),
            samples=np.tile(np.arange(samples), count),
            domain="held_out",
        )
        return held_out.replace_schema_metadata({**self._metadata, "keel.held_out": "true"})

    def _build(self, rows: np.ndarray, tickets: np.ndarray, samples: np.ndarray, domain: str) -> pa.RecordBatch:
        taken = self._rows.take(pa.array(rows))
        seed = self._settings.run.seed
        seeds = [seed_of(domain, seed, *pair) for pair in zip(tickets.tolist(), samples.tolist(), strict=True)]
        columns: dict[str, Any] = {"ticket": tickets, "sample": samples.astype(np.int16), "seed": seeds}
        columns |= {name: taken.column(name) for name in taken.schema.names}
        return schema.build(schema.PROMPT, columns).replace_schema_metadata(self._metadata)


def _messages(row: SourceRow) -> str:
    """Messages of a conversational prompt as JSON, [] of a plain one."""
    return json.dumps([] if isinstance(row.prompt, str) else row.prompt, ensure_ascii=False)


def seed_of(domain: str, run_seed: int, ticket: int, sample: int) -> int:
    """Seed of a row; domain: train or held_out. A 63-bit hash: fits int64, the same on every machine and Python."""
    return xxhash.xxh3_64_intdigest(f"{domain}:{run_seed}:{ticket}:{sample}".encode()) >> 1


@functools.lru_cache(maxsize=8)
def _permutation(domain: int, seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of 0..count-1 from raw bits: numpy keeps the stream of PCG64, not that of Generator.permutation."""
    bits = np.random.PCG64(np.random.SeedSequence([domain, seed, epoch])).random_raw(count)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


def split(prompts: Sequence[Hashable], config: PromptSettings, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the held-out rows, of different prompts, and of the training rows, whose prompts equal none of them.

    Equality is that of the tokens, which the model sees: also prompts that only became equal by cutting.
    """
    first: dict[Hashable, int] = {}
    identity = np.array([first.setdefault(prompt, place) for place, prompt in enumerate(prompts)], np.int64)
    distinct, wanted = np.unique(identity), config.held_out
    if len(distinct) < wanted + 1:
        raise ConfigError(
            f"prompts.held_out={wanted}: {config.source} has {len(distinct)} different prompts of"
            f" at most {config.max_tokens} tokens; expected at least {wanted + 1}"
        )
    held_out = distinct[_permutation(_HELD_OUT, seed, 0, len(distinct))[:wanted]]
    return held_out, np.flatnonzero(~np.isin(identity, held_out))


def place_of(ticket: int, count: int, seed: int) -> int:
    """Which of `count` training rows a ticket is: place t % n of the order of epoch t // n."""
    return int(_permutation(_TRAINING, seed, ticket // count, count)[ticket % count])


def _metadata(settings: PromptSpec, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    vocabulary = sorted(tokenizer.get_vocab().items())
    options = settings.policy.chat_template_options
    content = json.dumps(
        [vocabulary, tokenizer.chat_template, *([options] if options else [])], sort_keys=True
    ).encode()
    return {
        "keel.schema_version": schema.SCHEMA_VERSION,
        "keel.run": settings.run.name,
        "keel.tokenizer": files.digest_of(content)[:16],
    }


def _tokenize(rows: list[SourceRow], settings: PromptSpec, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids of every prompt, a beginning-of-text token once if the tokenizer or its template has one.

    No end token, also of a tokenizer that puts one behind every text: a completion follows.
    """
    text = ModelText(tokenizer, settings.policy.chat_template_options)
    tokens: list[list[int]] = [[] for _ in rows]
    plain = [place for place, row in enumerate(rows) if isinstance(row.prompt, str)]
    conversations = [place for place, row in enumerate(rows) if not isinstance(row.prompt, str)]
    if conversations:
        require_template(rows[conversations[0]], settings, tokenizer)
    for places, rendered in ((plain, False), (conversations, True)):
        texts = [_render(rows[place], settings, text.chat) for place in places]
        for place, ids in zip(places, text.prompt_ids(texts, rendered=rendered), strict=True):
            tokens[place] = ids
    for row, ids in zip(rows, tokens, strict=True):
        if not ids:
            raise wrong(settings.prompts, f"{row.place} is an empty prompt (no tokens); expected some text")
    return tokens


def require_template(row: SourceRow, settings: PromptSpec, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ConfigError when a conversation cannot go through a chat template."""
    prompts = settings.prompts
    conversational = f"{row.place} of {prompts.source} is a list of messages"
    why = conversational if prompts.system_prompt is None else "prompts.system_prompt makes conversations"
    if settings.policy.chat_template == "never":
        raise ConfigError(f"policy.chat_template=never: {why}; expected auto, or plain prompts alone")
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"policy.model={settings.policy.model}: its tokenizer has no chat template, but {why};"
            " expected a model with one, or plain prompts alone"
        )


def _render(row: SourceRow, settings: PromptSpec, chat: ChatText) -> str:
    """The text the model reads, up to where the assistant begins to speak."""
    if isinstance(row.prompt, str):
        return row.prompt
    from jinja2 import TemplateError  # what chat templates raise, for instance "System role not supported"

    try:
        return chat.render(row.prompt)
    except TemplateError as error:
        problem = f"{row.place}: the chat template refuses it: {error}; expected other roles"
        raise wrong(settings.prompts, problem) from None


def _too_long(rows: list[SourceRow], lengths: np.ndarray, prompts: PromptSettings) -> ConfigError:
    longest, count = int(lengths.argmax()), int((lengths > prompts.max_tokens).sum())
    return ConfigError(
        f"prompts.max_tokens={prompts.max_tokens}: {count} of {len(rows)} prompts are longer,"
        f" the longest has {lengths[longest]} tokens ({rows[longest].place}); expected more, or"
        " prompts.overlong=skip or cut_left"
    )
