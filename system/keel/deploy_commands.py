"""`keel deploy`: print what a cluster and its monitoring are set up with."""

import typer

from keel import kubernetes_commands

app = typer.Typer(help="Print manifests for Kubernetes.", no_args_is_help=True)
app.command("kubernetes")(kubernetes_commands.kubernetes_manifests)
