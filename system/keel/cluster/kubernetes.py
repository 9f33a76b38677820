"""KubeRay manifests of a run: settings and options -> one YAML stream for `kubectl apply`.

head pod   Ray's head, driver, buffer; promises Ray no CPU, so that no worker lands there
group pod  workers of one role: generators, reference, scorers, learners
storage    one claim in every pod: run directory, checkpoints, models
"""

import json
from importlib.metadata import version
from typing import Any

import yaml

from keel import __version__
from keel.cluster.kubernetes_plan import HEAD_PORTS, RAY_PORTS, Group, Options, Plan, quantity
from keel.cluster.kubernetes_pods import CONFIG_FOLDER, container_security, labels, ray_pod, submitter_pod
from keel.config.run import Settings

HEAD_CPUS = 2
_IDLE_SECONDS = 600
"""Before the autoscaler takes a pod back: a driver that fetches a model has no worker yet."""
_KEPT_SECONDS = 300
"""From a job's end to the end of its pods and their logs; until then they keep their GPUs."""
_SCRAPE_SECONDS = {"keel": 5, "ray": 15}
"""By job; Grafana's data source, whose windows of rates follow from it, is told that of Keel's."""


def manifests(settings: Settings, options: Options) -> list[dict[str, Any]]:
    """ConfigMap, claim (if it has a size), RayJob or RayCluster, PodMonitor. Raises ConfigError."""
    plan = Plan.of(settings, options)
    made = [_object(plan, "v1", "ConfigMap", f"{plan.name}-config", data={"config.yaml": _as_written(settings)})]
    if options.storage_size:
        size = {"requests": {"storage": options.storage_size}}
        claim = {"accessModes": ["ReadWriteMany"], "resources": size}
        made.append(_object(plan, "v1", "PersistentVolumeClaim", options.storage, spec=claim))
    if options.kind == "job":
        made.append(_object(plan, "ray.io/v1", "RayJob", plan.name, spec=_job(plan)))
    else:
        made.append(_object(plan, "ray.io/v1", "RayCluster", plan.name, spec=_cluster(plan)))
    if options.monitor:
        endpoints = [_endpoint("keel-metrics", "keel"), *(_endpoint(port, "ray") for port in RAY_PORTS)]
        monitor = {"selector": {"matchLabels": labels(plan)}, "podMetricsEndpoints": endpoints}
        made.append(_object(plan, "monitoring.coreos.com/v1", "PodMonitor", plan.name, spec=monitor))
    return made


def render(settings: Settings, options: Options) -> str:
    """The manifests as one YAML stream. Raises ConfigError."""
    made = manifests(settings, options)
    stream = yaml.dump_all(made, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return f"# Rendered by `keel deploy kubernetes`, Keel {__version__}: change the configuration, not this.\n{stream}"


def _as_written(settings: Settings) -> str:
    """The settings that were given; the image's Keel knows the others, and writes all into the run directory."""
    given = settings.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, repeated parts written out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _object(plan: Plan, api: str, kind: str, name: str, **rest: Any) -> dict[str, Any]:
    namespace = {"namespace": plan.options.namespace} if plan.options.namespace else {}
    metadata = {"name": name, **namespace, "labels": labels(plan)}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **rest}


def _endpoint(port: str, job: str) -> dict[str, Any]:
    """The job as in deploy/prometheus: alerts ask for `up` of keel; the operator would name it after the PodMonitor."""
    relabelings = [{"targetLabel": "job", "replacement": job}]
    return {"port": port, "interval": f"{_SCRAPE_SECONDS[job]}s", "relabelings": relabelings}


def _job(plan: Plan) -> dict[str, Any]:
    """A job that fails is tried again on a new cluster; the run directory outlives both, so the run goes on."""
    seconds = plan.options.deadline_seconds
    return {
        "entrypoint": f"python -m keel train {CONFIG_FOLDER}/config.yaml",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _KEPT_SECONDS,
        "backoffLimit": plan.options.retries,
        **({"activeDeadlineSeconds": seconds} if seconds else {}),
        "submitterPodTemplate": submitter_pod(plan),
        "rayClusterSpec": _cluster(plan),
    }


def _cluster(plan: Plan) -> dict[str, Any]:
    resources = {"cpu": str(HEAD_CPUS), "memory": quantity(plan.head_bytes + plan.shared_bytes)}
    ports = HEAD_PORTS | RAY_PORTS | {"keel-metrics": plan.settings.metrics.port}
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},  # whoever reaches the head without one may run anything on it
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": _IDLE_SECONDS, "securityContext": container_security()},
        "headGroupSpec": {
            "rayStartParams": _start(plan, 0),
            "template": ray_pod(plan, "head", resources, ports),
        },
        "workerGroupSpecs": [_worker_group(plan, group) for group in plan.groups],
    }


def _worker_group(plan: Plan, group: Group) -> dict[str, Any]:
    resources = {
        "cpu": str(group.pod_cpus),
        "memory": quantity(group.worker_bytes * group.per_pod + plan.shared_bytes),
        **({"nvidia.com/gpu": str(group.pod_gpus)} if group.pod_gpus else {}),
    }
    gpus = {"num-gpus": str(group.pod_gpus)} if group.pod_gpus else {}
    own = {"resources": f"'{json.dumps(group.pod_resources)}'"} if group.worker_resources else {}  # for a shell
    return {
        "groupName": group.role,
        "replicas": group.pods,
        "minReplicas": group.pods,
        "maxReplicas": group.largest_pods,
        "rayStartParams": _start(plan, group.pod_cpus) | gpus | own,
        "template": ray_pod(plan, group.role, resources, {"metrics": RAY_PORTS["metrics"]}),
    }


def _start(plan: Plan, cpus: int) -> dict[str, str]:
    return {"num-cpus": str(cpus), "object-store-memory": str(plan.settings.cluster.object_store_bytes)}
