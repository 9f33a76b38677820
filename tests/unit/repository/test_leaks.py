"""A test that leaves its process changed fails and says what; one that puts everything back does not."""

import os
import re
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

HERE = Path(__file__).parents[2]
LEAKS = {
    "import os; os.environ['LEFT'] = '1'": "environment LEFT: absent -> '1'",
    "import os; del os.environ['HOME']": "environment HOME: ",
    "import os; os.chdir('/')": "process working directory: ",
    "import os; os.umask(0o77)": "process umask: '0022' -> '0077'",
    "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))": "process RLIMIT_CORE: ",
    "import locale; locale.setlocale(locale.LC_ALL, 'C.UTF-8')": "process locale: ",
    "import os, time; os.environ['TZ'] = 'Asia/Tokyo'; time.tzset()": "process time zone: ",
    "import asyncio; asyncio.set_event_loop_policy(type('Mine', (asyncio.DefaultEventLoopPolicy,), {})())": "process event loop policy: ",
    "import socket; socket.setdefaulttimeout(1)": "process socket timeout: None -> 1",
    "import gc; gc.disable()": "process garbage collection: ",
    "import decimal; decimal.getcontext().prec = 5": "process decimal context: ",
    "import signal; signal.signal(signal.SIGUSR1, signal.SIG_IGN)": "signal SIGUSR1: ",
    "import signal; signal.signal(signal.SIGTERM, lambda *_: None)": "signal SIGTERM: ",
    "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])": "signal mask: ",
    "import sys; sys.path.insert(0, '/nowhere')": "sys path: ",
    "import sys; sys.argv = ['keel']": "sys argv: ",
    "import sys; sys.setrecursionlimit(5000)": "sys recursion limit: ",
    "import builtins; builtins.input = print": "sys builtin input: ",
    "import sys, types; sys.modules['made_up'] = types.ModuleType('made_up')": "module made_up: absent -> ",
    "import sys; del sys.modules['json']": "module json: ",
    "import pathlib, sys; here = pathlib.Path(__file__).parents[1] / 'its'; here.mkdir(exist_ok=True); (here / 'mine.py').touch(); sys.path.insert(0, str(here)); import mine": "module mine: absent -> ",
    "import logging; logging.getLogger().setLevel('DEBUG')": "logger root: ",
    "import logging; logging.getLogger('mine').propagate = False": "logger mine: ",
    "import logging; logging.getLogger('mine').addHandler(logging.NullHandler())": "logger mine: ",
    "import logging; logging.getLogger('root_handler').root.handlers[0].setFormatter(logging.Formatter())": "logger root: ",
    "from ray._private import ray_logging; ray_logging.setup_logger('ERROR', '%(message)s')": "logger root: ",  # ray.init
    "import logging; logging.disable(logging.WARNING)": "logging disabled up to: 0 -> 30",
    "import logging; logging.setLogRecordFactory(lambda *a, **k: logging.LogRecord(*a, **k))": "logging record factory: ",
    "import logging; logging.captureWarnings(True)": "logging captured warnings: False -> True",
    "import warnings; warnings.simplefilter('ignore')": "warning filter ",
    "import threading, time; threading.Thread(target=time.sleep, args=(8,), name='endless').start()": "thread endless ",
    "import subprocess; subprocess.Popen(['sleep', '8'])": "child process ",
    "import numpy; numpy.seterr(all='ignore')": "numpy errors: ",
    "import numpy; numpy.set_printoptions(precision=2)": "numpy print options: ",
    "import torch; torch.set_default_dtype(torch.float64)": "torch default dtype: 'torch.float32' -> 'torch.float64'",
    "import torch; torch.set_grad_enabled(False)": "torch gradients: True -> False",
    "import torch; torch.use_deterministic_algorithms(True)": "torch deterministic algorithms: 0 -> 2",
    "import torch; torch.set_float32_matmul_precision('medium')": "torch matmul precision: ",
    "import torch; torch.autograd.set_detect_anomaly(True)": "torch anomaly detection: False -> True",
    "from keel.cluster import placement; placement.FIRST_REPORT_SECONDS = 0.0": "Keel keel.cluster.placement.FIRST_REPORT_SECONDS: ",
    "from keel import schema; schema.from_bytes = None": "Keel keel.schema.from_bytes: ",
    "from keel.cluster.worker import Spawn; Spawn.__repr__ = lambda self: ''": "Keel keel.cluster.worker.Spawn.__repr__: ",
    "from keel.algorithms import registry; registry.LEFT = {}": "Keel keel.algorithms.registry.LEFT: ",
}  # fmt: skip
"""What a test does, and the beginning of the line that names it."""
HEAD = "import keel.algorithms.registry, keel.cluster.placement, keel.schema, keel.cluster.worker, numpy, ray, torch\nimport pytest\n"


