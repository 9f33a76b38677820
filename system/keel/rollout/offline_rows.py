"""Rows that come with their completions, from a source to the batch of any step: what offline stages train on.

source -> rows of one form -> usable rows (the others counted by reason) -> held out | training order of (seed, epoch)
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from keel import schema
from keel.config.run import LearnerSpec
from keel.config.stages import CompletionSettings
from keel.errors import ConfigError
from keel.protocols import Sampling
from keel.rollout import datasets, stored_completions
from keel.rollout.datasets import SourceRow
from keel.rollout.prompts import Prompts, require_template
from keel.rollout.stored_completions import StoredCompletions

COMPLETION = pa.schema(
    [schema.GENERATE.field(name) for name in ("completion_tokens", "completion", "finish_reason")]
    + [schema.SCORE.field("reward")]
)


class OfflineRows:
    """Batches of stored completions: prompt columns, COMPLETION, and `reward` as the source ranks them."""

    def __init__(
        self, settings: LearnerSpec, config: CompletionSettings, tokenizer: Any, stop_token_ids: tuple[int, ...]
    ) -> None:
        """Raises ConfigError, one line, for every mistake in the source."""
        self.samples = settings.sampling.samples_per_prompt
        self.rows_per_step = settings.groups_per_step
        sampling = Sampling(1.0, 1.0, config.max_tokens + 1, stop_token_ids)  # one more shows that a row is too long
        self._completions = StoredCompletions(1.0, tokenizer, sampling, settings.policy.chat_template_options)
        self.largest_token = 0
        rows = datasets.read_rows(settings.prompts, self.samples)
        stored_completions.check_shape(rows, self.samples, settings.prompts.source)
        for row in [row for row in rows if not isinstance(row.prompt, str)][:1]:
            require_template(row, settings.prompts, settings.policy, tokenizer)
        problem = self._problem(settings, config.max_tokens)
        usable, self.dropped = usable_rows(rows, config, problem, settings.prompts.source)
        self.prompts = Prompts(settings, tokenizer, usable)
        self.digest = digest_of(usable)
        counts = self.prompts.counts
        more = {"prompt_too_long": counts["skipped"], "of_held_out_prompt": counts["duplicates"]}
        self.dropped |= {reason: count for reason, count in more.items() if count}
        split = {name: counts[name] for name in ("cut", "held_out", "train")}
        self.counts = {"read": len(rows), **split, **self.dropped}

    def _problem(self, settings: LearnerSpec, max_tokens: int) -> Callable[[SourceRow], str | None]:
        from jinja2 import TemplateError  # what chat templates raise, for instance "System role not supported"

        def of(row: SourceRow) -> str | None:
            columns = json.loads(row.further)
            if stored_completions.is_bad_demonstration(columns):
                return "label_false"
            messages = [] if isinstance(row.prompt, str) else row.prompt
            try:
                rows = self._completions.encode(columns, row.text, messages)
            except TemplateError as error:
                problem = f"{row.place}: the chat template refuses it: {error}; expected other roles"
                raise datasets.wrong(settings.prompts, problem) from None
            self.largest_token = max(self.largest_token, *(max(ids, default=0) for ids in rows))
            return "too_long" if max(len(ids) for ids in rows) > max_tokens else None

        return of

    @property
    def num_training(self) -> int:
        return self.prompts.counts["train"]

    def step(self, version: int) -> pa.RecordBatch:
        """The rows of the step that starts from this version; a pure function."""
        first = version * self.rows_per_step
        return self._completed(self.prompts.batch(range(first, first + self.rows_per_step)))

    def held_out(self) -> pa.RecordBatch:
        return self._completed(self.prompts.held_out(self.samples))

    def everything(self) -> list[pa.RecordBatch]:
        """Every row once: training rows, held-out rows. Apart, because both count their tickets from 0."""
        return [self._completed(self.prompts.batch(range(self.num_training))), self.held_out()]

    def _completed(self, prompts: pa.RecordBatch) -> pa.RecordBatch:
        further = [json.loads(columns) for columns in prompts.column("prompt_columns").to_pylist()]
        rows = list(zip(further, prompts.column("sample").to_pylist(), strict=True))
        columns = {
            "completion_tokens": self._completions.tokens(prompts),
            "completion": [stored_completions.completions(row)[sample] for row, sample in rows],
            "finish_reason": schema.finish_reasons(stored_completions.finished(row)[sample] for row, sample in rows),
            "reward": np.array([stored_completions.rewards(row)[sample] for row, sample in rows], np.float32),
        }
        return schema.append(prompts, schema.build(COMPLETION, columns))


def digest_of(rows: Sequence[SourceRow]) -> str:
    """xxh3-128 of what rows say: a resumed offline run needs the rows it began with."""
    hasher = xxhash.xxh3_128()
    for row in rows:
        hasher.update(json.dumps([row.prompt, row.further], ensure_ascii=False).encode())
    return hasher.hexdigest()


def usable_rows(
    rows: Sequence[SourceRow], config: CompletionSettings, further: Callable[[SourceRow], str | None], source: str
) -> tuple[list[SourceRow], dict[str, int]]:
    """Rows to train on, and how many were left out by reason: empty, equal, or what `further` says of it.

    Raises ConfigError: for the first unusable row where `completions.unusable` refuses, or when none is left.
    """
    usable: list[SourceRow] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        problem = stored_completions.unusable(json.loads(row.further)) or further(row)
        if problem and config.unusable == "refuse":
            raise ConfigError(
                f"prompts.source={source}: {row.place} is not usable ({problem}); expected another row, or"
                " completions.unusable=drop"
            )
        if problem:
            dropped[problem] += 1
        else:
            usable.append(row)
    if not usable:
        raise ConfigError(f"prompts.source={source}: no usable row ({dict(dropped)}); expected at least one")
    return usable, dict(dropped)
