"""KubeRay manifests of a run: settings and options -> one YAML stream for `kubectl apply`.

head pod   Ray's head, driver, buffer; promises Ray no CPU, so that no worker is placed there
group pod  workers of one role: generators, reference, scorers, learners
storage    one claim in every pod: run directory, checkpoints, models
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from keel import __version__
from keel.cluster.kubernetes_plan import HEAD_PORTS, MOUNT, RAY_PORTS, Options, PodGroup, PodPlan, quantity
from keel.config.run import Settings

CONFIG_FOLDER = "/etc/keel"
HEAD_CPUS = 2
USER = 1000
"""The user of the images in deploy/docker."""
_SCRAPE_SECONDS = {"keel": 5, "ray": 15}
"""Seconds between scrapes, by Prometheus job; Grafana's data source has that of Keel, for its windows of rates."""
_CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""The settings of a container that Kubernetes' pod security standard `restricted` requires."""
_POD = f"""
enableServiceLinks: false  # links would set VLLM_PORT for a service of the name `vllm`, and vLLM reads that
securityContext:
  runAsNonRoot: true
  runAsUser: {USER}
  runAsGroup: {USER}
  fsGroup: {USER}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {{type: RuntimeDefault}}
"""
_ENVIRONMENT = f"""
- {{name: HOME, value: /home/keel}}
- {{name: HF_HOME, value: {MOUNT}/huggingface}}  # hub models are fetched to where every pod finds them
- {{name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: '0'}}  # these as `actors.connect` has them for an embedded Ray
- {{name: RAY_USAGE_STATS_ENABLED, value: '0'}}
- {{name: RAY_worker_niceness, value: '0'}}
"""


def render(settings: Settings, options: Options) -> str:
    """The manifests as one YAML stream. Raises ConfigError."""
    objects = manifests(settings, options)
    stream = yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return f"# Rendered by `keel deploy kubernetes`, Keel {__version__}: change the configuration, not this.\n{stream}"


def manifests(settings: Settings, options: Options) -> list[dict[str, Any]]:
    """ConfigMap, claim (if it has a size), RayJob or RayCluster, PodMonitor. Raises ConfigError."""
    plan = PodPlan.of(settings, options)
    objects = [_object(plan, "v1", "ConfigMap", f"{plan.name}-config", data={"config.yaml": _as_written(settings)})]
    if options.storage_size:
        size = {"requests": {"storage": options.storage_size}}
        claim = {"accessModes": ["ReadWriteMany"], "resources": size}
        objects.append(_object(plan, "v1", "PersistentVolumeClaim", options.storage, spec=claim))
    if options.kind == "job":
        objects.append(_object(plan, "ray.io/v1", "RayJob", plan.name, spec=_job(plan)))
    else:
        objects.append(_object(plan, "ray.io/v1", "RayCluster", plan.name, spec=_cluster(plan)))
    if options.monitor:
        endpoints = [_endpoint("keel-metrics", "keel"), *(_endpoint(port, "ray") for port in RAY_PORTS)]
        monitor = {"selector": {"matchLabels": _labels(plan)}, "podMetricsEndpoints": endpoints}
        objects.append(_object(plan, "monitoring.coreos.com/v1", "PodMonitor", plan.name, spec=monitor))
    return objects


def _as_written(settings: Settings) -> str:
    """Dump the settings that were given; the image's Keel adds the defaults and writes all into the run directory."""
    given = settings.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, repeated parts written out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _object(plan: PodPlan, api: str, kind: str, name: str, **rest: Any) -> dict[str, Any]:
    namespace = {"namespace": plan.options.namespace} if plan.options.namespace else {}
    metadata = {"name": name, **namespace, "labels": _labels(plan)}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **rest}


def _labels(plan: PodPlan, component: str | None = None) -> dict[str, str]:
    """Labels without `name` and `created-by`, by which KubeRay finds its own pods."""
    labels = {"app.kubernetes.io/part-of": "keel", "app.kubernetes.io/instance": plan.name}
    return labels | ({"app.kubernetes.io/component": component} if component else {})


def _endpoint(port: str, job: str) -> dict[str, Any]:
    """The job as in deploy/prometheus: alerts ask for `up` of keel; the operator would name it after the PodMonitor."""
    relabelings = [{"targetLabel": "job", "replacement": job}]
    return {"port": port, "interval": f"{_SCRAPE_SECONDS[job]}s", "relabelings": relabelings}


