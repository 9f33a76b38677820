"""Checks of a run's texts before it starts: end tokens, options of the chat template, token ids within the model."""

import re
from pathlib import Path
from typing import Any

from keel.algorithms.reward_shaping import reference_scores
from keel.config.base import Section
from keel.errors import ConfigError
from keel.learner import end_tokens, model_files
from keel.learner.end_tokens import EndTokens
from keel.learner.model_text import ModelText
from keel.rollout.prompts import Prompts
from keel.rollout.stored_completions import StoredCompletions


def check_text(
    policy: Path, settings: Section, tokenizer: Any, stop: list[int] | None, named: str = "policy.model"
) -> EndTokens:
    """Decide the end tokens, and check that the chat template reads all configured options. Raises ConfigError."""
    options = settings.policy.chat_template_options  # type: ignore[attr-defined]
    check_template_options(options, tokenizer, "policy.chat_template_options")
    vocabulary = model_files.vocabulary(policy, f"{named}={policy}")
    return end_tokens.decide(policy, ModelText(tokenizer, options), vocabulary, stop, named)


def check_template_options(options: dict[str, Any], tokenizer: Any, setting: str) -> None:
    """Refuse an option that the chat template does not read: it would change nothing. Raises ConfigError."""
    template = tokenizer.chat_template
    text = "".join(template.values()) if isinstance(template, dict) else template or ""
    for name in options:
        if not re.search(rf"\b{re.escape(name)}\b", text):
            why = "does not read it" if text else "is not there"
            raise ConfigError(f"{setting}.{name}: the chat template {why}; expected an option of the template")


def check_token_ids(policy: Path, largest: int, settings: Section, named: str = "policy.model") -> None:
    """Refuse prompts or completions with tokens beyond the model's vocabulary. Raises ConfigError."""
    vocabulary = model_files.vocabulary(policy, f"{named}={policy}")
    if largest >= vocabulary:
        source = settings.prompts.source  # type: ignore[attr-defined]
        raise ConfigError(
            f"{named}={policy}: its tokenizer makes token {largest} of a text of {source}, beyond the model's"
            f" vocabulary of {vocabulary}; expected the model's own tokenizer, or other texts"
        )


def check_stored(completions: StoredCompletions | None, prompts: Prompts, policy: Path, settings: Section) -> None:
    """Refuse stored completions with tokens beyond the model's vocabulary. Raises ConfigError."""
    if completions is None:
        return
    largest = max(completions.text.tokenizer.get_vocab().values())
    if largest >= model_files.vocabulary(policy, f"policy.model={policy}"):  # else no text can hold one
        rows = completions.tokens(prompts.batch(range(prompts.counts["train"])))
        check_token_ids(policy, max(max(ids, default=0) for ids in rows), settings)


def check_reference_scores(column: str | None, prompts: Prompts) -> None:
    """Refuse prompts without the scores that shaping centers by. Raises ConfigError."""
    if column is not None:
        reference_scores(prompts.rows.column("prompt_columns").to_pylist(), column)
