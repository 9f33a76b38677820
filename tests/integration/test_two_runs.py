"""Two runs of one name, seed and configuration at once on one cluster of three nodes: each is as if it were alone.

One joins the cluster from here, the other is submitted to it as a job.
"""

import os
import re
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

import keel as package
from commands import finish, wait_for
from live import add_node, check_intact, free_port, title_of, wait

pytestmark = pytest.mark.slow
STEPS = 4
ONE_GENERATOR = 'keel_workers{role="generator",run="twin"} 1.0'
Start = Callable[..., Any]


@pytest.fixture
def cluster(pace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    paths = [str(Path(__file__).parent), str(Path(package.__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # a job runs the cluster's python
    monkeypatch.setenv("RAY_worker_niceness", "0")
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": free_port()}
    dashboard["dashboard_agent_listen_port"] = free_port()  # without one of its own no job starts beside another Ray
    cluster = Cluster()
    # A job is given the address that lies in the folder of its cluster, or that of any cluster here where there is none
    # (Ray 2.60), as there is none in a folder of one's own: Cluster writes it into the one that all share.
    with tempfile.TemporaryDirectory(prefix="kt", dir="/tmp") as folder:  # short: sockets lie in it
        for node in ({"num_cpus": 0, "temp_dir": folder, **dashboard}, {"num_cpus": 4}, {"num_cpus": 4}):
            add_node(cluster, **node)
        write_ray_address(cluster.address, folder)
        yield cluster
        cluster.shutdown()


def endpoint_of(process: Any) -> str:
    """The address that the run says it serves its metrics at."""
    for line in process.stdout:
        if result := re.search(r"metrics: (http://\S+)", line):
            return result[1]
    raise AssertionError(f"no endpoint: {process.stderr.read()}")


def page_of(endpoint: str) -> str:
    with urllib.request.urlopen(endpoint, timeout=30) as reply:
        return str(reply.read().decode())


def test_two_runs_at_once_do_not_touch_each_other(
    cluster: Cluster, write_config: Start, keel: Start, tmp_path: Path, pace: Path
) -> None:
    pace.write_text("600")  # both wait in their first step until there are two
    runs = [tmp_path / name / "run" for name in ("one", "two")]
    configs = [
        write_config(
            run.parent.name,
            run={"name": "twin", "steps": STEPS, "directory": str(run)},
            rewards=[{"name": "low", "source": "rewards:paced"}],
            scorers={"threads": 1},
            checkpoint={"every_steps": 2},
            evaluation={"every_steps": 0},
            prompts={"source": str(tmp_path / "one" / "prompts.jsonl")},
        )
        for run in runs
    ]
    here = keel("train", str(configs[0]), "--address", cluster.address)
    job = keel("submit", str(configs[1]), "--address", f"http://{cluster.webui_url}", "--follow")
    processes = [here, job]
    endpoints = [endpoint_of(process) for process in processes]
    assert len(set(endpoints)) == 2
    for process, endpoint in zip(processes, endpoints, strict=True):
        wait(process, lambda endpoint=endpoint: ONE_GENERATOR in page_of(endpoint), "a generator")
    assert [ONE_GENERATOR in page_of(endpoint) for endpoint in endpoints] == [True, True]
    pace.unlink()
    for process in processes:
        code, _, err = finish(process)
        assert code == 0, err
    reports = [check_intact(keel, run) for run in runs]
    assert reports[0]["counts"] == reports[1]["counts"]
    code, out, err = finish(keel("verify", str(runs[0]), "--against", str(runs[1])))
    assert code == 0 and f"Same     as {runs[1]}" in out, (out, err)
    check_nothing_is_left(cluster)


def check_nothing_is_left(cluster: Cluster) -> None:
    """No actor, no reserved CPU, no object of either run."""
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        wait_for(lambda: ray.available_resources().get("CPU") == 8.0, 30, "all CPUs free again")
        present, free = ray.cluster_resources(), ray.available_resources()
        assert present["object_store_memory"] == free["object_store_memory"], (present, free)
    finally:
        ray.shutdown()
    titles = map(title_of, psutil.Process().children(recursive=True))
    left = [title for title in titles if re.match(r"ray::(Vllm|Reference|Reward|DeepSpeed|Rollout|Control)", title)]
    assert not left, left
