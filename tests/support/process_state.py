"""What a test can change in its process, read name by name, and how to put it back. `leaks.py` compares."""

import _signal
import asyncio
import decimal
import gc
import locale
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

Group = dict[Any, Any]
State = dict[str, Group]

TESTS = Path(__file__).parents[1]
HOMES = (str(TESTS.parent), sys.prefix, sys.base_prefix, *(str(Path(item).absolute()) for item in sys.path if item))
"""Where modules come from that any test may import: this repository, the environment, PYTHONPATH."""
NEW_LOGGER = (logging.NOTSET, True, False, (), ())
"""Level, propagation, whether it is disabled, filters, handlers."""
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Processes that Python itself starts once and keeps."""


def snapshot() -> State:
    """All of it, by group. Torch, numpy, Ray and Keel only where they are imported: nothing is imported for this."""
    return {name: read() for name, read in GROUPS.items()}


def restore(before: State) -> None:
    """Put back what can be put back from outside."""
    for name in environment().keys() - before["environment"].keys():
        del os.environ[name]
    os.environ.update(before["environment"])
    for name in sys.modules.keys() - before["module"].keys():
        if made_by_a_test(name):
            del sys.modules[name]
    for name in ("excepthook", "displayhook", "stdin", "stdout", "stderr", "argv"):
        setattr(sys, name, before["sys"][name])
    old = before["sys"]["path"]
    sys.path[:] = old + [item for item in sys.path if item not in old and item.startswith(sys.prefix)]  # of libraries
    for number in signal.Signals:
        if before["signal"].get(number.name) not in (None, signal.getsignal(number)):
            signal.signal(number, before["signal"][number.name])
    logging.setLogRecordFactory(before["logging"]["record factory"])
    for name, logger in every_logger():
        shape = before["logger"].get(name, NEW_LOGGER)
        logger.level, logger.propagate, logger.disabled, filters, handlers = shape
        kept = [handler for handler in logger.handlers if of_pytest(handler) and name != "root"]
        logger.filters, logger.handlers = list(filters), [handler for handler, *_ in handlers] + kept
        for handler, handler.level, handler.formatter, of_handler in handlers:
            handler.filters = list(of_handler)
        logger.manager._clear_cache()
    warnings.filters[:] = [item for item in before["warning filter"] if item != "showwarning"]
    warnings.showwarning = before["warning filter"]["showwarning"]
    warnings._filters_mutated()  # type: ignore[attr-defined]
    os.chdir(before["process"]["working directory"])


def made_by_a_test(name: str) -> bool:
    """Whether a module is from a test's folder or was put there by hand: another test would find it under its name."""
    module = sys.modules.get(name)
    if not isinstance(module, ModuleType):
        return True
    if getattr(module, "__spec__", None) is None:
        return type(module) is ModuleType and not name.startswith(("_cython_", "cython_"))  # of compiled modules
    return not file_of(module).startswith(HOMES)


def file_of(module: Any) -> str:
    return str(getattr(module, "__file__", None) or HOMES[0])


def environment() -> Group:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def process() -> Group:
    status = Path("/proc/self/status").read_text()
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    return {
        "working directory": os.getcwd(),
        "umask": status.partition("Umask:")[2].split()[0],
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "cores": frozenset(os.sched_getaffinity(0)),
        "locale": locale.setlocale(locale.LC_ALL),
        "time zone": time.tzname,
        "temporary directory": tempfile.gettempdir(),
        "socket timeout": socket.getdefaulttimeout(),
        "multiprocessing start method": multiprocessing.get_start_method(allow_none=True)
        or multiprocessing.get_all_start_methods()[0],
        "event loop policy": type(asyncio.events._event_loop_policy or asyncio.DefaultEventLoopPolicy()),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "decimal context": repr(decimal.getcontext()).partition(", flags=")[0],
        **limits,
    }


def signals() -> Group:
    handlers = {number.name: _signal.getsignal(number) for number in signal.Signals}
    return {**handlers, "mask": frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, []))}


def interpreter() -> Group:
    import builtins

    hooks = ("excepthook", "displayhook", "unraisablehook", "stdin", "stdout", "stderr", "dont_write_bytecode")
    return {
        **{name: getattr(sys, name) for name in hooks},
        **{f"builtin {name}": getattr(builtins, name) for name in ("__import__", "open", "print", "input", "exit")},
        "argv": list(sys.argv),
        "path": list(sys.path),
        "meta_path": list(sys.meta_path),
        "path_hooks": list(sys.path_hooks),
        "recursion limit": sys.getrecursionlimit(),
        "switch interval": sys.getswitchinterval(),
        "int digits": sys.get_int_max_str_digits(),
        "trace": sys.gettrace(),
        "threading excepthook": threading.excepthook,
    }


def logs() -> Group:
    return {
        "record factory": logging.getLogRecordFactory(),
        "logger class": logging.getLoggerClass(),
        "disabled up to": logging.root.manager.disable,
        "raise exceptions": logging.raiseExceptions,
        "last resort": logging.lastResort,
        "level names": dict(logging._nameToLevel),
        "captured warnings": logging._warnings_showwarning is not None,
    }


