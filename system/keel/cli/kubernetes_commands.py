"""`keel deploy kubernetes`: the command line around kubernetes.py."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from keel.cluster import kubernetes
from keel.cluster.kubernetes_plan import FOR_A_CLUSTER, Options
from keel.config import loader
from keel.errors import ConfigError

Most = Annotated[int | None, typer.Option(min=1, help="workers the run may grow to; default: twice the configured")]


def kubernetes_manifests(
    config_path: Annotated[str, typer.Option("--config", help="YAML file of an online run")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings to change, as a.b=c", show_default=False)
    ] = None,
    kind: Annotated[Literal["job", "cluster"], typer.Option(help="RayJob, or a RayCluster to submit jobs to")] = "job",
    image: Annotated[str | None, typer.Option(help="default: keel:VERSION-cpu or keel:VERSION-gpu")] = None,
    namespace: Annotated[str | None, typer.Option(help="one that exists; default: kubectl's")] = None,
    storage: Annotated[str, typer.Option(help="PersistentVolumeClaim that all pods mount")] = "keel",
    storage_size: Annotated[
        str | None, typer.Option(help="also make that claim, such as 100Gi; default: it exists")
    ] = None,
    memory: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=SIZE", help="of one worker, or of head; learners=64Gi")
    ] = None,
    per_pod: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=N", help="workers in one pod; learners=4 on one machine")
    ] = None,
    max_generators: Most = None,
    max_reference: Most = None,
    max_scorers: Most = None,
    max_learners: Most = None,
    retries: Annotated[int, typer.Option(min=0, help="of a job that fails; each goes on from the checkpoint")] = 3,
    deadline_seconds: Annotated[int | None, typer.Option(min=1, help="of the job; default: none")] = None,
    secret: Annotated[
        str | None, typer.Option(help="Secret whose entries become variables, for headers of http rewards and HF_TOKEN")
    ] = None,
    monitor: Annotated[bool, typer.Option(help="a PodMonitor for the Prometheus operator")] = True,
    output: Annotated[Path | None, typer.Option(help="file to write; default: standard output")] = None,
) -> None:
    """Print KubeRay manifests of a run, for `kubectl apply -f -`."""
    settings = loader.load(config_path, [*(overrides or []), *FOR_A_CLUSTER])
    largest = {
        "generators": max_generators,
        "reference": max_reference,
        "scorers": max_scorers,
        "learners": max_learners,
    }
    text = kubernetes.render(
        settings,
        Options(
            kind=kind,
            image=image,
            namespace=namespace,
            storage=storage,
            storage_size=storage_size,
            memory=dict(_by_role("--memory", memory)),
            per_pod={role: _number(role, value) for role, value in _by_role("--per-pod", per_pod)},
            largest={role: count for role, count in largest.items() if count is not None},
            retries=retries,
            deadline_seconds=deadline_seconds,
            secret=secret,
            monitor=monitor,
        ),
    )
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf8")
    except OSError as error:
        raise ConfigError(f"--output={output}: {error.strerror}; expected a file that can be written") from None


def _by_role(flag: str, given: Iterable[str] | None) -> Iterable[tuple[str, str]]:
    for each in given or []:
        role, separator, value = each.partition("=")
        if not (role and separator and value):
            raise ConfigError(f"{flag}={each}: expected ROLE=VALUE, with generators, reference, scorers or learners")
        yield role, value


def _number(role: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 5):
        raise ConfigError(f"--per-pod {role}={text}: expected a number of workers")
    return int(text)
