"""Manifests of test runs, and the strict reading of a custom resource definition."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from keel.cluster import kubernetes
from keel.cluster.kubernetes_plan import FOR_A_CLUSTER, Options
from keel.config import loader as config_loader

ROOT = Path(__file__).parents[2]
CPU = ROOT / "configs" / "quickstart.yaml"
GPU = ROOT / "deploy" / "kubernetes" / "gpu.yaml"
ON_STORAGE = "run.directory=/mnt/keel/runs/{name}"
EXAMPLES = sorted((ROOT / "deploy" / "kubernetes").glob("ray*.yaml"))
CRDS = Path(os.environ.get("KEEL_KUBERAY_CRDS", ROOT.parent / "shared" / "data" / "kuberay"))
"""Folder of KubeRay's definitions, ray.io_rayjobs.yaml and ray.io_rayclusters.yaml."""


def made(*overrides: str, path: Path = CPU, **options: Any) -> dict[str, dict[str, Any]]:
    """Manifests by kind."""
    settings = config_loader.load(path, [ON_STORAGE, *overrides, *FOR_A_CLUSTER])
    return {item["kind"]: item for item in kubernetes.manifests(settings, Options(**options))}


def cluster_of(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The cluster's spec, in a RayJob or alone."""
    return manifests["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in manifests else manifests["RayCluster"]["spec"]


def templates(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pod templates of a RayJob or RayCluster by component."""
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        yield "submitter", spec["submitterPodTemplate"]
        spec = spec["rayClusterSpec"]
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def resource_schema(plural: str) -> dict[str, Any]:
    """The schema of version v1 of a KubeRay resource, unknown fields refused as `kubectl apply` refuses them."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the file has 1.4 MB
    definition = yaml.load((CRDS / f"ray.io_{plural}.yaml").read_text(encoding="utf8"), Loader=loader)
    (version,) = [item for item in definition["spec"]["versions"] if item["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    del schema["properties"]["metadata"]  # of every object; not the definition's to describe
    closed = _closed(schema)
    closed["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return closed


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema in which an object has the properties it names and no other: the API server drops the rest."""
    closed = dict(schema)
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        if isinstance(schema.get("additionalProperties"), dict):
            closed["additionalProperties"] = _closed(schema["additionalProperties"])
        else:
            closed["additionalProperties"] = False
            closed["properties"] = {name: _closed(item) for name, item in schema.get("properties", {}).items()}
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    return closed