def _job(plan: PodPlan) -> dict[str, Any]:
    """A job that fails is tried again on a new cluster; the run directory outlives both, so the run continues."""
    seconds = plan.options.deadline_seconds
    submitter = {"name": "ray-job-submitter", **_container(plan, {"cpu": "500m", "memory": "1Gi"})}
    pod = _pod(submitter, restartPolicy="Never", automountServiceAccountToken=False)
    return {
        "entrypoint": f"python -m keel train {CONFIG_FOLDER}/config.yaml",
        "submissionMode": "K8sJobMode",  # a pod submits and follows the log; the driver runs on the head
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 300,  # pods and logs are kept so long, and their GPUs with them
        "backoffLimit": plan.options.retries,
        **({"activeDeadlineSeconds": seconds} if seconds else {}),
        "submitterPodTemplate": {"metadata": {"labels": _labels(plan, "submitter")}, "spec": pod},
        "rayClusterSpec": _cluster(plan),
    }


def _cluster(plan: PodPlan) -> dict[str, Any]:
    resources = {"cpu": str(HEAD_CPUS), "memory": quantity(plan.head_bytes + plan.shared_bytes)}
    ports = HEAD_PORTS | RAY_PORTS | {"keel-metrics": plan.settings.metrics.port}
    idle = 600  # seconds until a pod is given back; a driver that fetches a model has no worker yet
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},  # without a token, any client that reaches the head could run code on it
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": idle, "securityContext": _CONTAINER_SECURITY},
        "headGroupSpec": {
            "rayStartParams": _start(plan, 0),
            "template": _ray_pod(plan, "head", resources, ports),
        },
        "workerGroupSpecs": [_worker_group(plan, group) for group in plan.groups],
    }


def _worker_group(plan: PodPlan, group: PodGroup) -> dict[str, Any]:
    resources = {
        "cpu": str(group.pod_cpus),
        "memory": quantity(group.pod_bytes + plan.shared_bytes),
        **({"nvidia.com/gpu": str(group.pod_gpus)} if group.pod_gpus else {}),
    }
    gpus = {"num-gpus": str(group.pod_gpus)} if group.pod_gpus else {}
    custom = {"resources": f"'{json.dumps(group.pod_resources)}'"} if group.pod_resources else {}  # for a shell
    return {
        "groupName": group.role,
        "replicas": group.pods,
        "minReplicas": group.pods,
        "maxReplicas": group.largest_pods,
        "rayStartParams": _start(plan, group.pod_cpus) | gpus | custom,
        "template": _ray_pod(plan, group.role, resources, {"metrics": RAY_PORTS["metrics"]}),
    }


def _start(plan: PodPlan, cpus: int) -> dict[str, str]:
    return {"num-cpus": str(cpus), "object-store-memory": str(plan.settings.cluster.object_store_bytes)}


def _ray_pod(plan: PodPlan, component: str, resources: Mapping[str, str], ports: Mapping[str, int]) -> dict[str, Any]:
    """Template of the head or of a group. KubeRay adds the command and, to the head, the autoscaler."""
    head = component == "head"
    secret = plan.options.secret
    container = {
        "name": "ray-head" if head else "ray-worker",
        **_container(plan, resources),
        "env": yaml.safe_load(_ENVIRONMENT),
        **({"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        **_probes(head),
        "volumeMounts": [
            {"name": "storage", "mountPath": MOUNT},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *([{"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}] if head else []),
        ],
    }
    volumes: list[dict[str, Any]] = [
        {"name": "storage", "persistentVolumeClaim": {"claimName": plan.options.storage}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": quantity(plan.shared_bytes)}},
        *([{"name": "config", "configMap": {"name": f"{plan.name}-config"}}] if head else []),
    ]
    pod = _pod(container, terminationGracePeriodSeconds=60, volumes=volumes)
    if not head:
        pod["automountServiceAccountToken"] = False  # the head's autoscaler needs its own
    if "nvidia.com/gpu" in resources:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": _labels(plan, component)}, "spec": pod}


def _pod(container: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return yaml.safe_load(_POD) | {"containers": [container]} | rest


def _container(plan: PodPlan, resources: Mapping[str, str]) -> dict[str, Any]:
    """Requests equal limits: a pod that was promised less than it uses is the first one to be ended."""
    return {
        "image": plan.image,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": _CONTAINER_SECURITY,
    }


def _probes(head: bool) -> dict[str, Any]:
    """Ray's own health: the raylet, and on the head the control store. Both listen inside the pod only, hence exec.

    Not the run's: the driver's page exists only while a run runs; alerts watch whether a run makes progress.
    """
    raylet = "localhost:52365/api/local_raylet_healthz"  # Ray's default dashboard agent port
    pages = [raylet, "localhost:8265/api/gcs_healthz"] if head else [raylet]
    command = " && ".join(f"wget --tries 1 -T 4 -q -O- http://{page} | grep success" for page in pages)
    probe = {"exec": {"command": ["bash", "-c", command]}, "timeoutSeconds": 10, "periodSeconds": 10}
    return {
        "readinessProbe": probe | {"initialDelaySeconds": 10, "failureThreshold": 12},
        "livenessProbe": probe | {"initialDelaySeconds": 30, "failureThreshold": 60},
    }
