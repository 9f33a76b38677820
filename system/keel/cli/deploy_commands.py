"""`keel deploy`: the files with which others watch and run Keel. They are in the wheel, so no checkout is needed."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from keel.cli import kubernetes_commands
from keel.errors import ConfigError

app = typer.Typer(help="Print or write dashboards, rules and manifests.", no_args_is_help=True)

Output = Annotated[Path | None, typer.Option(help="folder to write to; default: show what there is")]
Force = Annotated[bool, typer.Option("--force", help="overwrite files that are there and differ")]


def deploy_folder() -> Path:
    """The folder `deploy`: inside the package where that came from a wheel, else at the root of the repository."""
    package = Path(str(files("keel")))
    inside = package / "deploy"
    return inside if inside.is_dir() else package.parent.parent / "deploy"


def shipped(folder: str) -> dict[str, str]:
    """All files of a folder inside `deploy`: path inside it -> text."""
    top = deploy_folder() / folder
    paths = sorted(path for path in top.rglob("*") if path.is_file())
    return {str(path.relative_to(top)): path.read_text(encoding="utf8") for path in paths}


def write(output: Path, texts: dict[str, str], force: bool) -> None:
    """Write files into a folder, all or none. ConfigError where one is there and differs, unless forced."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output={output}: is a file; expected a folder")
    there = [name for name in texts if (output / name).exists()]
    differing = [name for name in there if (output / name).read_bytes() != texts[name].encode()]
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
    for each in dashboards.DASHBOARDS:
        typer.echo(f"{each.uid}.json  {each.title}: {len(each.panels)} panels. {each.description}")
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


app.command("kubernetes")(kubernetes_commands.kubernetes_manifests)
