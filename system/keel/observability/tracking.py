"""Experiment trackers of a run: imported only where configured; a slow or failing one never holds up the run.

step, evaluation, rewind --> a bounded queue for each tracker --> its thread: make, log, ..., finish    (trackers.py)
                             full: dropped and counted            raises: counted, the first one told
"""

import asyncio
import contextlib
import functools
import importlib.util
import json
import math
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from keel import errors, files
from keel.config import loader
from keel.config.monitoring import TrackingSettings
from keel.config.run import Settings
from keel.config.stages import StageSettings
from keel.errors import ConfigError
from keel.observability.metric_table import TABLE
from keel.observability.metrics import RunMetrics
from keel.observability.trackers import TRACKERS, Outcome, TrackedRun, Tracker

QUEUE_JOBS = 256
_FULL = f"{QUEUE_JOBS} steps wait for it already"
_INTERRUPTED_SECONDS = 5.0
_LONGEST_NAME = 250  # MLflow's limit
_FOREIGN = re.compile(r"[^A-Za-z0-9_.-]")
_HIDDEN = re.compile(
    rf"{loader.SECRET}|(.*[_-])?(password|passwd|secret|credentials?|authorization|api[_-]?key|token)", re.IGNORECASE
)
_SECTIONS = {metric.name: metric.section for metric in TABLE}
Job = Callable[[Tracker], None]


