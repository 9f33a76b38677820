"""Numbers of finished runs, as small Parquet files that results.py reads.

    python benchmarks/maxent/collect.py SWEEP_DIRECTORY ... [--offline NAME=EVALUATION.arrow ...] [--add] --output DIR

    directories of `keel sweep`:  ARM/seed-N/ -> config.yaml, frontier.arrow, evaluations/, metrics.jsonl, events.jsonl
    `keel evaluate`:              evaluation.arrow, the sampled answers of the policy; the n-th file of a name is seed n
    ->  runs.parquet              a row a run: what of its settings the results depend on, and whether it is finished
        evaluations.parquet       a row a held-out completion of an evaluation
        steps.parquet             a row a training step
        guard_events.parquet      a row a firing of a detector

A run that is not finished is named and has a row in runs.parquet alone. All runs belong to one experiment: they were
evaluated on the same held-out prompts, and no arm has a seed twice at one learning rate. With `--add` the runs that the
files of DIR hold stay, but for those that are collected anew.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from keel import checkpoint, files, schema
from keel.analysis import compared_runs
from keel.config import loader
from keel.errors import ConfigError, KeelError
from keel.observability import evaluations
from keel.observability.diagnostics import per_completion

KEY = {"sweep": pa.string(), "arm": pa.string(), "learning_rate": pa.float64(), "seed": pa.int32()}
RUNS = pa.schema(
    KEY
    | {
        "offline": pa.bool_(),
        "finished": pa.bool_(),
        "planned_steps": pa.int32(),
        "kl_coefficient": pa.float64(),
        "entropy_form": pa.string(),
        "entropy_coefficient": pa.float64(),
        "max_tokens": pa.int32(),
        "vocabulary": pa.int32(),
    }
)
MEASURED = {
    "proxy": "reward",
    "gold": "reward_gold",
    "sentiment": "reward_sentiment",
    "relevance": "reward_relevance",
    "fluency": "reward_fluency",
    "kl_nats": "kl_nats",
    "entropy": "entropy_nats",
    "length_tokens": "length_tokens",
    "ended": "finished_ratio",
}
"""Column of evaluations.parquet: its name among Keel's values of a completion."""
EVALUATIONS = pa.schema(KEY | {"step": pa.int32(), "prompt_id": pa.int64()} | {name: pa.float32() for name in MEASURED})
OF_A_STEP = ("reward", "kl_nats", "entropy_nats", "length_tokens", "grad_norm")
STEPS = pa.schema(
    KEY | {"step": pa.int32()} | {name: pa.float32() for name in OF_A_STEP} | {"guard_firings": pa.int32()}
)
GUARD_EVENTS = pa.schema(KEY | {"step": pa.int32(), "detector": pa.string(), "actions": pa.string()})
SCHEMAS = {"runs": RUNS, "evaluations": EVALUATIONS, "steps": STEPS, "guard_events": GUARD_EVENTS}

