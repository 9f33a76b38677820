"""What Kubernetes, KubeRay and Ray's autoscaler make of the manifests: their own schemas and code judge them."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import yaml

from manifests import CRDS, EXAMPLES, GPU, cluster_of, made, resource_schema, templates

KUBERNETES = "1.34"
PLURALS = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}
needs_definitions = pytest.mark.skipif(
    not CRDS.is_dir(), reason=f"no KubeRay definitions in {CRDS}; KEEL_KUBERAY_CRDS names another folder"
)


@functools.cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(resource_schema(PLURALS[kind]))


def problems(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay's definition has against a RayJob or RayCluster."""
    return [f"{error.json_path}: {error.message}" for error in validator(manifest["kind"]).iter_errors(manifest)]


def examples() -> list[dict[str, Any]]:
    return [item for path in EXAMPLES for item in yaml.safe_load_all(path.read_text(encoding="utf8"))]


def everything() -> list[dict[str, Any]]:
    """The examples, and a run that uses every option."""
    full = made(
        path=GPU,
        namespace="training",
        storage_size="1Ti",
        memory={"head": "9Gi"},
        per_pod={"learners": 2},
        retries=0,
        deadline_seconds=86400,
        secret="keys",
        image="registry.example:5000/team/keel@sha256:00",
    )
    return [*examples(), *full.values()]


@needs_definitions
def test_kuberay_accepts_every_field() -> None:
    judged = [item for item in everything() if item["kind"] in PLURALS]
    assert len(judged) == 5
    for manifest in judged:
        assert problems(manifest) == []


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown field of the job": lambda spec: spec.update(ttlSeconds=3),
    "type": lambda spec: spec.update(backoffLimit="3"),
    "unknown field of the cluster": lambda spec: spec["rayClusterSpec"].update(autoscaling=True),
    "value of a set": lambda spec: spec["rayClusterSpec"].update(authOptions={"mode": "tokens"}),
    "start parameter that is no text": lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(
        {"num-cpus": 0}
    ),
    "missing bound": lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"),
    "unknown field of a pod": lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"].update(
        shmSize="1Gi"
    ),
    "unknown field of a container": lambda spec: spec["submitterPodTemplate"]["spec"]["containers"][0].update(gpu=1),
}


@needs_definitions
@pytest.mark.parametrize("change", list(WRONG))
def test_a_wrong_field_is_found(change: str) -> None:
    job = copy.deepcopy(made()["RayJob"])
    assert problems(job) == []
    WRONG[change](job["spec"])
    assert problems(job) != []


def test_kubernetes_accepts_pods_claim_and_configuration() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    judged = 0
    for manifest in everything():
        core = [manifest] if manifest["kind"] in ("ConfigMap", "PersistentVolumeClaim") else []
        if manifest["kind"] in PLURALS:
            pods = dict(templates(manifest))
            core = [
                {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name} | pod["metadata"], "spec": pod["spec"]}
                for name, pod in pods.items()
            ]
        for item in core:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
            judged += 1
    assert judged == 5 + 2 + 2 * 5 + 3 * 6  # ConfigMaps, claims, pods of clusters, pods of jobs


def test_kubernetes_refuses_a_wrong_pod() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for wrong in ({"sharedMemory": "1Gi"}, {"terminationGracePeriodSeconds": "a minute"}):
        pod = dict(templates(made()["RayJob"]))["head"]["spec"] | wrong
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "head"}, "spec": pod}
        with pytest.raises(
            kubernetes_validate.ValidationError, match=next(iter(wrong)) + "|" + next(iter(wrong.values()))
        ):
            kubernetes_validate.validate(whole, KUBERNETES, strict=True)


def test_rays_autoscaler_reads_the_groups() -> None:
    """Its own reading of the resource, beside the configuration."""
    reader = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    result = made("generators.count=3", path=GPU, per_pod={"learners": 2}, largest={"generators": 7})
    cluster = {"metadata": {"name": "run", "namespace": "default"}, "spec": cluster_of(result)}
    read = reader._derive_autoscaling_config_from_ray_cr(cluster)
    types = read["available_node_types"]
    resources = {name: {key: item["resources"].get(key, 0) for key in ("CPU", "GPU")} for name, item in types.items()}
    bounds = {name: (item["min_workers"], item["max_workers"]) for name, item in types.items()}
    assert resources == {
        "headgroup": {"CPU": 0, "GPU": 0},
        "generators": {"CPU": 4, "GPU": 1},
        "reference": {"CPU": 2, "GPU": 1},
        "scorers": {"CPU": 1, "GPU": 0},
        "learners": {"CPU": 8, "GPU": 2},
    }
    del bounds["headgroup"]
    assert bounds == {"generators": (3, 7), "reference": (1, 2), "scorers": (2, 4), "learners": (1, 2)}
    assert read["idle_timeout_minutes"] == 10