def check(settings: TrackingSettings) -> None:
    """Check that the packages of all trackers are installed, without an import. Raises ConfigError."""
    for name in settings.trackers:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without origin: a folder of that name, as the libraries make them
            raise ConfigError(
                f"tracking.trackers={name}: the package {name} is not installed; expected pip install"
                f' "keel-rlhf[{name}]"'
            )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Finite numbers under one name each: `reward_component: {gold: 1}` is `reward_component.gold`.

    Names hold letters, digits, `_`, `-` and `.` only, and no more than 250 of them. A slash becomes a dot, as MLflow's
    files could not hold `a` and `a/b`; the only slash is the one behind a section. Anything else foreign becomes `_`.
    """
    numbers: dict[str, float] = {}
    for name, value in values.items():
        key = prefix + _flat_name(name)
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{key}.")
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers[key[:_LONGEST_NAME]] = float(value)
    return numbers


def configuration(settings: Settings | StageSettings) -> dict[str, Any]:
    """Resolved settings by flat name, as they may be shown elsewhere.

    Left out are the values of `headers`, of everything below a name such as `api_key` or `auth_token` (an own option
    of the user's may hold one), and passwords in URLs.
    """
    leaves = loader.leaves(settings.model_dump(mode="json"))
    return {_flat_name(path)[:_LONGEST_NAME]: _public(path, value) for path, value in leaves.items()}


def _flat_name(name: str) -> str:
    return _FOREIGN.sub("_", name.replace("/", "."))


def _public(path: str, value: Any) -> Any:
    if any(_HIDDEN.fullmatch(part) for part in path.split(".")):
        return "(not shown)"
    return errors.without_passwords(value) if isinstance(value, str) else value


class Tracking:
    """The trackers of one run, which a recorder feeds. A context: leaving it finishes them."""

    def __init__(
        self,
        settings: Settings | StageSettings,
        directory: Path,
        metrics: RunMetrics,
        note: Callable[[str], None],
        member: int | None = None,
    ) -> None:
        self.settings, self.directory = settings, directory
        self._metrics, self._note = metrics, note
        self._name = settings.run.name if member is None else f"{settings.run.name}-{member}"
        self._feeds: list[_Feed] = []
        self._told: set[str] = set()

    def begin(self, version: int) -> None:
        """Start the trackers, or rewind those that run: steps after `version` are made from here on."""
        for feed in self._feeds:
            feed.put(lambda tracker: tracker.rewind(version))
        if not self._feeds and self.settings.tracking.trackers:
            run = self._run(version)
            names = dict.fromkeys(self.settings.tracking.trackers)
            self._feeds = [_Feed(name, functools.partial(TRACKERS[name], run)) for name in names]

    def step(self, line: Mapping[str, Any]) -> None:
        """Log the line of metrics.jsonl of a step, each metric as `SECTION/NAME`."""
        values: dict[str, float] = {}
        for name, value in line.items():
            if name not in ("step", "time"):
                values |= flat({name: value}, f"{_SECTIONS[name]}/" if name in _SECTIONS else "")
        self._log(line["step"], values)

    def evaluated(self, step: int, row: Mapping[str, Any]) -> None:
        """Log results on the held-out rows, as `evaluation/NAME`."""
        self._log(step, flat({name: row[name] for name in row if name != "step"}, "evaluation/"))

    def _log(self, step: int, values: dict[str, float]) -> None:
        for feed in self._feeds:
            feed.put(lambda tracker: tracker.log(step, values))

    def report(self) -> None:
        """Count what trackers did not take since the last call, and report the first of each."""
        for feed in self._feeds:
            reasons = feed.failures()
            if reasons:
                self._metrics.add({"tracker_failures_total": {feed.name: float(len(reasons))}})
            if reasons and feed.name not in self._told:
                self._told.add(feed.name)
                event = {"event": "tracker_failed", "time": time.time(), "tracker": feed.name, "reason": reasons[0]}
                files.append_json(self.directory / "events.jsonl", event)
                self._note(f"tracker {feed.name}: {reasons[0]}; the run continues, metrics.jsonl has every number")

    def finish(self, outcome: Outcome) -> None:
        """Give all trackers together `tracking.finish_seconds`, less when interrupted, then leave them behind."""
        seconds = self.settings.tracking.finish_seconds
        deadline = time.monotonic() + (min(seconds, _INTERRUPTED_SECONDS) if outcome == "interrupted" else seconds)
        for feed in self._feeds:
            feed.close(lambda tracker: tracker.finish(outcome))
        for feed in self._feeds:
            feed.wait(deadline)
        self.report()
        self._feeds = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        broken_off = isinstance(error, KeyboardInterrupt | asyncio.CancelledError)
        self.finish("interrupted" if broken_off else "failed" if error else "finished")

    def _run(self, version: int) -> TrackedRun:
        config = self.settings.tracking
        folder = self.directory / "tensorboard"
        if config.tensorboard_directory:
            folder = Path(config.tensorboard_directory.replace("{name}", self._name))
        return TrackedRun(
            name=self._name,
            identity=_identity(self.directory / "tracking.json"),
            project=config.project,
            tags=tuple(config.tags),
            configuration=configuration(self.settings),
            version=version,
            directory=self.directory,
            tensorboard_directory=folder,
            finish_seconds=config.finish_seconds,
        )


def _identity(path: Path) -> str:
    """Read the id by which trackers know the run; drawn once for each run directory, and kept in it."""
    try:
        return str(json.loads(path.read_text(encoding="utf8"))["identity"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # not there, or not ours: a run of its own from here
        identity = secrets.token_hex(6)
        files.write_json(path, {"identity": identity})
        return identity


class _Feed:
    """One tracker on a daemon thread of its own: a slow or dead server holds neither the run nor another tracker."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name, self._make = name, make
        self._jobs: queue.Queue[Job | None] = queue.Queue(QUEUE_JOBS)
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._last: Job
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Queue a job without waiting; a full queue counts it as a failure."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._failures.put(_FULL)

    def close(self, last: Job) -> None:
        """Queue the last job without waiting; a full queue drops its oldest job for it."""
        self._last = last
        while True:
            with contextlib.suppress(queue.Full):
                self._jobs.put_nowait(None)
                return
            with contextlib.suppress(queue.Empty):  # the thread was quicker
                self._jobs.get_nowait()
                self._failures.put(_FULL)

    def wait(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._failures.put("did not finish in time")

    def failures(self) -> list[str]:
        """Reasons since the last call."""
        return [self._failures.get() for _ in range(self._failures.qsize())]

    def _work(self) -> None:
        try:
            tracker = self._make()
        except (Exception, SystemExit) as error:  # the library's, the network's: anything; counted
            self._fail("did not start", error)
            while self._jobs.get() is not None:
                self._failures.put("did not start")
            return
        while (job := self._jobs.get()) is not None:
            self._do(job, tracker)
        self._do(self._last, tracker)

    def _do(self, job: Job, tracker: Tracker) -> None:
        try:
            job(tracker)
        except (Exception, SystemExit) as error:  # as above; a thread would end without a word
            self._fail("raised", error)

    def _fail(self, what: str, error: BaseException) -> None:
        self._failures.put(errors.safe_line(f"{what}: {type(error).__name__}: {error}", limit=300))
