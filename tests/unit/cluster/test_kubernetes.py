"""`keel deploy kubernetes`: every worker finds a pod, the run finds its files again, mistakes are one line."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from keel.cli import main
from keel.cluster import kubernetes
from keel.cluster.kubernetes_plan import FOR_A_CLUSTER, Options, PodPlan
from keel.config import loader
from keel.config.workers import GeneratorSettings
from keel.errors import ConfigError
from manifests import CPU, EXAMPLES, GPU, ON_STORAGE, ROOT, cluster_of, made, templates

pytestmark = pytest.mark.usefixtures("restored_process")  # the command line has its process for itself

GI = 2**30


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `keel deploy kubernetes`."""
    monkeypatch.setattr(sys, "argv", ["keel", "deploy", "kubernetes", *arguments])
    with pytest.raises(SystemExit, match=r"\A\d*\Z") as stop:
        main.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def commands() -> dict[str, list[str]]:
    """Arguments that render.sh gives, by the file that it writes."""
    lines = (ROOT / "deploy" / "kubernetes" / "render.sh").read_text(encoding="utf8").splitlines()
    result = {}
    for line in lines:
        if line.startswith("keel deploy kubernetes "):
            arguments = shlex.split(line)[3:]
            at = arguments.index("--output")
            result[arguments[at + 1]] = arguments[:at] + arguments[at + 2 :]
    return result


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_committed_examples_are_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    """Where this fails after a change of the settings or pins: deploy/kubernetes/render.sh."""
    monkeypatch.chdir(ROOT)
    assert len(EXAMPLES) == len(commands()) == 4
    assert run(monkeypatch, *commands()[str(path.relative_to(ROOT))]) == 0
    assert capsys.readouterr().out == path.read_text(encoding="utf8")


def test_output_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, "--config", str(CPU), "--output", str(tmp_path / "run.yaml"), ON_STORAGE) == 0
    kinds = [item["kind"] for item in yaml.safe_load_all((tmp_path / "run.yaml").read_text())]
    assert kinds == ["ConfigMap", "RayJob", "PodMonitor"]


@pytest.mark.parametrize("path", [CPU, GPU, *(ROOT / "configs").glob("objectives/*.yaml")], ids=lambda path: path.stem)
def test_the_configuration_in_the_cluster_is_the_run_itself(path: Path) -> None:
    changes = ["run.seed=7", "run.name=again", ON_STORAGE]
    inside = loader.parse(yaml.safe_load(made(*changes, path=path)["ConfigMap"]["data"]["config.yaml"]))
    here = loader.load(path, changes)
    assert loader.digest(inside) == loader.digest(here)
    assert inside.model_dump(
        exclude={"cluster": {"address", "wait_for_nodes"}, "metrics": {"host"}}
    ) == here.model_dump(exclude={"cluster": {"address", "wait_for_nodes"}, "metrics": {"host"}})
    assert (inside.cluster.address, inside.metrics.host) == ("auto", "0.0.0.0")
    assert inside.run_directory == "/mnt/keel/runs/again"


def test_a_failed_job_finds_its_run_directory_again() -> None:
    job = made(retries=5)["RayJob"]["spec"]
    assert job["backoffLimit"] == 5 and job["entrypoint"] == "python -m keel train /etc/keel/config.yaml"
    for component, pod in templates(made()["RayJob"]):
        mounts = pod["spec"]["containers"][0].get("volumeMounts", [])
        places = {mount["name"]: mount["mountPath"] for mount in mounts}
        assert (places.get("storage") == "/mnt/keel") == (component != "submitter")
        assert (places.get("config") == "/etc/keel") == (component == "head")
        assert {volume["name"] for volume in pod["spec"].get("volumes", [])} == set(places)


def test_a_job_that_ended_keeps_its_gpus_for_minutes_only() -> None:
    job = made(path=GPU)["RayJob"]["spec"]
    assert job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] <= 300


def test_pods_meet_the_restricted_security_standard() -> None:
    for _, pod in templates(made(path=GPU)["RayJob"]):
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == context["fsGroup"] == 1000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        assert not any("hostPath" in volume for volume in pod["spec"].get("volumes", []))
    assert cluster_of(made())["authOptions"] == {"mode": "token"}


def test_labels_leave_kuberay_its_own() -> None:
    """A pod of another `name` is not found by the head's service."""
    for component, pod in templates(made()["RayJob"]):
        names = pod["metadata"]["labels"]
        assert names["app.kubernetes.io/component"] == component
        assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & set(names)


