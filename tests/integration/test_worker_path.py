"""Workers of Ray import installed modules whatever lies in the current directory, and the user's own from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
PROGRAM = """
import json, os, sys
here = os.getcwd()
assert here not in sys.path
import ray
from keel.cluster import actors
from keel.config import loader
from keel.rollout.scorers import RewardScorer

class Asked:
    def where(self):
        import numpy, pyarrow, yaml
        from keel import user_code
        function = user_code.import_symbol("my_own_rewards:judge", "rewards.mine.source")
        return [numpy.__file__, pyarrow.__file__, yaml.__file__], function([1]), sys.path.index(os.getcwd())

actors.connect(loader.load("config.yaml"))
print(json.dumps(ray.get(ray.remote(Asked).remote().where.remote())))
actors.disconnect()
"""


def test_nothing_in_the_current_directory_stands_in_for_an_installed_module(tmp_path: Path) -> None:
    for name in ("pyarrow", "numpy", "yaml", "ray", "torch", "json", "typing", "asyncio", "keel"):
        (tmp_path / f"{name}.py").write_text("import os; open('ran', 'a').write(__name__)\n")
    (tmp_path / "my_own_rewards.py").write_text("def judge(completions): return [2.0 for _ in completions]\n")
    (tmp_path / "config.yaml").write_text(
        "policy: {model: m}\nprompts: {source: p}\nrewards: [{name: mine, source: 'my_own_rewards:judge'}]\n"
        "cluster: {address: local, object_store_bytes: 134217728, cpus: 2}\n"
    )
    script = tmp_path.parent / f"{tmp_path.name}-program.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    modules, values, place = json.loads(done.stdout.splitlines()[-1])
    assert not any(Path(file).is_relative_to(tmp_path) for file in modules) and values == [2.0] and place > 0
    assert not (tmp_path / "ran").exists()
