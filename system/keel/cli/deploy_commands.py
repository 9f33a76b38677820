"""`keel deploy`: the files to monitor and run Keel elsewhere. They are in the wheel, so no checkout is needed."""

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import typer

from keel.cluster import kubernetes
from keel.cluster.capacity import BLOCKS
from keel.cluster.kubernetes_plan import FOR_A_CLUSTER, Options
from keel.config import loader
from keel.errors import ConfigError

app = typer.Typer(help="Print or write dashboards, rules and manifests.", no_args_is_help=True)

Output = Annotated[Path | None, typer.Option(help="folder to write to; default: show what there is")]
Most = Annotated[int | None, typer.Option(min=1, help="workers the run may grow to; default: twice the configured")]
Force = Annotated[bool, typer.Option("--force", help="overwrite files that are there and differ")]


def deploy_folder() -> Path:
    """The folder `deploy`: inside the package where that came from a wheel, else at the root of the repository."""
    package = Path(str(files("keel")))
    inside = package / "deploy"
    return inside if inside.is_dir() else package.parent.parent / "deploy"


def shipped(folder: str) -> dict[str, str]:
    """Read all files of a folder inside `deploy`: path inside it -> text."""
    top = deploy_folder() / folder
    paths = sorted(path for path in top.rglob("*") if path.is_file())
    return {str(path.relative_to(top)): path.read_text(encoding="utf8") for path in paths}


def write(output: Path, texts: dict[str, str], force: bool) -> None:
    """Write files into a folder, all or none. Raises ConfigError where a present one differs, unless forced."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output={output}: is a file; expected a folder")
    present = [name for name in texts if (output / name).exists()]
    differing = [name for name in present if (output / name).read_bytes() != texts[name].encode()]
    if differing and not force:
        raise ConfigError(f"--output={output}: {differing[0]} in it differs; expected --force, or another folder")
    for name, text in texts.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text, encoding="utf8")
        (output / name).chmod(0o755 if name.endswith(".sh") else 0o644)
        typer.echo(output / name)


@app.command()
def grafana(output: Output = None, force: Force = False) -> None:
    """The Grafana dashboards and their provisioning; without --output, what there is."""
    from keel.observability import dashboards

    provisioning = {name: text for name, text in shipped("grafana").items() if name.startswith("provisioning/")}
    if output is not None:
        write(output, dashboards.files() | provisioning, force)
        return
    for dashboard in dashboards.DASHBOARDS:
        typer.echo(f"{dashboard.uid}.json  {dashboard.title}: {len(dashboard.panels)} panels. {dashboard.description}")
    for name in provisioning:
        typer.echo(name)


@app.command()
def prometheus(
    output: Output = None,
    discovery: Annotated[
        Path | None, typer.Option(help="the runs' metrics.discovery_directory; default: discovery/ beside the output")
    ] = None,
    force: Force = False,
) -> None:
    """The configuration and the rules of Prometheus; without --output, print them."""
    texts = shipped("prometheus")
    if discovery is not None:
        named = json.dumps(f"{discovery.absolute()}/keel-*.json", ensure_ascii=False)
        before = texts["prometheus.yml"]
        texts["prometheus.yml"] = before.replace("files: [discovery/keel-*.json]", f"files: [{named}]")
        assert texts["prometheus.yml"] != before, "the place of the folder in prometheus.yml"
    if output is not None:
        write(output, texts, force)
        return
    for name, text in texts.items():
        typer.echo(f"# {name}\n{text}")


@app.command("kubernetes")
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
    retries: Annotated[int, typer.Option(min=0, help="of a job that fails; each resumes the run")] = 3,
    deadline_seconds: Annotated[int | None, typer.Option(min=1, help="of the job; default: none")] = None,
    secret: Annotated[
        str | None, typer.Option(help="Secret whose entries become variables, for headers of http rewards and HF_TOKEN")
    ] = None,
    monitor: Annotated[bool, typer.Option(help="a PodMonitor for the Prometheus operator")] = True,
    output: Annotated[Path | None, typer.Option(help="file to write; default: standard output")] = None,
) -> None:
    """Print KubeRay manifests of a run, for `kubectl apply -f -`."""
    settings = loader.load(config_path, [*(overrides or []), *FOR_A_CLUSTER])
    most = zip(BLOCKS.values(), (max_generators, max_reference, max_scorers, max_learners), strict=True)
    largest = {role: count for role, count in most if count is not None}
    pods = {role: _number(role, value) for role, value in _by_role("--per-pod", per_pod)}
    sizes = dict(_by_role("--memory", memory))
    options = Options(
        kind, image, namespace, storage, storage_size, sizes, pods, largest, retries, deadline_seconds, secret, monitor
    )
    text = kubernetes.render(settings, options)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf8")
    except OSError as error:
        raise ConfigError(f"--output={output}: {error.strerror}; expected a file that can be written") from None


def _by_role(flag: str, given: Iterable[str] | None) -> Iterable[tuple[str, str]]:
    for text in given or []:
        role, separator, value = text.partition("=")
        if not (role and separator and value):
            raise ConfigError(f"{flag}={text}: expected ROLE=VALUE, with generators, reference, scorers or learners")
        yield role, value


def _number(role: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 5):
        raise ConfigError(f"--per-pod {role}={text}: expected a number of workers")
    return int(text)