def test_prometheus_finds_every_named_port() -> None:
    result = made("metrics.port=9999")
    ports: dict[str, dict[str, int]] = {
        component: {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0].get("ports", [])}
        for component, pod in templates(result["RayJob"])
    }
    followed = {"gcs-server": 6379, "dashboard": 8265}
    assert ports["head"] == followed | {
        "metrics": 8080,
        "as-metrics": 44217,
        "dash-metrics": 44227,
        "keel-metrics": 9999,
    }
    assert ports["generators"] == ports["learners"] == {"metrics": 8080}
    assert ports["submitter"] == {}
    spec = result["PodMonitor"]["spec"]
    jobs = {item["port"]: item["relabelings"] for item in spec["podMetricsEndpoints"]}
    assert set(jobs) == set(ports["head"]) - set(followed)
    configuration = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf8"))
    assert {item["job_name"] for item in configuration["scrape_configs"]} == {"keel", "ray"}
    for port, relabelings in jobs.items():  # the jobs that the alerts ask for
        context = "keel" if port == "keel-metrics" else "ray"
        assert relabelings == [{"targetLabel": "job", "replacement": context}]
    for _, pod in templates(result["RayJob"]):
        assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert "PodMonitor" not in made(monitor=False)


def test_memory_is_the_workers_and_what_lies_in_dev_shm() -> None:
    """dev/shm counts as memory of its pod; a generator without a GPU has its cache in memory, too."""
    object_store = 3 * GI
    changes = (f"cluster.object_store_bytes={object_store}", f"generators.kv_cache_bytes={2 * GI}")
    pods = dict(templates(made(*changes, memory={"learners": "20Gi"}, per_pod={"learners": 2})["RayJob"]))
    limits = {name: pod["spec"]["containers"][0]["resources"]["limits"]["memory"] for name, pod in pods.items()}
    assert limits["learners"] == f"{(2 * 20 + 4) * 1024}Mi"
    assert limits["generators"] == f"{(8 + 2 + 4) * 1024}Mi"
    assert limits["head"] == f"{(8 + 4) * 1024}Mi"
    given = dict(templates(made(*changes, memory={"generators": "10Gi"})["RayJob"]))["generators"]
    assert given["spec"]["containers"][0]["resources"]["limits"]["memory"] == f"{(10 + 4) * 1024}Mi"
    shared = [volume for volume in pods["head"]["spec"]["volumes"] if volume["name"] == "shared-memory"]
    assert shared[0]["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{4 * 1024}Mi"}
    start = cluster_of(made(*changes))["headGroupSpec"]["rayStartParams"]
    assert start == {"num-cpus": "0", "object-store-memory": str(object_store)}


def test_custom_resources_are_quoted_for_a_shell_and_for_rays_autoscaler() -> None:
    placed = GeneratorSettings(count=3, resources={"generator": 0.5, "node/fast": 2})
    settings = loader.load(CPU, [ON_STORAGE, *FOR_A_CLUSTER]).model_copy(update={"generators": placed})
    made = kubernetes.manifests(settings, Options(kind="cluster", per_pod={"generators": 3}))
    generators, *others = made[1]["spec"]["workerGroupSpecs"]
    text = generators["rayStartParams"]["resources"]
    assert json.loads(shlex.split(text)[0]) == {"generator": 2, "node/fast": 6}  # rounded up
    assert not any("resources" in group["rayStartParams"] for group in others)
    reader = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    assert reader._get_custom_resources({}, generators["rayStartParams"], "") == {"generator": 2, "node/fast": 6}


def test_ranks_of_one_generator_share_a_pod() -> None:
    config = GeneratorSettings(count=3, gpus=1, tensor_parallel=4)
    settings = loader.load(CPU, [ON_STORAGE, *FOR_A_CLUSTER]).model_copy(update={"generators": config})
    generators = PodPlan.of(settings, Options()).groups[0]
    assert (generators.pods, generators.pod_gpus) == (3, 4)


# ---- every worker finds a pod

SHARES = st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0, 4.0])


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[str], dict[str, Any]]:
    """Overrides and options of a run whose generators have GPUs where anybody has."""
    overrides, per_pod, largest = [], {}, {}
    for role in ("generators", "reference", "scorers", "learners"):
        gpus = draw(SHARES.filter(bool)) if role == "generators" else draw(SHARES)
        count = draw(st.integers(1, 9))
        overrides += [f"{role}.count={count}", f"{role}.gpus={gpus}", f"{role}.threads={draw(st.integers(1, 8))}"]
        if draw(st.booleans()):
            per_pod[role] = draw(st.integers(1, 10))
        if draw(st.booleans()):
            largest[role] = draw(st.integers(count, 3 * count))
    return overrides, {"per_pod": per_pod, "largest": largest}


def held(group: dict[str, Any], threads: int, gpus: float) -> int:
    """Workers that Ray puts into one pod of a group, one after the other; a share of a GPU is of one GPU."""
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert group["rayStartParams"]["num-cpus"] == resources["limits"]["cpu"]
    assert group["rayStartParams"].get("num-gpus") == resources["limits"].get("nvidia.com/gpu")
    cpus, free = int(resources["limits"]["cpu"]), [1.0] * int(resources["limits"].get("nvidia.com/gpu", 0))
    workers = 0
    while cpus >= threads:
        if 0 < gpus < 1:
            fitting = [index for index, left in enumerate(free) if left >= gpus - 1e-9]
            if not fitting:
                break
            free[fitting[0]] -= gpus
        else:
            whole = [index for index, left in enumerate(free) if left == 1.0][: int(gpus)]
            if len(whole) < gpus:
                break
            for index in whole:
                free[index] = 0.0
        cpus -= threads
        workers += 1
    return workers


