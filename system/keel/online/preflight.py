"""Checks a run before Ray starts and before anything is written; prepares what the run is built from."""

import os
import shutil
from collections.abc import Callable, Sequence
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
from keel.config.commands import COMMANDS, AnySettings, command_of
from keel.config.label import LabelSettings
from keel.config.rewards import RewardSettings, needs_relevance
from keel.config.run import LearnerSpec, Settings
from keel.config.stages import SamplingSpec, ScoringSpec
from keel.config.workers import ClusterSettings
from keel.errors import ConfigError
from keel.learner import loading, reward_models, score_contract
from keel.observability import endpoint, tracking
from keel.online import text_checks
from keel.online.models import Models, resolve, with_learner_models
from keel.protocols import Sampling
from keel.rollout import http_rewards, scorers
from keel.rollout.prompts import Prompts
from keel.rollout.reward_functions import Calls, EventLoop, Late, Outcome, WrongAnswer
from keel.rollout.stored_completions import StoredCompletions
from keel.text import one_line, printable


@dataclass(frozen=True)
class Prepared:
    """A checked run: what its actors and its controller are built from."""

    settings: Settings
    directory: Path
    models: Models
    prompts: Prompts
    notes: tuple[str, ...] = ()
    """Lines that the run prints at its start."""

    @property
    def sampling(self) -> Sampling:
        return self.models.sampling(self.settings.sampling)

    def given(self) -> StoredCompletions | None:
        """Completions that come with the prompts, where the run trains on any."""
        ratio = self.settings.sampling.stored_ratio
        options = self.settings.policy.chat_template_options
        return StoredCompletions(ratio, self.models.tokenizer, self.sampling, options) if ratio > 0 else None


def prepare(settings: Settings) -> Prepared:
    """Check models, prompts, rewards, port, memory and run directory. Raises ConfigError, one line."""
    directory = check_place(settings)
    check_reward_sources(settings.rewards)
    registry.build(settings)  # imports what the configuration names, and refuses what is not there
    models = resolve(settings)
    prompts = check_prompts(settings, models)
    text_checks.check_reference_scores(settings.shaping.reference_scores, prompts)
    models = with_learner_models(models, settings)
    notes = models.notes
    if late := settings.buffer.max_staleness:
        notes += (f"buffer.max_staleness={late}: late tokens are not held to parity.max_step_gap_nats",)
    if (held_out := settings.prompts.held_out) < settings.guard.min_rows:
        few = f"fewer than guard.min_rows={settings.guard.min_rows}, so its detectors that read evaluations say nothing"
        notes += (f"prompts.held_out={held_out}: {few}",)
    prepared = Prepared(settings, directory, models, prompts, notes)
    text_checks.check_stored(prepared.given(), prompts, Path(models.policy), settings)
    return prepared


def check_place(settings: AnySettings) -> Path:
    """Check run directory, metrics port, trackers and memory; returns the run directory. Raises ConfigError."""
    directory = Path(settings.run_directory).resolve()
    check_directory(directory, settings)
    if not isinstance(settings, LabelSettings):
        endpoint.check(settings.metrics)
        tracking.check(settings.tracking)
    check_memory(settings.cluster)
    return directory


def check_prompts(settings: Settings | SamplingSpec, models: Models, setting: str = "policy.model") -> Prompts:
    """Read and tokenize the prompts, and call every reward function on two of them. Raises ConfigError."""
    prompts = Prompts(settings, models.tokenizer)
    text_checks.check_token_ids(Path(models.policy), prompts.largest_token, settings, setting)
    check_rewards(settings, prompts.batch([0, 1]))
    if settings.evaluation_prompts is not None:  # whose rows may lack a column that a reward reads
        check_rewards(settings, prompts.held_out())
    return prompts


def check_directory(directory: Path, settings: Section) -> None:
    """Refuse a run directory that cannot be written to or holds another run. Raises ConfigError."""
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
    before = loader.load_as(type(settings), stored)
    if isinstance(settings, Settings) and isinstance(before, Settings):
        check_length(directory, settings, before)
    if loader.digest(before) != loader.digest(settings):
        changed = loader.difference(yaml.safe_load(stored.read_text()), settings)
        raise ConfigError(
            f"run.directory={directory}: holds a run with other settings ({changed}); expected another run.name"
        )