Rows = dict[str, list[dict[str, Any]]]
Prompts = set[tuple[int, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP_DIRECTORY")
    parser.add_argument("--offline", nargs="*", default=[], metavar="NAME=EVALUATION.arrow")
    parser.add_argument("--add", action="store_true", help="keep the runs that DIR holds")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    try:
        rows = collect(arguments.sweeps, arguments.offline)
        if arguments.add:
            rows = with_recorded(rows, arguments.output)
    except KeelError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    write(rows, arguments.output)
    done = sum(run["finished"] for run in rows["runs"])
    print(f"{done} of {len(rows['runs'])} runs are finished: {arguments.output}")


def collect(sweeps: Sequence[Path], offline: Sequence[str] = ()) -> Rows:
    """Rows of every table. Raises ConfigError, one line, for runs that are no one experiment."""
    rows: Rows = {name: [] for name in SCHEMAS}
    known: Prompts = set()
    for sweep in sweeps:
        directories = sorted(path.parent for path in sweep.glob("*/seed-*/config.yaml"))
        if not directories:
            raise ConfigError(f"sweep {sweep}: no run in it; expected ARM/seed-N/config.yaml of `keel sweep`")
        for directory in directories:
            known = add_run(rows, sweep.resolve().name, directory, known)
    seeds: Counter[str] = Counter()
    for argument in offline:
        name, _, path = argument.partition("=")
        if not path:
            raise ConfigError(f"--offline {argument}: expected NAME=EVALUATION.arrow")
        known = add_offline(rows, name, seeds[name], Path(path), known)
        seeds[name] += 1
    check_unique(rows["runs"])
    return rows


def add_run(rows: Rows, sweep: str, directory: Path, known: Prompts) -> Prompts:
    """Add what a run directory holds; the held-out prompts, which later runs must share."""
    settings = yaml.safe_load(loader.stored_config(directory, f"run {directory}").read_text(encoding="utf8"))
    key = {
        "sweep": sweep,
        "arm": arm_of(directory.parent.name),
        "learning_rate": settings["learners"]["learning_rate"],
        "seed": settings["run"]["seed"],
    }
    entropy, planned = settings["regularizer"]["entropy"], settings["run"]["steps"]
    finished = is_finished(directory, planned)
    rows["runs"].append(
        key
        | {
            "offline": False,
            "finished": finished,
            "planned_steps": planned,
            "kl_coefficient": settings["regularizer"]["kl"]["coefficient"],
            "entropy_form": entropy["form"],
            "entropy_coefficient": entropy["coefficient"],
            "max_tokens": settings["sampling"]["max_tokens"],
            "vocabulary": vocabulary(directory),
        }
    )
    if not finished:
        print(f"not finished, left out: {directory}", file=sys.stderr)
        return known
    run = compared_runs.load(directory)
    known = shared(set(run.prompts), known, directory)
    for evaluation in run.evaluations:
        add_completions(rows, key | {"step": evaluation.step}, evaluations.load(directory, evaluation.step))
    events = [event for event in files.read_json_lines(directory / "events.jsonl") if event["event"] == "guard"]
    firings = Counter(event["step"] for event in events)
    for line in files.read_json_lines(directory / "metrics.jsonl"):
        numbers = {name: line.get(name) for name in OF_A_STEP}
        rows["steps"].append(key | {"step": line["step"], "guard_firings": firings[line["step"]]} | numbers)
    for event in events:
        firing = {"step": event["step"], "detector": event["detector"], "actions": json.dumps(event["actions"])}
        rows["guard_events"].append(key | firing)
    return known


def arm_of(folder: str) -> str:
    """The arm without what the grid of a sweep puts behind its name."""
    return re.sub(r"-learning_rate-\d+(\.\d+)?(e[-+]?\d+)?", "", folder)


def is_finished(directory: Path, planned: int) -> bool:
    """Whether the run was evaluated at its last step, or its guard or objective ended it before."""
    if any(row["step"] >= planned for row in evaluations.frontier(directory)):
        return True
    step = max(checkpoint.steps(directory), default=0)
    return step > 0 and bool(checkpoint.state_of(directory, step).get("finished"))


def vocabulary(directory: Path) -> int | None:
    """Ids of the policy's vocabulary, of the newest checkpoint; None where none is kept."""
    steps = checkpoint.steps(directory)
    if not steps:
        return None
    config = checkpoint.folder_of(directory, max(steps)) / "policy" / "config.json"
    return int(json.loads(config.read_text(encoding="utf8"))["vocab_size"])


def add_offline(rows: Rows, arm: str, seed: int, path: Path, known: Prompts) -> Prompts:
    """Add the sampled answers of an offline policy from an evaluation.arrow; the held-out prompts."""
    try:
        batch = schema.from_bytes(path.read_bytes())
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(
            f"--offline {arm}={path}: {error}; expected the evaluation.arrow of `keel evaluate`"
        ) from None
    pairs = zip(batch.column("model").to_pylist(), batch.column("decoding").to_pylist(), strict=True)
    batch = batch.filter(pa.array([pair == ("policy", "sampled") for pair in pairs]))
    prompts = set(zip(batch.column("prompt_id").to_pylist(), batch.column("prompt").to_pylist(), strict=True))
    known = shared(prompts, known, path)
    key = {"sweep": "offline", "arm": arm, "learning_rate": None, "seed": seed}
    rows["runs"].append(key | {"offline": True, "finished": True})
    add_completions(rows, key | {"step": 0}, batch)
    return known


def add_completions(rows: Rows, key: dict[str, Any], batch: pa.RecordBatch) -> None:
    values = per_completion(batch)
    columns = {name: values[source].tolist() for name, source in MEASURED.items() if source in values}
    for number, prompt_id in enumerate(batch.column("prompt_id").to_pylist()):
        numbers = {name: column[number] for name, column in columns.items()}
        rows["evaluations"].append(key | {"prompt_id": prompt_id} | numbers)


def shared(prompts: Prompts, known: Prompts, path: Path) -> Prompts:
    """The held-out prompts of all runs. Raises ConfigError where a run has others."""
    if known and prompts != known:
        both = len(prompts & known)
        raise ConfigError(f"{path}: {both} of its {len(prompts)} held-out prompts are those of the other runs")
    return prompts


def check_unique(runs: Iterable[dict[str, Any]]) -> None:
    """Raise ConfigError where an arm has a seed twice at one learning rate: no second seed, but the first again."""
    counts = Counter((run["arm"], run["learning_rate"], run["seed"]) for run in runs)
    for (arm, learning_rate, seed), count in counts.items():
        if count > 1:
            raise ConfigError(f"arm {arm}: seed {seed} at learning rate {learning_rate} {count} times; expected once")


def with_recorded(rows: Rows, folder: Path) -> Rows:
    """Rows of the tables in a folder, and these in place of its rows of the same run; an unfinished run replaces none.

    Raises ConfigError where the folder's runs were evaluated on prompts of other ids.
    """
    recorded: Rows = {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in SCHEMAS}
    ids, known = ({row["prompt_id"] for row in table["evaluations"]} for table in (rows, recorded))
    if ids and ids != known:
        raise ConfigError(
            f"--output {folder}: its runs were evaluated on other held-out prompts; expected another folder"
        )
    there = {key_of(run) for run in recorded["runs"] if run["finished"]}
    new = {key_of(run) for run in rows["runs"] if run["finished"] or key_of(run) not in there}
    result = {
        name: [row for row in recorded[name] if key_of(row) not in new]
        + [row for row in rows[name] if key_of(row) in new]
        for name in SCHEMAS
    }
    check_unique(result["runs"])
    return result


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What names a run."""
    return tuple(row[name] for name in KEY)


def write(rows: Rows, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table_schema in SCHEMAS.items():
        table = pa.Table.from_pylist(rows[name], schema=table_schema)
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd", compression_level=19)


if __name__ == "__main__":
    main()
