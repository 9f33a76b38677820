"""An embedded Ray whose own agent comes up too late for its raylet, as on a machine that is busy, is tried again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import keel as package
from commands import RUN_SECONDS

pytestmark = pytest.mark.slow
LATE_ONCE = """
import os, time
from pathlib import Path

once = Path(os.environ["KEEL_TEST_LATE"])
if b"dashboard/agent.py" in Path("/proc/self/cmdline").read_bytes() and once.exists():
    once.unlink()
    time.sleep(17)  # its raylet waits 15
"""
START = """
import ray
from keel.cluster import actors

tries = actors.embedded(num_cpus=1, object_store_memory=2**27, log_to_driver=False, logging_level="ERROR")
print(tries, ray.get(ray.remote(lambda: "works").remote()))
"""


def test_an_agent_that_comes_too_late_costs_a_try(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE_ONCE)  # Python imports it at its start
    once = tmp_path / "once"
    once.touch()
    paths = os.pathsep.join([str(tmp_path), str(Path(package.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths, "KEEL_TEST_LATE": str(once)}
    done = subprocess.run(
        [sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=RUN_SECONDS
    )
    assert done.returncode == 0, done.stderr
    tries, answer = done.stdout.split()
    assert (int(tries) >= 2, answer) == (True, "works") and not once.exists()  # more: the machine is busy indeed
