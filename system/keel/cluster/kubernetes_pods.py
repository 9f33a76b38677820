"""Pods of a run: one container that KubeRay starts Ray in, without privileges, with storage and shared memory."""

from collections.abc import Mapping
from typing import Any

from keel.cluster.kubernetes_plan import MOUNT, Plan, quantity

CONFIG_FOLDER = "/etc/keel"
USER = 1000
"""The user of the images in deploy/docker."""
_END_SECONDS = 60
"""What runs in a pod has so long after SIGTERM."""
_ENVIRONMENT = {
    "HOME": "/home/keel",
    "HF_HOME": f"{MOUNT}/huggingface",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
"""As `cluster.connect` has it for an embedded Ray; hub models are fetched to where every pod finds them."""


def labels(plan: Plan, component: str | None = None) -> dict[str, str]:
    """Without `name` and `created-by`: KubeRay finds its own pods by these."""
    own = {"app.kubernetes.io/part-of": "keel", "app.kubernetes.io/instance": plan.name}
    return own | ({"app.kubernetes.io/component": component} if component else {})


def ray_pod(plan: Plan, component: str, resources: Mapping[str, str], ports: Mapping[str, int]) -> dict[str, Any]:
    """Template of the head or of a group. KubeRay adds the command and, to the head, the autoscaler."""
    head = component == "head"
    container = {
        "name": "ray-head" if head else "ray-worker",
        **_container(plan, resources),
        "env": [{"name": name, "value": value} for name, value in _ENVIRONMENT.items()],
        **({"envFrom": [{"secretRef": {"name": plan.options.secret}}]} if plan.options.secret else {}),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        **_probes(head),
        "volumeMounts": [
            {"name": "storage", "mountPath": MOUNT},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *([{"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}] if head else []),
        ],
    }
    memory = {"medium": "Memory", "sizeLimit": quantity(plan.shared_bytes)}
    volumes: list[dict[str, Any]] = [
        {"name": "storage", "persistentVolumeClaim": {"claimName": plan.options.storage}},
        {"name": "shared-memory", "emptyDir": memory},
        *([{"name": "config", "configMap": {"name": f"{plan.name}-config"}}] if head else []),
    ]
    pod = _pod(container) | {"terminationGracePeriodSeconds": _END_SECONDS, "volumes": volumes}
    if not head:
        pod["automountServiceAccountToken"] = False  # the head's autoscaler needs its own
    if "nvidia.com/gpu" in resources:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": labels(plan, component)}, "spec": pod}


def submitter_pod(plan: Plan) -> dict[str, Any]:
    """Template of the pod that hands the entrypoint to the head and follows its log; the driver does not run here."""
    container = {"name": "ray-job-submitter", **_container(plan, {"cpu": "500m", "memory": "1Gi"})}
    pod = _pod(container) | {"restartPolicy": "Never", "automountServiceAccountToken": False}
    return {"metadata": {"labels": labels(plan, "submitter")}, "spec": pod}


def container_security() -> dict[str, Any]:
    """What Kubernetes' pod security standard `restricted` asks of a container."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _container(plan: Plan, resources: Mapping[str, str]) -> dict[str, Any]:
    """Requests are the limits: a pod that was promised less than it uses is the first one to be ended."""
    return {
        "image": plan.image,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": container_security(),
    }


def _probes(head: bool) -> dict[str, Any]:
    """Ray's own health: the raylet, and on the head the control store, too. It listens inside the pod only, hence exec.

    Not the run's: a driver's page is not there before the run begins and after it ends; whether a run moves is an
    alert's business.
    """
    raylet = "localhost:52365/api/local_raylet_healthz"  # Ray's default dashboard agent port
    pages = [raylet, "localhost:8265/api/gcs_healthz"] if head else [raylet]
    asked = " && ".join(f"wget --tries 1 -T 4 -q -O- http://{page} | grep success" for page in pages)
    probe = {"exec": {"command": ["bash", "-c", asked]}, "timeoutSeconds": 10, "periodSeconds": 10}
    return {
        "readinessProbe": probe | {"initialDelaySeconds": 10, "failureThreshold": 12},
        "livenessProbe": probe | {"initialDelaySeconds": 30, "failureThreshold": 60},
    }


def _pod(container: dict[str, Any]) -> dict[str, Any]:
    """Service links would set VLLM_PORT for a service of the name `vllm`, and vLLM reads that."""
    security = {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    return {"enableServiceLinks": False, "securityContext": security, "containers": [container]}
