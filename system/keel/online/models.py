"""Models of a run: located and checked, with the tokens that end its texts. Online training and every stage start here.

In: settings of a run or a stage. Out: folders of policy, reference, critic and teacher, tokenizer, end tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keel.config.prompts import SamplingSettings
from keel.config.run import LearnerSpec, Settings
from keel.config.stages import SamplingSpec
from keel.errors import ConfigError
from keel.learner import activation_checkpointing, forward_contract, loading, model_files
from keel.learner.end_tokens import EndTokens
from keel.online import text_checks
from keel.protocols import Sampling
from keel.rollout.generator import check_engine

_SETTINGS = {
    "reference": "reference.model",
    "teacher": "objective.dense.teacher",
    "critic": "objective.critic.model",
}
"""The setting that names each model beside the policy."""


@dataclass(frozen=True)
class Models:
    """The checked models of a run."""

    policy: str
    """Folder of the policy."""
    tokenizer: Any
    end_tokens: EndTokens
    frozen: Mapping[str, str]
    """Folders of the models beside the policy by role: reference, teacher, critic (which is trained from there)."""
    notes: tuple[str, ...]
    """Lines that the run prints at its start: its end tokens, and models that take one row a sequence."""

    @property
    def reference(self) -> str | None:
        return self.frozen.get("reference")

    def sampling(self, settings: SamplingSettings) -> Sampling:
        """Build the sampling parameters, with the end tokens of these models."""
        return Sampling(settings.temperature, settings.top_p, settings.max_tokens, self.end_tokens.stop)


def resolve(settings: LearnerSpec | SamplingSpec, model: str | None = None, setting: str = "policy.model") -> Models:
    """Locate and check the policy, or the `model` of another setting, without the models beside it.

    Raises ConfigError, one line, as every check here.
    """
    if generators := getattr(settings, "generators", None):
        check_engine(generators)
    folder = loading.locate_policy(model or settings.policy.model, setting)
    check_context(folder, settings)
    tokenizer = loading.load_tokenizer(folder, setting)
    ends = text_checks.check_text(folder, settings, tokenizer, settings.sampling.stop_token_ids, setting)
    return Models(str(folder), tokenizer, ends, {}, ends.notes)


def with_learner_models(models: Models, settings: LearnerSpec) -> Models:
    """Locate and check what a learner reads beside the policy; all of them are held to the forward contract."""
    policy, reference = Path(models.policy), None
    if settings.reference:
        name = settings.reference.model
        reference = str(loading.locate_policy(name, "reference.model")) if name else models.policy
    frozen = learner_folders(settings, policy, reference)
    for setting, folder in (("policy.model", policy), ("objective.critic.model", frozen.get("critic"))):
        if folder is not None:
            wanted = settings.learners.activation_checkpointing
            activation_checkpointing.check_supported(Path(folder), setting, wanted)
    named = {"policy.model": models.policy, **{_SETTINGS[role]: folder for role, folder in frozen.items()}}
    notes = forward_contract.require(named, settings.max_model_tokens)
    return replace(models, frozen=frozen, notes=(*models.notes, *notes))


def with_reference(models: Models, settings: Settings | SamplingSpec) -> Models:
    """Locate and check the reference that scores completions, where there is one."""
    if settings.reference is None:
        return models
    reference, notes = resolve_reference(settings.reference.model or settings.policy.model, settings.max_model_tokens)
    check_vocabulary(Path(models.policy), Path(reference), "reference.model")
    return replace(models, frozen={"reference": reference}, notes=(*models.notes, *notes))


def resolve_reference(model: str, longest_row: int) -> tuple[str, list[str]]:
    """Locate a reference model and hold it to the forward contract; its folder and notes for the user."""
    folder = str(loading.locate_policy(model, "reference.model"))
    return folder, forward_contract.require({"reference.model": folder}, longest_row)


def learner_folders(settings: LearnerSpec, policy: Path, reference: str | None) -> dict[str, str]:
    """Locate the models that an objective reads beside the policy. Raises ConfigError."""
    objective = settings.objective
    named = {
        "objective.critic.model": ("critic", getattr(getattr(objective, "critic", None), "model", None)),
        "objective.dense.teacher": ("teacher", getattr(getattr(objective, "dense", None), "teacher", None)),
    }
    locate = {"critic": loading.locate, "teacher": loading.locate_policy}  # a critic may start from a reward model
    folders = {name: str(locate[name](model, setting)) for setting, (name, model) in named.items() if model}
    if "critic" in folders:
        critic, value = Path(folders["critic"]), f"objective.critic.model={folders['critic']}"
        if not (critic / "config.json").is_file():
            raise ConfigError(f"{value}: is an ensemble; expected one of its members")
        model_files.check_text_alone(critic, value)
        model_files.check_whole(critic, value)
    folders |= {"reference": reference} if reference else {}
    for name, folder in folders.items():  # all of them read the policy's tokens
        expected, other = _vocabulary(policy), _vocabulary(Path(folder))
        if other != expected:
            raise ConfigError(
                f"{_SETTINGS[name]}={folder}: {other} tokens in its vocabulary; expected policy.model's {expected}"
            )
    return folders


def check_vocabulary(policy: Path, other: Path, setting: str) -> None:
    """Refuse a model that reads other tokens than the policy. Raises ConfigError."""
    expected, size = _vocabulary(policy), _vocabulary(other)
    if size != expected:
        raise ConfigError(f"{setting}={other}: {size} tokens in its vocabulary; expected {expected}, as {policy} has")


def _vocabulary(folder: Path) -> int:
    return model_files.vocabulary(folder, str(folder))


def check_context(policy: Path, settings: LearnerSpec | SamplingSpec) -> None:
    """Refuse a model with fewer positions than a prompt and its completion take. Raises ConfigError."""
    text_config = model_files.model_config(policy, f"policy.model={policy}").get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    needed = settings.max_model_tokens + (settings.sampling.stored_ratio > 0)  # reading a completion takes one more
    if positions is not None and needed > positions:
        raise ConfigError(
            f"prompts.max_tokens + sampling.max_tokens={needed}: the model has {positions}"
            " positions; expected at most that many"
        )
