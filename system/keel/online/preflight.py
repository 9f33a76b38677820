"""Checks a run before Ray starts and before anything is written; prepares what the run is built from."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import yaml

from keel import checkpoint, schema, user_code
from keel.algorithms import registry
from keel.config import loader
from keel.config.base import Section
from keel.config.commands import COMMANDS, command_of
from keel.config.rewards import RewardSettings
from keel.config.run import LearnerSpec, Settings
from keel.config.stages import SamplingSpec, ScoringSpec
from keel.config.workers import ClusterSettings
from keel.errors import ConfigError
from keel.learner import forward_contract, loading, model_files, reward_models, score_contract
from keel.observability import endpoint, tracking
from keel.online import text_checks
from keel.protocols import Sampling
from keel.rollout import http_rewards, scorers
from keel.rollout.prompts import Prompts
from keel.rollout.reward_functions import Calls, EventLoop, Late, Outcome, WrongAnswer
from keel.rollout.stored_completions import StoredCompletions
from keel.text import one_line, printable

_SETTINGS = {
    "reference": "reference.model",
    "teacher": "objective.dense.teacher",
    "critic": "objective.critic.model",
}
"""The setting that names each model beside the policy."""


@dataclass(frozen=True)
class Prepared:
    """A checked run: what the actors and the controller are built from."""

    settings: Settings
    directory: Path
    policy_folder: str
    reference_folder: str | None
    tokenizer: Any
    prompts: Prompts
    sampling: Sampling
    learner_folders: dict[str, str]
    """Models beside the policy inside the learner: reference, teacher, critic."""
    notes: tuple[str, ...] = ()
    """Lines that the user should read before the run starts."""

    def given(self) -> StoredCompletions | None:
        """Completions that come with the prompts, where the run trains on any."""
        ratio = self.settings.sampling.stored_ratio
        options = self.settings.policy.chat_template_options
        return StoredCompletions(ratio, self.tokenizer, self.sampling, options) if ratio > 0 else None


def prepare(settings: Settings) -> Prepared:
    """Check models, prompts, rewards, port, memory and run directory. Raises ConfigError, one line."""
    directory = Path(settings.run_directory).resolve()
    check_directory(directory, settings)
    endpoint.check(settings.metrics)
    tracking.check(settings.tracking)
    check_memory(settings.cluster)
    for reward in settings.rewards:
        check_reward_source(reward, f"rewards.{reward.name}.source")
    registry.build(settings)  # imports what the configuration names, and refuses what is not there
    policy = loading.locate_policy(settings.policy.model, "policy.model")
    check_context(policy, settings)
    tokenizer = loading.load_tokenizer(policy, "policy.model")
    ends = text_checks.check_text(policy, settings, tokenizer, settings.sampling.stop_token_ids)
    prompts = Prompts(settings, tokenizer)
    text_checks.check_token_ids(policy, prompts.largest_token, settings)
    check_rewards(settings, prompts.batch([0, 1]))
    reference = None
    if settings.reference:
        name = settings.reference.model
        reference = str(loading.locate_policy(name, "reference.model") if name else policy)
    sampling = Sampling(
        temperature=settings.sampling.temperature,
        top_p=settings.sampling.top_p,
        max_tokens=settings.sampling.max_tokens,
        stop_token_ids=ends.stop,
    )
    folders = learner_folders(settings, policy, reference)
    notes = [*ends.notes, *check_passes(settings, policy, folders)]
    if late := settings.buffer.max_staleness:
        notes.append(f"buffer.max_staleness={late}: late tokens are not held to parity.max_step_gap_nats")
    place = (settings, directory, str(policy), reference, tokenizer, prompts, sampling, folders)
    prepared = Prepared(*place, tuple(notes))
    text_checks.check_stored(prepared.given(), prompts, policy, settings)
    return prepared


def check_passes(settings: LearnerSpec, policy: Path, folders: Mapping[str, str]) -> list[str]:
    """Hold policy and the models beside it to the forward contract; what to tell of them. Raises ConfigError."""
    named = {"policy.model": str(policy), **{_SETTINGS[name]: folder for name, folder in folders.items()}}
    return forward_contract.require(named, settings.max_model_tokens)


def learner_folders(settings: LearnerSpec, policy: Path, reference: str | None) -> dict[str, str]:
    """Folders of the models an objective reads beside the policy. Raises ConfigError for one that is not there."""
    objective = settings.objective
    named = {
        "objective.critic.model": ("critic", getattr(getattr(objective, "critic", None), "model", None)),
        "objective.dense.teacher": ("teacher", getattr(getattr(objective, "dense", None), "teacher", None)),
    }
    locate = {"critic": loading.locate, "teacher": loading.locate_policy}  # a critic may start from a reward model
    folders = {name: str(locate[name](model, setting)) for setting, (name, model) in named.items() if model}
    if "critic" in folders and not (Path(folders["critic"]) / "config.json").is_file():
        raise ConfigError(f"objective.critic.model={folders['critic']}: is an ensemble; expected one of its members")
    if "critic" in folders:
        critic, value = Path(folders["critic"]), f"objective.critic.model={folders['critic']}"
        model_files.check_text_alone(critic, value)
        model_files.check_whole(critic, value)
    folders |= {"reference": reference} if reference else {}
    for name, folder in folders.items():  # all of them read the policy's tokens
        expected, tokens = _vocabulary(policy), _vocabulary(Path(folder))
        if tokens != expected:
            raise ConfigError(
                f"{_SETTINGS[name]}={folder}: {tokens} tokens in its vocabulary; expected policy.model's {expected}"
            )
    return folders


def check_vocabulary(model: Path, other: Path, setting: str) -> None:
    """Two models read the same tokens. Raises ConfigError."""
    ours, theirs = _vocabulary(model), _vocabulary(other)
    if ours != theirs:
        raise ConfigError(f"{setting}={other}: {theirs} tokens in its vocabulary; expected {ours}, as {model} has")


def _vocabulary(folder: Path) -> int:
    return model_files.vocabulary(folder, str(folder))


def check_directory(directory: Path, settings: Section) -> None:
    """The run directory is new, or holds a run of the same settings, which then continues."""
    stored = directory / "config.yaml"
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"run.directory={directory}: not a directory")
    parent = next(folder for folder in (directory, *directory.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"run.directory={directory}: {parent} is no folder that can be written to; expected one")
    checkpoint.check_known(directory)
    if not stored.exists():
        return
    loader.stored_config(directory, f"run.directory={directory}")
    if not isinstance(settings, COMMANDS[command := command_of(loader.read(stored))]):
        raise ConfigError(f"run.directory={directory}: holds a run of keel {command}; expected another run.name")
    other = loader.digest(loader.load_as(type(settings), stored))
    if other != loader.digest(settings):
        changed = loader.difference(yaml.safe_load(stored.read_text()), settings)
        raise ConfigError(
            f"run.directory={directory}: holds a run with other settings ({changed}); expected another run.name"
        )


def check_memory(cluster: ClusterSettings) -> None:
    """Free memory, and shared memory for the embedded Ray's object store; a cluster to join is named as Ray does."""
    scheme, separator, _ = (address := cluster.address_to_join or "").partition("://")
    if separator:
        what = "where jobs are submitted (keel submit --address)" if "http" in scheme else "no address of a cluster"
        raise ConfigError(
            f"cluster.address or RAY_ADDRESS={address}: is {what}; expected HOST:PORT of the cluster itself, or local"
            " for an embedded Ray"
        )
    available = psutil.virtual_memory().available
    if available < cluster.min_memory_bytes:
        raise ConfigError(
            f"cluster.min_memory_bytes={cluster.min_memory_bytes}: {available} bytes of memory are free;"
            " expected at least that many"
        )
    if cluster.address_to_join is None and Path("/dev/shm").exists():
        shared = shutil.disk_usage("/dev/shm").free
        if shared < cluster.object_store_bytes:
            raise ConfigError(
                f"cluster.object_store_bytes={cluster.object_store_bytes}: /dev/shm has {shared} bytes free;"
                " expected at least that many (in Docker: --shm-size)"
            )


