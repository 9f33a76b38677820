"""deploy/slurm/keel.sbatch with stubs in place of SLURM, Ray and Keel: what is started, and how it ends."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tools

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "deploy" / "slurm" / "keel.sbatch"
SCRIPTS = [SCRIPT, ROOT / "deploy" / "kubernetes" / "render.sh"]
SRUN = r"""
tasks=$SLURM_NTASKS nodes=
for each in "$@"; do
  case "$each" in --ntasks=*) tasks=${each#*=};; --nodes=*) nodes=${each#*=};; hostname|ray) break;; esac
done
[ "$tasks" = "$nodes" ] || { echo "srun: cannot honor $tasks tasks on $nodes nodes" >&2; exit 1; }
case "$*" in
  *hostname*) LOG; echo "10.0.0.1 fe80::1";;
  *) trap "echo srun ended >>$CALLS; exit" TERM; LOG; sleep 60 & wait;;
esac
"""
"""Like srun, it takes the job's number of tasks where it is told none; one a node is what the script wants."""
STUBS = {
    "srun": SRUN,
    "scontrol": 'case "$1" in show) echo node1; echo node2; echo node3;; esac',
    "ray": "",
    # of the nodes, when both steps have come to Ray
    "python": 'case "$*" in *secrets*) ;; *) until [ "$(grep -c "^srun --overlap" "$CALLS")" -ge 2 ]; do /bin/sleep 0.02; done;; esac; echo "${NODES:-3}"',
    "sleep": 'exec /bin/sleep "${SLEEP_SECONDS:-$1}"',
    "keel": 'trap "echo ended >>$CALLS; exit 130" TERM; trap "echo stopped >>$CALLS; [ -n \\"$DEAF\\" ] || exit 130" USR1; LOG; [ -n "$LONG" ] || exit "${CODE:-0}"; while :; do /bin/sleep 0.05; done',
}


_jobs: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A test that fails leaves no process running."""
    yield
    while _jobs:
        with contextlib.suppress(ProcessLookupError):  # it ended, and all it started
            os.killpg(_jobs.pop().pid, signal.SIGKILL)


def started(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The script on three nodes; every stub appends a line to `calls`, one that a signal ends when it can hear it."""
    (folder / "bin").mkdir()
    for name, body in STUBS.items():
        script = body if "LOG" in body or name == "sleep" else f"LOG\n{body}"
        (folder / "bin" / name).write_text("#!/bin/bash\n" + script.replace("LOG", f'echo "{name} $*" >>"$CALLS"'))
        (folder / "bin" / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-3]"}
    slurm |= {"SLURM_NTASKS": "3", "SLURM_CPUS_ON_NODE": "16", "SLURM_JOB_CPUS_PER_NODE": "16,8(x2)"}
    subject = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "CALLS": str(folder / "calls"), "HOME": str(folder)}
    environment = slurm | subject | environment
    command = ["bash", str(SCRIPT), *arguments]
    _jobs.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True))
    return _jobs[-1]


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(folder: Path, start: str) -> None:
    deadline = time.monotonic() + 30
    while not any(call.startswith(start) for call in calls(folder)):
        assert time.monotonic() < deadline, calls(folder)
        time.sleep(0.05)


def steps(folder: Path) -> list[str]:
    return [call for call in calls(folder) if call.startswith("srun --overlap")]


def test_head_workers_and_run(tmp_path: Path) -> None:
    job = started(tmp_path, "run.yaml", "run.steps=5")
    assert job.wait(timeout=60) == 0
    common = "srun --overlap --mem=0 --cpus-per-task=8 --ntasks-per-node=1"
    head = "--head --include-dashboard=false --node-ip-address=10.0.0.1 --port=23456 --temp-dir=/tmp/ray-123456"
    assert sorted(steps(tmp_path)) == [  # 8 CPUs: of the smallest node
        f"{common} --nodes=1 --ntasks=1 --nodelist=node1 ray start --block {head} --num-cpus=8",
        f"{common} --nodes=2 --ntasks=2 --exclude=node1 ray start --block --address=10.0.0.1:23456 --num-cpus=8",
    ]
    assert calls(tmp_path)[-3:] == ["keel train run.yaml run.steps=5 --address 10.0.0.1:23456", *["srun ended"] * 2]
    assert not any(call.startswith("scontrol requeue") for call in calls(tmp_path))


