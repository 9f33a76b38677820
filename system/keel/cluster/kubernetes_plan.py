"""Divides a run into pods: arithmetic on counts, threads, GPUs and memory, and what Kubernetes would refuse.

workers of a role --per_pod--> pods of a group, from as many as are configured to as many as the run may grow to
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, Self

from keel import __version__
from keel.cluster import capacity
from keel.config.run import Settings
from keel.config.workers import GeneratorSettings, WorkerSettings
from keel.errors import ConfigError

MOUNT = "/mnt/keel"
FOR_A_CLUSTER = ("cluster.address=auto", "cluster.wait_for_nodes=true", "metrics.host=0.0.0.0")
"""Settings of every run on Kubernetes: the Ray of its own pod, which grows, and a page that Prometheus reaches."""
MEMORY = {"head": "8Gi", "generators": "8Gi", "reference": "4Gi", "scorers": "4Gi", "learners": "16Gi"}
"""Memory of the head pod and of one worker of a role, shared memory not included: for models of about 0.5 B."""
RAY_PORTS = {"metrics": 8080, "as-metrics": 44217, "dash-metrics": 44227}
"""Metrics ports of Ray (every pod), its autoscaler and its dashboard (head); KubeRay takes `metrics` for Ray's own."""
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265}
"""Before it merged both, KubeRay left its own ports out of the head's service where the container names any; the
operator finds the dashboard, through which it follows a job, by this name."""
_TAKEN_PORTS = {*RAY_PORTS.values(), *HEAD_PORTS.values(), 10001}
_LONGEST_NAME = 47  # KubeRay's own limit: it appends to the name of a RayJob
_UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_BESIDE_STORE_BYTES = 2**30  # of /dev/shm: NCCL and torch put theirs beside the object store


@dataclass(frozen=True)
class Options:
    """Options of a cluster beyond the run's settings. Mappings are by role, as the configuration names it."""

    kind: Literal["job", "cluster"] = "job"
    image: str | None = None
    namespace: str | None = None
    storage: str = "keel"
    storage_size: str | None = None
    memory: Mapping[str, str] = field(default_factory=dict)
    per_pod: Mapping[str, int] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)
    retries: int = 3
    deadline_seconds: int | None = None
    secret: str | None = None
    monitor: bool = True


@dataclass(frozen=True)
class PodGroup:
    """Pods of one role, and what each of them asks for."""

    role: str
    pods: int
    largest_pods: int
    pod_cpus: int
    pod_gpus: int
    """Whole GPUs: a worker's share is always of one."""
    pod_bytes: int
    """Memory, shared memory not included."""
    pod_resources: Mapping[str, int]
    """Custom Ray resources, rounded up: Ray's autoscaler reads whole numbers only."""


@dataclass(frozen=True)
class PodPlan:
    """A run that fits Kubernetes: settings, options, and the groups they make."""

    settings: Settings
    options: Options
    groups: tuple[PodGroup, ...]
    head_bytes: int
    """Memory of the head pod, shared memory not included."""

    @classmethod
    def of(cls, settings: Settings, options: Options) -> Self:
        """Divide a run into pods. Raises ConfigError for what Kubernetes, KubeRay or Ray would refuse."""
        _check(settings, options)
        groups = tuple(_group(role, workers, settings, options) for role, workers in _roles(settings, options).items())
        head = size_bytes("--memory head", options.memory.get("head", MEMORY["head"]))
        return cls(settings, options, groups, head)

    @property
    def name(self) -> str:
        return self.settings.run.name

    @property
    def image(self) -> str:
        """One image for all pods: Ray needs the same Python and Ray on every node."""
        built_for = "gpu" if any(group.pod_gpus for group in self.groups) else "cpu"
        return self.options.image or f"keel:{__version__}-{built_for}"

    @property
    def shared_bytes(self) -> int:
        """Size of /dev/shm, which counts as memory of its pod."""
        return self.settings.cluster.object_store_bytes + _BESIDE_STORE_BYTES


def size_bytes(setting: str, text: str) -> int:
    """Bytes of a Kubernetes quantity such as 16Gi. Raises ConfigError."""
    if not (match := re.fullmatch(r"([1-9][0-9]{0,5})(Mi|Gi|Ti)", text)):
        raise ConfigError(f"{setting}={text}: expected a size such as 512Mi, 16Gi or 1Ti")
    return int(match[1]) * _UNITS[match[2]]


