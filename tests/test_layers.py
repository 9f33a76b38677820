"""Imports go one way, heavy libraries stay behind one file, files stay small."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "system" / "keel"
LAYERS = [
    ["printable", "protocols", "schema", "section", "reward_settings", "regulariser_settings", "objective_settings"]
    + ["prompt_settings", "actor_settings", "metrics_settings", "tracking_settings", "settings", "course_settings"]
    + ["stage_settings", "pipeline_settings", "config", "extension", "reads", "durable"],
    [
        "algorithms",
        *(
            f"algorithms.{name}"
            for name in ("credit", "shaping", "advantages", "regularisers", "coefficients", "critics")
        ),
    ]
    + [f"algorithms.{name}" for name in ("objective", "elicitation", "policy_gradient", "preferences", "weighting")]
    + ["algorithms.convexity", "algorithms.kinds"],
    [
        "commits",
        "checkpoint",
        "model_files",
        "chat_text",
        "model_text",
        "end_tokens",
        "row_columns",
        "conversations",
        "layouts",
        "sources",
        "stored",
        "prompts",
        "segments",
        "ledger",
        "buffer",
        "layer_patterns",
        "size_names",
        "twin_sizes",
        "twins",
        "batch",
        "attention_masks",
        "states_to_logits",
        "networks",
        "models",
        "anchors",
    ]
    + [
        "examples",
        "tasks",
        "tiny",
        "diagnostics",
        "metric_table",
        "queries",
        "panels",
        "grafana",
        "run_dashboard",
        "dashboards",
        "metrics",
        "trackers",
        "tracking",
        "endpoint",
        "occupancy",
        "explain",
        "virtual_time",
        "simulation",
        "references",
        "quiet",
        "reward_text",
        "reward_models",
        "forward_contract",
        "score_contract",
    ],
    [
        "weights",
        "generate",
        "http_rewards",
        "reward_functions",
        "score",
        "export",
        "optimisation",
        "shards",
        "learner_state",
        "engine",
        "learn",
        "learn_reward",
        "reward_report",
    ],
    ["evaluate", "win_rates", "arms", "frontier_picture", "compare", "labels", "evaluation_report"]
    + [
        "capacity",
        "text_checks",
        "preflight",
        "parts",
        "failures",
        "parity",
        "controller",
        "audit",
        "evaluation_audit",
        "verify",
    ]
    + ["rates", "measurement", "plan", "splits", "footprint"],
    [
        "losses",
        "room",
        "meeting",
        "worker",
        "pool",
        "control",
        "cluster",
        "gang",
        "scaling",
        "recorder",
        "train",
        "replay",
        "terminal",
        "progress",
        "summary",
    ]
    + ["doctor", "calibration"],
    ["stages", *(f"stages.{name}" for name in ("course", "rows", "sampled", "reference_logprobs", "likelihood"))]
    + [f"stages.{name}" for name in ("reward", "label", "evaluate", "pipeline")],
    ["kubernetes_plan", "kubernetes_pods", "kubernetes", "kubernetes_commands", "deploy_commands"]
    + [
        "bundle",
        "standing",
        "stopping",
        "job_server",
        "jobs",
        "operations",
        "plan_commands",
        "job_commands",
        "cli",
        "__main__",
    ],
]
ORDER = [name for layer in LAYERS for name in layer]
HEAVY = {
    "ray": {"losses", "room", "meeting", "worker", "pool", "cluster", "gang", "control", "job_server", "jobs"},
    "vllm": {"generate", "weights"},
    "deepspeed": {"engine"},
    "prometheus_client": {"metrics"},
    "wandb": {"trackers"},
    "mlflow": {"trackers"},
    "trackio": {"trackers"},
}


def files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


@functools.cache
def modules() -> dict[str, ast.Module]:
    paths = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: ast.parse(path.read_text(encoding="utf8")) for path, name in names.items()}


def imports(tree: ast.Module) -> set[str]:
    """Full names of all modules and names imported anywhere in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_place() -> None:
    assert sorted(modules()) == sorted(ORDER)
    assert imports(ast.parse((ROOT / "__init__.py").read_text(encoding="utf8"))) == set()  # runs before all of them


def test_imports_say_where_from() -> None:
    """What the next tests look for: no relative import, no module loaded by a name put together at run time."""
    for name, tree in modules().items():
        assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), name
        assert "__import__" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}, name


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_rows_above_it(name: str) -> None:
    own = {full.removeprefix("keel.") for full in imports(modules()[name]) if full.startswith("keel.")}
    used = own & set(ORDER)
    assert all(ORDER.index(other) < ORDER.index(name) for other in used), used


@pytest.mark.parametrize("library", list(HEAVY))
def test_heavy_libraries_stay_behind_their_file(library: str) -> None:
    users = {name for name, tree in modules().items() if library in {full.split(".")[0] for full in imports(tree)}}
    assert users == HEAVY[library]


def test_files_are_small_and_named_after_something() -> None:
    sizes = {name: len((ROOT / name).read_text(encoding="utf8").splitlines()) for name in files()}
    assert {name: size for name, size in sizes.items() if size > 300} == {}
    words = {word for name in sizes for part in Path(name).with_suffix("").parts for word in part.split("_")}
    assert not {"utils", "util", "manager", "data", "info", "helpers", "misc", "common"} & words


def test_no_except_without_a_name() -> None:
    for name, tree in modules().items():
        handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
        assert all(handler.type is not None for handler in handlers), name


@pytest.mark.parametrize("name", ["score", "buffer", "control"])
def test_actors_that_compute_nothing_start_without_torch(name: str) -> None:
    """Two seconds of processor time and 190 MB of a scorer whose rewards are functions."""
    code = f"import sys, keel.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
