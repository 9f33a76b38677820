"""What a test left changed in its process: two readings of `process_state.py`, compared name by name.

A test that leaves something changed makes another one pass or fail by the order they run in. `conftest.py` looks after
every test, every module, the session, and the import of every test file.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

from process_state import Group, Names, State, file_of, made_by_a_test, snapshot

PLAIN = (str, bytes, int, float, bool, tuple, list, dict, set, frozenset, type(None), MethodType)
ENDING = ("thread ", "child process ")
ENDS_WITHIN_SECONDS = 60.0
"""A thread or process that was told to end may take this long: Ray's do, on a busy machine."""
OF_PYTHON = (".__warningregistry__",)
"""Names that Python itself puts into a module."""
OF_LIBRARIES = {
    "ray": {"environment RAY_CLIENT_MODE", "sys path", "sys excepthook", "logging record factory"},
    "deepspeed": {"environment PYTORCH_NVML_BASED_CUDA_CHECK"},
    "torch._inductor": {"environment TORCHINDUCTOR_CACHE_DIR"},
    "vllm": {
        "environment TORCHINDUCTOR_COMPILE_THREADS",
        "environment TRITON_CACHE_AUTOTUNING",
        "environment TILELANG_CLEANUP_TEMP_FILES",
        "environment LD_LIBRARY_PATH",
        "sys path",
    },
    "ray.autoscaler._private.local.node_provider": {"logger filelock"},
    "keel.rollout.http_rewards": {"logger httpx", "logger httpcore"},
}
"""What a library changes when it is first imported, and needs for as long as the process has it: nothing to put back."""


LARGE = {"ray", "torch", "transformers", "deepspeed", "vllm", "datasets", "triton", "cv2", "mlflow", "wandb"}
"""Libraries that import parts of themselves when these are first needed, in the middle of any test."""
BY_LARGE = ("environment", "logger", "logging", "warning filter", "sys")
"""What those parts set up for the whole process, once: levels, handlers, formats, variables, hooks."""


def differences(before: State, after: State) -> dict[str, str]:
    """A line for every name whose value is another one now."""
    if all(same(before[group], values) for group, values in after.items()):
        return {}
    libraries = {name for name in after["module"].keys() - before["module"].keys() if not made_by_a_test(name)}
    allowed = set().union(*(OF_LIBRARIES.get(library, set()) for library in libraries))
    large = any(library.partition(".")[0] in LARGE for library in libraries)
    lines = {}
    for group, values in after.items():
        for name, old, new in changes(before[group], values):
            came = large and (group in BY_LARGE or name == "multiprocessing start method")
            if f"{group} {name}" in allowed or came:
                continue
            if not arrived(group, name, old, new, before, libraries):
                lines[f"{group} {name}"] = f"{group} {name}: {shown(old)} -> {shown(new)}"
    return lines


def changes(old_values: Group, values: Group) -> Iterator[tuple[Any, Any, Any]]:
    for name in [*values, *(name for name in old_values if name not in values)]:
        old, new = old_values.get(name, ABSENT), values.get(name, ABSENT)
        if not same(old, new):
            if isinstance(name, Names) and ABSENT not in (old, new):
                yield from ((f"{name}.{inner}", *two) for inner, *two in changes(old, new))
            else:
                yield name, old, new


def left_behind(before: State) -> dict[str, str]:
    """What is not as it was, once what was told to end has had its time to."""
    deadline = time.monotonic() + ENDS_WITHIN_SECONDS
    left = differences(before, snapshot())
    while left and time.monotonic() < deadline and all(name.startswith(ENDING) for name in left):
        time.sleep(0.05)
        left = differences(before, snapshot())
    return left


def left_behind_by_import(before: State, file: Path) -> dict[str, str]:
    """The same for the import of a test file, whose folder pytest itself puts on the path."""
    after = snapshot()
    path = before["sys"]["path"]
    before["sys"]["path"] = [item for item in after["sys"]["path"] if item in path or item == str(file.parent)]
    before["module"].update({name: item for name, item in after["module"].items() if file_of(item) == str(file)})
    return differences(before, after)


class Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


def same(one: Any, other: Any) -> bool:
    """Identical, or equal where equality is cheap and means the same."""
    try:
        return one is other or (type(one) is type(other) and isinstance(one, PLAIN) and bool(one == other))
    except (ValueError, RuntimeError):  # arrays in it, which say for each element whether it is equal
        return False


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def arrived(group: str, name: Any, old: Any, new: Any, before: State, libraries: set[str]) -> bool:
    """Whether something that was not there came with an import, or ended by itself."""
    if group == "module":  # transformers puts other aliases for its parts in place while it is used
        if "." in name and not name.startswith("keel."):
            return True
        return not made_by_a_test(name) and (old is ABSENT or file_of(old) == file_of(new))
    if group == "logger":
        return old is ABSENT and bool(libraries) and name not in before["known logger"]
    if group in ("known logger", "warning filter"):
        return old is ABSENT and (group == "known logger" or bool(libraries))
    if group in ("thread", "child process"):
        return old is not ABSENT  # the end of something
    if group == "Keel":
        return old is ABSENT and (isinstance(name, Names) or isinstance(new, ModuleType) or name.endswith(OF_PYTHON))
    if (group, name) == ("signal", "SIGALRM"):  # pytest-timeout looks no longer at a test that failed
        return new == signal.SIG_DFL
    if (group, name) == ("sys", "meta_path"):  # libraries put finders for their own parts there
        return bool(libraries) and not any(
            made_by_a_test(type(finder).__module__) for finder in new if finder not in old
        )
    if group in ("torch", "numpy", "Ray"):
        return old is ABSENT and not (group == "Ray" and new is True)
    return False