def quantity(size: int) -> str:
    """Bytes as a Kubernetes quantity, rounded up to whole Mi."""
    return f"{-(-size // 2**20)}Mi"


def _sharers(gpus: float) -> int:
    """The number of workers that share one GPU."""
    return int(1 / gpus + 1e-9)


def _check(settings: Settings, options: Options) -> None:
    run = settings.run.name
    if not (re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", run) and len(run) <= _LONGEST_NAME):
        raise ConfigError(
            f"run.name={run}: no name for Kubernetes; expected a lowercase letter, then lowercase letters, digits and"
            f" '-', at most {_LONGEST_NAME} in all"
        )
    named = {"--namespace": options.namespace, "--storage": options.storage, "--secret": options.secret}
    for setting, name in named.items():
        if name is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
            raise ConfigError(f"{setting}={name}: no name for Kubernetes; expected lowercase letters, digits and '-'")
    if options.image is not None and not re.fullmatch(r"[\w./:@-]+", options.image, re.ASCII):
        raise ConfigError(f"--image={options.image}: expected the name of a container image")
    if options.storage_size is not None:
        size_bytes("--storage-size", options.storage_size)
    directory = PurePosixPath(settings.run_directory)
    if not directory.is_relative_to(MOUNT) or directory == PurePosixPath(MOUNT) or ".." in directory.parts:
        raise ConfigError(
            f"run.directory={settings.run.directory}: every pod must see it, and a retried job find it again;"
            f" expected a path below {MOUNT}, for instance run.directory={MOUNT}/runs/{{name}}"
        )
    port = settings.metrics.port
    if not 1024 <= port <= 65535 or port in _TAKEN_PORTS:
        taken = ", ".join(map(str, sorted(_TAKEN_PORTS)))
        raise ConfigError(f"metrics.port={port}: expected 1024 to 65535, and none of Ray's own ({taken})")


def _roles(settings: Settings, options: Options) -> dict[str, WorkerSettings]:
    """Blocks of the roles that the run has. Raises ConfigError for options of others."""
    roles = {capacity.BLOCKS[role]: workers for role, workers in capacity.workers(settings).items()}
    for flag, given, known in (
        ("--memory ", options.memory, ["head", *roles]),
        ("--per-pod ", options.per_pod, list(roles)),
        ("--max-", options.largest, list(roles)),
    ):
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"{flag}{unknown[0]}: the run has none; expected one of {', '.join(known)}")
    if any(workers.gpus for workers in roles.values()) and not settings.generators.gpus:
        raise ConfigError("generators.gpus=0: other roles have GPUs, and an image holds one build of vLLM; expected 1")
    return roles


def _group(role: str, workers: WorkerSettings, settings: Settings, options: Options) -> PodGroup:
    per_pod = options.per_pod.get(role, min(workers.count, _sharers(workers.gpus)) if 0 < workers.gpus < 1 else 1)
    if per_pod < 1:
        raise ConfigError(f"--per-pod {role}={per_pod}: expected at least 1")
    largest = options.largest.get(role, 2 * workers.count)
    if largest < workers.count:
        raise ConfigError(f"--max-{role}={largest}: {role}.count={workers.count}; expected at least that")
    memory = size_bytes(f"--memory {role}", options.memory.get(role, MEMORY[role]))
    if role == "generators" and not workers.gpus and role not in options.memory:
        memory += settings.generators.kv_cache_bytes
    for name in workers.resources:
        if not re.fullmatch(r"[\w.:/-]+", name, re.ASCII):  # it goes through a shell
            raise ConfigError(f"{role}.resources.{name}: expected letters, digits and ._:/-")
    gpus = workers.gpus * (workers.tensor_parallel if isinstance(workers, GeneratorSettings) else 1)
    return PodGroup(
        role,
        pods=-(-workers.count // per_pod),
        largest_pods=-(-largest // per_pod),
        pod_cpus=workers.threads * per_pod,
        pod_gpus=-(-per_pod // _sharers(gpus)) if 0 < gpus < 1 else int(gpus) * per_pod,
        pod_bytes=memory * per_pod,
        pod_resources={name: -int(-amount * per_pod // 1) for name, amount in workers.resources.items()},
    )