def check_context(policy: Path, settings: LearnerSpec | SamplingSpec) -> None:
    """Prompt and completion fit the model's positions."""
    known = model_files.model_config(policy, f"policy.model={policy}").get_text_config()
    positions = getattr(known, "max_position_embeddings", None)
    needed = settings.max_model_tokens + (settings.sampling.stored_ratio > 0)  # reading a completion takes one more
    if positions is not None and needed > positions:
        raise ConfigError(
            f"prompts.max_tokens + sampling.max_tokens={needed}: the model has {positions}"
            " positions; expected at most that many"
        )


def check_reward_source(reward: RewardSettings, setting: str) -> None:
    """Code, model, or what is needed to ask a server, are there. Raises ConfigError.

    Variables of headers must be set here, where keel is started, and in the environment of every scorer: an embedded
    Ray hands its own on.
    """
    if reward.kind == "rule":
        user_code.import_symbol(reward.source, setting)
    if reward.kind == "model":
        for member in reward_models.members(loading.locate(reward.source, setting), setting):
            reward_models.check_readable(member, setting)
            score_contract.check_scores(member, setting)
            tokenizer, where = loading.load_tokenizer(member, setting), f"rewards.{reward.name}.chat_template_options"
            text_checks.check_template_options(reward.chat_template_options, tokenizer, where)
    if reward.kind == "http":
        http_rewards.check(reward, setting)


def check_rewards(settings: LearnerSpec | ScoringSpec, prompts: pa.RecordBatch) -> None:
    """Call every reward function once, on two real prompts, to see that it answers one number for each."""
    text = "Yes, of course. I am glad to help you."
    names = [name for name in schema.PROMPT.names if name in prompts.schema.names]
    sample = schema.concat([prompts.slice(0, 2).select(names)])
    columns = {"completion": [text] * sample.num_rows, "completion_tokens": [[1, 2, 3]] * sample.num_rows}
    probe = schema.append(sample, pa.RecordBatch.from_pydict(columns))
    rules = {reward.name: reward for reward in settings.rewards if reward.kind == "rule"}
    functions = {name: scorers.load_function(reward) for name, reward in rules.items()}
    loop = EventLoop()
    try:
        seconds = settings.deadlines.score_seconds
        outcomes = Calls(functions, lambda: scorers.arguments(probe), loop, seconds, strict=True).finish()
    finally:
        loop.close()
    for name, outcome in outcomes.items():
        if problem := _wrong(outcome, probe.num_rows, settings.deadlines.score_seconds):
            raise ConfigError(f"rewards.{name}.source={rules[name].source}: {problem}")


def _wrong(outcome: Outcome, rows: int, seconds: float) -> str | None:
    """What is wrong with what a reward function did on a sample; None: nothing."""
    if isinstance(outcome, WrongAnswer):
        return f"returned {outcome}"
    if isinstance(outcome, Late):
        return f"had not ended after {seconds:g} s on a sample; expected an answer within deadlines.score_seconds"
    if isinstance(outcome, Exception | SystemExit):
        reason = printable(one_line(outcome), 200)
        name = printable(type(outcome).__name__, 60)
        return (
            f"raised {name} ({reason}) on a sample; expected"
            " function(prompts, completions, completion_ids, **columns) -> list of numbers"
        )
    if len(outcome) != rows:
        return f"returned {len(outcome)} values for {rows} completions; expected one for each"
    return None