def test_the_token_is_made_once_and_for_nobody_else(tmp_path: Path) -> None:
    token = tmp_path / ".keel-ray-token"
    assert started(tmp_path, "run.yaml").wait(timeout=60) == 0
    assert token.stat().st_mode & 0o777 == 0o600
    token.write_text("mine")
    (tmp_path / "again").mkdir()
    assert started(tmp_path / "again", "run.yaml", HOME=str(tmp_path)).wait(timeout=60) == 0
    assert token.read_text() == "mine"


def test_a_failed_run_fails_the_job_and_is_not_queued_again(tmp_path: Path) -> None:
    assert started(tmp_path, "run.yaml", CODE="1").wait(timeout=60) == 1
    assert not any(call.startswith("scontrol requeue") for call in calls(tmp_path))


@pytest.mark.parametrize(
    ("sent", "ends", "queued"), [(signal.SIGUSR1, ["stopped"], True), (signal.SIGTERM, ["ended"], False)]
)
def test_the_time_limit_stops_and_queues_again_and_scancel_ends(
    tmp_path: Path, sent: signal.Signals, ends: list[str], queued: bool
) -> None:
    job = started(tmp_path, "run.yaml", LONG="yes")
    wait_for(tmp_path, "keel train")
    job.send_signal(sent)
    assert job.wait(timeout=60) == 130
    assert [call for call in calls(tmp_path) if call in ("stopped", "ended")] == ends
    assert ("scontrol requeue 123456" in calls(tmp_path)) == queued


def test_a_step_that_takes_too_long_is_ended_before_the_limit_and_queued_again(tmp_path: Path) -> None:
    job = started(tmp_path, "run.yaml", LONG="yes", DEAF="yes", SLEEP_SECONDS="1")
    wait_for(tmp_path, "keel train")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 130
    ends = [call for call in calls(tmp_path) if call in ("stopped", "ended", "scontrol requeue 123456")]
    assert ends == ["stopped", "ended", "scontrol requeue 123456"]


def test_the_limit_while_nodes_join_queues_again(tmp_path: Path) -> None:
    job = started(tmp_path, "run.yaml", NODES="2", SLEEP_SECONDS="0.2")
    wait_for(tmp_path, "python -c import ray")
    job.send_signal(signal.SIGUSR1)
    joined = tmp_path / "joined"
    joined.write_text("#!/bin/bash\necho 3\n")
    joined.chmod(0o755)
    joined.replace(tmp_path / "bin" / "python")
    assert job.wait(timeout=60) == 1
    assert "scontrol requeue 123456" in calls(tmp_path)
    assert not any(call.startswith("keel") for call in calls(tmp_path))


def test_nodes_that_do_not_join_end_the_job(tmp_path: Path) -> None:
    job = started(tmp_path, "run.yaml", NODES="2", SLEEP_SECONDS="0.01")
    assert job.wait(timeout=60) == 1
    assert job.stderr is not None and "2 of 3 nodes joined" in job.stderr.read()
    assert not any(call.startswith("keel") for call in calls(tmp_path))


def test_without_a_configuration_nothing_starts(tmp_path: Path) -> None:
    assert started(tmp_path).wait(timeout=60) == 2
    assert calls(tmp_path) == []


def test_the_directives_are_those_the_script_relies_on() -> None:
    lines = SCRIPT.read_text(encoding="utf8").splitlines()
    directives = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--signal=B:USR1@600", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= directives
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(index < first_command for index, line in enumerate(lines) if line.startswith("#SBATCH "))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    assert os.access(script, os.X_OK)
    command = [tools.path_of("shellcheck"), "--severity=warning", str(script)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout) == (0, "")