def outcome(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, code: str) -> pytest.RunResult:
    """Of a test file under this conftest.py, in a process of its own."""
    monkeypatch.setenv("LC_ALL", "C")
    pytester.makeconftest((HERE / "conftest.py").read_text() + "\nleaks.ENDS_WITHIN_SECONDS = 1.0\n")
    pytester.makepyfile(test_it=code)
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\nmarkers = ['slow', 'exhaustive', 'integration']\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
    return pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")


def test_each_leak_is_named(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = [f"def test_{place}():\n    {code}\n" for place, code in enumerate(LEAKS)]
    result = outcome(pytester, monkeypatch, HEAD + "\n\n".join(tests))
    printed = result.stdout.str()
    result.assert_outcomes(passed=len(LEAKS), errors=len(LEAKS))
    parts = re.split(r"_+ ERROR at teardown of test_(\d+) _+\n", printed)
    told = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    missing = [line for place, line in enumerate(LEAKS.values()) if f"\n{line}" not in told[place]]
    assert missing == [] and "the test left the process changed" in printed


@pytest.mark.parametrize("scope", ["module", "session"])
def test_what_a_larger_fixture_leaves_is_named(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    fixture = f"@pytest.fixture(scope='{scope}', autouse=True)\ndef large():\n    import os; os.environ['LEFT'] = '1'\n"
    result = outcome(
        pytester, monkeypatch, f"import pytest\n\n{fixture}\n\ndef test_one(): ...\n\ndef test_two(): ...\n"
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*a fixture of *test_it.py* left*" if scope == "module" else "*of the session left*"])
    assert "\nenvironment LEFT: absent -> '1'\n" in result.stdout.str()


def test_what_an_import_leaves_is_named(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    result = outcome(
        pytester, monkeypatch, "import signal\nsignal.signal(signal.SIGUSR1, print)\n\ndef test_one(): ...\n"
    )
    result.assert_outcomes(errors=1)
    assert "importing test_it.py left the process changed:\nsignal SIGUSR1: " in result.stdout.str()


def test_what_is_put_back_is_no_leak(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """By monkeypatch, by `restored_process`, or because it only came with the import of a library."""
    lasting = ("umask", "setrlimit", "locale", "tzset", "policy", "socket", "gc.", "decimal", "sigmask", "recursion",
               "builtin", "json", "disable", "capture", "Thread", "Popen", "numpy", "torch", "keel", "ray")  # fmt: skip
    undone = [code for code in LEAKS if not any(word in code for word in lasting)]
    assert len(undone) >= 12
    tests = [f"def test_{place}(restored_process):\n    {code}\n" for place, code in enumerate(undone)]
    tests.append("def test_patched(monkeypatch):\n    monkeypatch.setenv('LEFT', '1')\n    monkeypatch.chdir('/')\n")
    tests.append("def test_imported():\n    import ray, torch, transformers, datasets, deepspeed\n    assert ray\n")
    result = outcome(pytester, monkeypatch, "\n\n".join(tests))
    result.assert_outcomes(passed=len(tests))


MODULE = """
import process_state, pytest, ray
from ray._private import ray_logging

@pytest.fixture(scope="module", autouse=True)
def started(_module_leaves_no_trace):
    before = process_state.snapshot()
    ray_logging.setup_logger("ERROR", "%(message)s")  # as ray.init does
    yield
    process_state.restore(before)

def test_it(): assert not ray.is_initialized()
"""
AFTER = """
import logging

def test_format(caplog):
    logging.getLogger("some").warning("text")
    assert "some:" in caplog.text
"""


@pytest.mark.parametrize("restored", [True, False])
def test_a_module_that_starts_ray_leaves_the_next_one_its_log_format(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, restored: bool
) -> None:
    """Ray formats every handler of its logger again, also those that pytest has hung there for `caplog`."""
    pytester.makepyfile(test_next=AFTER)
    result = outcome(pytester, monkeypatch, MODULE if restored else MODULE.replace("process_state.restore(before)", ""))
    counts = {name: result.parseoutcomes().get(name, 0) for name in ("passed", "failed", "errors")}
    assert counts == ({"passed": 2, "failed": 0, "errors": 0} if restored else {"passed": 1, "failed": 1, "errors": 1})