def check_length(directory: Path, settings: Settings, before: Settings) -> None:
    """Refuse another `run.steps` than before where it would change steps made, or make none. Raises ConfigError."""
    steps, earlier = settings.run.steps, before.run.steps
    if steps != earlier and before.learners.rate_depends_on_steps:
        raise ConfigError(
            f"run.steps={steps}: learners.schedule={before.learners.schedule} falls to 0 at run.steps, which is"
            f" {earlier} in {directory}; expected run.steps={earlier}, or another run.name"
        )
    trained = max(checkpoint.steps(directory), default=0)
    if steps < trained:
        raise ConfigError(f"run.steps={steps}: {directory} has trained {trained} steps; expected at least {trained}")
    longer = trained > 0 and steps > trained and steps != earlier
    if longer and checkpoint.state_of(directory, trained).get("finished", False):
        raise ConfigError(
            f"run.steps={steps}: {directory} was ended for good after step {trained}, by its guard or its objective;"
            f" expected run.steps={earlier}, or another run.name"
        )


def check_memory(cluster: ClusterSettings) -> None:
    """Check free memory, shared memory for an embedded Ray's object store, and the form of a cluster's address."""
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


def check_reward_sources(rewards: Sequence[RewardSettings]) -> None:
    """Check the code, the models and the servers that the rewards of a run name. Raises ConfigError."""
    for reward in rewards:
        check_reward_source(reward, f"rewards.{reward.name}.source")


def check_reward_source(reward: RewardSettings, setting: str) -> None:
    """Check that a reward's code, its model or the headers for its server exist. Raises ConfigError.

    Variables of headers must be set both where keel starts and in the environment of every scorer; an embedded Ray
    passes them on.
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
    """Call every reward function once, on two real prompts, and require one number for each completion."""
    text = "Yes, of course. I am glad to help you."
    names = [name for name in schema.PROMPT.names if name in prompts.schema.names]
    sample = schema.concat([prompts.slice(0, 2).select(names)])
    columns: dict[str, list[Any]] = {"completion": [text], "completion_tokens": [[1, 2, 3]]}
    if settings.reference:
        columns |= {"reference_logprobs": [[-1.0, -2.0, -3.0]]}
        columns |= {"relevance_nats": [0.5]} if needs_relevance(settings.rewards) else {}
    columns = {name: values * sample.num_rows for name, values in columns.items()}
    probe = schema.append(sample, pa.RecordBatch.from_pydict(columns))
    rules = {reward.name: reward for reward in settings.rewards if reward.kind == "rule"}
    functions = {name: _with_probe(reward, probe) for name, reward in rules.items()}
    loop = EventLoop()
    try:
        seconds = settings.deadlines.score_seconds
        outcomes = Calls(functions, lambda: scorers.arguments(probe), loop, seconds, strict=True).finish()
    finally:
        loop.close()
    for name, outcome in outcomes.items():
        if problem := _wrong(outcome, probe.num_rows, settings.deadlines.score_seconds):
            raise ConfigError(f"rewards.{name}.source={rules[name].source}: {problem}")


def _with_probe(reward: RewardSettings, probe: pa.RecordBatch) -> Callable[..., Any]:
    """The function with the sample's measurements by the reference. Raises ConfigError for one that nothing makes."""
    function = scorers.load_function(reward)
    missing = [name for name in scorers.measured_by_reference(function) if name not in probe.schema.names]
    if missing:
        setting = f"rewards.{reward.name}.source={reward.source}: reads {missing[0]}, which this run does not compute"
        monitor = "a monitor of kind reference with source: relevance"
        expected = "a reference block" if missing[0] in schema.REFERENCE.names else monitor
        raise ConfigError(f"{setting}; expected {expected}")
    return scorers.with_measurements(function, probe)


def _wrong(outcome: Outcome, rows: int, seconds: float) -> str | None:
    """Describe the mistake of a reward function on a sample; None if there is none."""
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