@hypothesis_settings(max_examples=60, deadline=None)
@given(runs())
def test_every_worker_finds_a_pod_of_its_group(run: tuple[list[str], dict[str, Any]]) -> None:
    overrides, options = run
    settings = loader.load(CPU, [*overrides, "buffer.groups_per_step=64", ON_STORAGE, *FOR_A_CLUSTER])
    spec = kubernetes.manifests(settings, Options(kind="cluster", **options))[1]["spec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert list(groups) == ["generators", "reference", "scorers", "learners"]
    for role, group in groups.items():
        config = settings.model_dump()[role]
        in_one = held(group, config["threads"], config["gpus"])
        most = options["largest"].get(role, 2 * config["count"])
        assert in_one == options["per_pod"].get(role, in_one) >= 1
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert (group["replicas"] - 1) * in_one < config["count"] <= group["replicas"] * in_one
        assert (group["maxReplicas"] - 1) * in_one < most <= group["maxReplicas"] * in_one


@example("a" * 47)
@example("a" * 48)
@given(st.text(st.sampled_from("abzABZ019-._"), min_size=1, max_size=60))
def test_a_run_name_is_taken_as_it_is_or_refused(name: str) -> None:
    """KubeRay takes an RFC 1035 label of up to 47 characters."""
    label = name[0] in "abz" and name[-1] in "abz019" and set(name) <= set("abz019-") and len(name) <= 47
    settings = loader.load(CPU, [f'run.name="{name}"', ON_STORAGE, *FOR_A_CLUSTER])
    if label:
        names = [manifest["metadata"]["name"] for manifest in kubernetes.manifests(settings, Options())]
        assert names == [f"{name}-config", name, name]
    else:
        with pytest.raises(ConfigError, match=r"^run\.name="):
            PodPlan.of(settings, Options())


# ---- mistakes

MISTAKES: dict[str, tuple[list[str], str]] = {
    "relative": (["run.directory=runs/a"], "run.directory=runs/a: every pod must see it"),
    "elsewhere": (["run.directory=/data/a"], "expected a path below /mnt/keel"),
    "climbing": (["run.directory=/mnt/keel/../a"], "expected a path below /mnt/keel"),
    "mount itself": (["run.directory=/mnt/keel"], "expected a path below /mnt/keel"),
    "name": (["run.name=Quick_start"], "run.name=Quick_start: no name for Kubernetes"),
    "any port": (["metrics.port=0"], "metrics.port=0: expected 1024 to 65535"),
    "Ray's port": (["metrics.port=8080"], "none of Ray's own (6379, 8080, 8265, 10001, 44217, 44227)"),
    "size": (["--memory", "learners=lots"], "--memory learners=lots: expected a size such as"),
    "no role": (["--memory", "16Gi"], "--memory=16Gi: expected ROLE=VALUE"),
    "unknown role": (["--memory", "judges=16Gi"], "--memory judges: the run has none; expected one of head, generators"),
    "per pod": (["--per-pod", "learners=0"], "--per-pod learners=0: expected at least 1"),
    "per pod text": (["--per-pod", "learners=two"], "--per-pod learners=two: expected a number of workers"),
    "absent role": (["reference=null", "regularizer.kl.coefficient=0", "rewards=[{name: a, source: 'a:b'}]", "--max-reference", "2"], "--max-reference: the run has none"),
    "fewer than there are": (["generators.count=3", "--max-generators", "2"], "--max-generators=2: generators.count=3"),
    "split GPU": (["generators.gpus=1.5"], "generators.gpus=1.5: Ray shares no more than one"),
    "CPU generators": (["learners.gpus=1"], "generators.gpus=0: other roles have GPUs"),
    "namespace": (["--namespace", "Team A"], "--namespace=Team A: no name for Kubernetes"),
    "claim": (["--storage", "my/claim"], "--storage=my/claim: no name for Kubernetes"),
    "claim size": (["--storage-size", "100"], "--storage-size=100: expected a size such as"),
    "secret": (["--secret", "KEY=1"], "--secret=KEY=1: no name for Kubernetes"),
    "image": (["--image", "keel: latest"], "--image=keel: latest: expected the name of a container image"),
    "output": (["--output", "/no/such/folder/a.yaml"], "--output=/no/such/folder/a.yaml: No such file or directory"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    arguments, expected = MISTAKES[mistake]
    assert run(monkeypatch, "--config", str(CPU), ON_STORAGE, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and expected in shown.err