def every_logger() -> Iterator[tuple[str, logging.Logger]]:
    yield "root", logging.root
    yield from (
        (n, item) for n, item in list(logging.root.manager.loggerDict.items()) if isinstance(item, logging.Logger)
    )


def of_pytest(handler: logging.Handler) -> bool:
    """Those that pytest hangs onto the root and, for each part of a test, onto loggers that do not propagate."""
    return type(handler).__module__.startswith("_pytest.")


def loggers() -> Group:
    """Those that are not as `getLogger` makes them: level, propagation, filters; level and format of each handler."""
    return {name: shape for name, logger in every_logger() if (shape := shape_of(name, logger)) != NEW_LOGGER}


def shape_of(name: str, logger: logging.Logger) -> tuple[Any, ...]:
    handlers = [handler for handler in logger.handlers if name == "root" or not of_pytest(handler)]
    shapes = tuple((handler, handler.level, handler.formatter, tuple(handler.filters)) for handler in handlers)
    return logger.level, logger.propagate, logger.disabled, tuple(logger.filters), shapes


def warning_filters() -> Group:
    return {**dict.fromkeys(warnings.filters, True), "showwarning": warnings.showwarning}


def threads() -> Group:
    """Those that would keep the process alive."""
    return {f"{item.name} ({item.ident})": True for item in threading.enumerate() if not item.daemon}


def children() -> Group:
    """Processes of this one that run."""
    try:
        os.waitid(
            os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT
        )  # looks, and takes none from those that wait for them
    except ChildProcessError:  # there is none
        return {}
    commands = {}
    for process in psutil.Process().children():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:  # it ended just now, or nothing has waited for it yet
            continue
        if command and not any(helper in command for helper in HELPERS):
            commands[f"{process.pid} {command[:120]}"] = True
    return commands


def torch() -> Group:
    module = sys.modules.get("torch")
    if module is None or not hasattr(module, "get_num_threads"):
        return {}
    return {
        "threads": module.get_num_threads(),
        "threads between operations": module.get_num_interop_threads(),
        "default dtype": str(module.get_default_dtype()),
        "default device": str(module.get_default_device()),
        "gradients": module.is_grad_enabled(),
        "inference mode": module.is_inference_mode_enabled(),
        "autocast": (module.is_autocast_enabled("cpu"), str(module.get_autocast_dtype("cpu"))),
        "anomaly detection": module.is_anomaly_enabled(),
        "deterministic algorithms": module.get_deterministic_debug_mode(),
        "matmul precision": module.get_float32_matmul_precision(),
        "cudnn": (module.backends.cudnn.deterministic, module.backends.cudnn.benchmark, module.backends.cudnn.enabled),
        "attention kernels": (
            module.backends.cuda.flash_sdp_enabled(),
            module.backends.cuda.mem_efficient_sdp_enabled(),
            module.backends.cuda.math_sdp_enabled(),
        ),
        "mkldnn": module.backends.mkldnn.enabled,
        "print options": repr(module._tensor_str.PRINT_OPTS),
        "process group": module.distributed.is_initialized(),
    }


def numpy() -> Group:
    module = sys.modules.get("numpy")
    if module is None or not hasattr(module, "geterr"):
        return {}
    return {"errors": module.geterr(), "error call": module.geterrcall(), "print options": module.get_printoptions()}


def ray() -> Group:
    module = sys.modules.get("ray")
    if module is None or not hasattr(module, "is_initialized"):
        return {}
    by_value = module.cloudpickle.list_registry_pickle_by_value()
    return {"initialized": module.is_initialized(), "pickled by value": set(by_value)}


class Names(str):
    """What holds names of its own: a module or a class."""


_parts: dict[str, tuple[int, list[tuple[Names, type]], list[str]]] = {}


def parts_of(name: str, module: ModuleType) -> tuple[list[tuple[Names, type]], list[str]]:
    """A module's own classes, and the names of its tables. Looked for again only where it has more names than it had."""
    known = _parts.get(name)
    if known is None or known[0] != len(vars(module)):
        values = list(vars(module).items())
        classes = [(Names(f"{name}.{n}"), v) for n, v in values if isinstance(v, type) and v.__module__ == name]
        tables = [n for n, v in values if isinstance(v, (dict, list, set)) and not n.startswith("__")]
        known = _parts[name] = (len(values), classes, tables)
    return known[1:]


def keel() -> Group:
    """What every name of Keel's modules and classes stands for: a fake that was put there and stayed is another one."""
    values: Group = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("keel") and isinstance(module, ModuleType):
            classes, tables = parts_of(name, module)
            held = values[Names(name)] = dict(vars(module))
            held.update({table: held[table].copy() for table in tables})
            values.update({known: dict(vars(item)) for known, item in classes})
    return values


GROUPS: dict[str, Callable[[], Group]] = {
    "environment": environment,
    "process": process,
    "signal": signals,
    "sys": interpreter,
    "module": sys.modules.copy,
    "logging": logs,
    "logger": loggers,
    "known logger": lambda: {name: True for name, _ in every_logger()},
    "warning filter": warning_filters,
    "thread": threads,
    "child process": children,
    "torch": torch,
    "numpy": numpy,
    "Ray": ray,
    "Keel": keel,
}
