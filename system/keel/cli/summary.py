"""Print the result of a finished run: first against last evaluation, two answers before and after, next commands."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keel import checkpoint, files
from keel.analysis import frontier_plot, report_page
from keel.config.run import Settings
from keel.errors import KeelError, safe_line
from keel.observability import evaluations
from keel.observability.console import from_here
from keel.observability.diagnostics import Estimate, per_completion
from keel.text import one_line, printable

_UNITS = {
    "kl_nats": "KL to reference (nats)",
    "entropy_nats": "entropy (nats/token)",
    "length_tokens": "length (tokens)",
    "finished_ratio": "ended by itself (share)",
    "reward": "reward (training)",
}


def show(console: Console, directory: Path, settings: Settings, seconds: float, config_path: str) -> None:
    """Print the table, two completions before and after, the run's files and the next commands."""
    steps = [int(row["step"]) for row in evaluations.frontier(directory)]
    first, last = evaluations.load(directory, steps[0]), evaluations.load(directory, steps[-1])
    console.print(_table(first, last, steps[0], steps[-1], settings))
    for row in _telling_rows(first, last):
        console.print(_answer(first, last, row, steps[0], steps[-1]), soft_wrap=True)
    newest = checkpoint.latest(directory)
    _say(console, f"Run      {from_here(directory)}  (metrics.jsonl, rollouts/, evaluations/, frontier.arrow)")
    _say(console, f"Policy   {from_here(newest / 'policy') if newest else '-'}  (loads with from_pretrained and vLLM)")
    if best := checkpoint.best(directory):
        folder = best["folder"] and from_here(Path(best["folder"]))
        _say(console, "Best     " + checkpoint.best_line({**best, "folder": folder}))
    console.print(f"Time     {seconds:.0f} s in this process")
    _say(console, "Next     " + _next(directory, settings, config_path))


def draw_frontier(directory: Path, settings: Settings) -> str | None:
    """frontier.png of a run: training reward and gold against sqrt(KL); None for a run without KL."""
    rows = evaluations.frontier(directory)
    if settings.reference is None or len(rows) < 2:
        return None
    gold = "gold" if any(reward.name == "gold" for reward in settings.rewards) else None
    frontier_plot.draw({settings.run.name: rows}, directory / "frontier.png", "proxy", gold)
    return from_here(directory / "frontier.png")


def write_report(directory: Path) -> str:
    """Write report.html of a run; its path, or why there is none, which is an event too. Never raises an error."""
    try:
        report_page.write([directory], directory / "report.html")
    except Exception as error:  # the run has ended well: no fault of its page, whatever its class, may fail it
        reason = f"{type(error).__name__}: {safe_line(one_line(error))}"
        event = {"event": "report_failed", "time": time.time(), "reason": reason}
        try:
            files.append_json(directory / "events.jsonl", event)
        except (KeelError, OSError) as no_event:  # on the full disk, say, that has no room for the page either
            reason += f"; nor was the event report_failed: {type(no_event).__name__}: {safe_line(one_line(no_event))}"
        return f"not written: {reason}"
    return f"{from_here(directory / 'report.html')}  (curves, frontier, rollouts; open it in a browser)"


def show_stage(console: Console, directory: Path, done: Mapping[str, Any]) -> None:
    """Print what an offline stage did: held-out numbers before and after, rows left out, the model's folder."""
    first, last = done["evaluations"][0], done["evaluations"][-1]
    table = Table(title=f"{directory.name}: held-out rows")
    for name in ("", f"step {first['step']:.0f}", f"step {last['step']:.0f}"):
        table.add_column(name, justify="right" if name else "left")
    for name in [name for name in last if name != "step"]:
        table.add_row(name, *(f"{of[name]:.4f}" if name in of else "-" for of in (first, last)))
    console.print(table)
    _say(console, f"Rows     {done['rows']} for training; left out: {_left_out(done)}")
    _say(console, f"Model    {from_here(directory / 'model')}  (step {done['model_step']})")
    console.print(f"Time     {done['seconds']:.0f} s")


def show_labels(console: Console, directory: Path, done: Mapping[str, Any]) -> None:
    """Print how many completions became how many pairs, and what was left out and why."""
    _say(
        console,
        f"Pairs    {done['pairs']} of {done['completions']} completions, mean margin {done['margin_mean']:.3f}, labels"
        f" exchanged {done['flipped_ratio']:.3f}, completions cut at the budget {done['truncated_ratio']:.3f}",
    )
    _say(console, f"Left out {_left_out(done)}")
    _say(console, f"File     {from_here(directory / 'pairs.parquet')}  (TRL's columns prompt, chosen, rejected)")
    console.print(f"Time     {done['seconds']:.0f} s")


def show_evaluation(console: Console, directory: Path, evaluation: Mapping[str, Any]) -> None:
    """Print means of every model's answers, win rates and pass@k, all with 95 % intervals over prompts."""
    table = Table(title=f"{evaluation['prompts']} held-out prompts, mean with 95 % interval")
    sides = evaluation["means"]
    table.add_column("")
    for side in sides:
        table.add_column(side, justify="right")
    for name in dict.fromkeys(name for values in sides.values() for name in values):
        cells = [_interval(_estimate(values[name])) if name in values else "-" for values in sides.values()]
        table.add_row(_UNITS.get(name) or name.removeprefix("reward_"), *cells)
    console.print(table)
    for decoding, rate in evaluation.get("win_rates", {}).items():
        plain, controlled = (_interval(_estimate(rate[name])) for name in ("win_rate", "length_controlled_win_rate"))
        _say(
            console,
            f"Wins     {decoding}, by {evaluation['judge']}, against {evaluation['against']}: {plain}; at equal lengths"
            f" {controlled}; not judged: {rate['unjudged']}",
        )
    for k, value in evaluation.get("pass_at_k", {}).items():
        console.print(f"pass@{k}   {_interval(_estimate(value))} of {evaluation['pass_prompts']} prompts")
    _say(console, f"Files    {from_here(directory)}  (evaluation.arrow: every answer; evaluation.json)")


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True)


def _left_out(done: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in done["dropped"].items()) or "none"


def _estimate(value: Mapping[str, float]) -> Estimate:
    return Estimate(*(float("nan") if value[name] is None else value[name] for name in ("mean", "low", "high")))


def show_reward_report(console: Console, report: Mapping[str, Any]) -> None:
    """Print held-out accuracy with its interval, the calibration curve, and what length has to do with it."""
    table = Table(title=f"calibration on {report['pairs']} held-out pairs")
    for name in ("predicted", "pairs", "mean predicted", "observed"):
        table.add_column(name, justify="right")
    for interval in report["calibration"]:
        span = f"{interval['low']:.2f} - {interval['high']:.2f}"
        table.add_row(span, str(interval["pairs"]), f"{interval['predicted']:.3f}", f"{interval['observed']:.3f}")
    console.print(table)
    accuracy = report["accuracy"]
    members = ", ".join(f"{value:.3f}" for value in report["member_accuracies"])
    _say(
        console,
        f"Accuracy {accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}] on held-out pairs (members"
        f" {members}); calibration error {report['calibration_error']:.3f}",
    )
    if report["length_correlation"] is not None and report["prefers_longer"] is not None:
        _say(
            console,
            f"Length   rank correlation of score and length {report['length_correlation']:+.3f}; prefers the longer"
            f" text in {report['prefers_longer']:.3f} of pairs, the labels in {report['label_prefers_longer']:.3f}",
        )


def _table(first: pa.RecordBatch, last: pa.RecordBatch, before: int, after: int, settings: Settings) -> Table:
    table = Table(title=f"{settings.run.name}: {first.num_rows} held-out prompts, mean with 95 % interval")
    table.add_column("")
    for name in (f"step {before}", f"step {after}", "change (paired)"):
        table.add_column(name, justify="right")
    roles = {f"reward_{reward.name}": reward.role for reward in settings.rewards}
    old, new, change = evaluations.estimates(first), evaluations.estimates(last), evaluations.changes(first, last)
    for name in old:
        label = _UNITS.get(name) or f"{name.removeprefix('reward_')} ({roles.get(name, 'monitor')})"
        table.add_row(label, _interval(old[name]), _interval(new[name]), _signed(change[name]))
    return table


def _telling_rows(first: pa.RecordBatch, last: pa.RecordBatch) -> list[int]:
    """Two prompts beside the middle of the order by change of reward: typical, not the best. Unscored ones are none."""
    change = per_completion(last)["reward"] - per_completion(first)["reward"]
    order = [int(row) for row in change.argsort(kind="stable") if np.isfinite(change[row])]
    low = len(order) * 2 // 5
    return order[low : low + 1] + order[max(len(order) * 3 // 5, low + 1) :][:1]


def _answer(first: pa.RecordBatch, last: pa.RecordBatch, row: int, before: int, after: int) -> Text:
    text = Text()
    text.append(f"\nprompt:  {printable(first.column('prompt')[row].as_py())}\n", style="bold")
    for step, batch in ((before, first), (after, last)):
        reward = batch.column("reward")[row].as_py()
        completion = printable(" ".join(batch.column("completion")[row].as_py().split()))
        text.append(f"step {step:>3} (reward {reward if reward is not None else float('nan'):+.2f}): {completion}\n")
    return text


def _interval(value: Estimate) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _signed(value: Estimate) -> str:
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def _next(directory: Path, settings: Settings, config_path: str) -> str:
    """The next command, from the run's config.yaml: overrides or a pipeline may have changed the given file."""
    other = Path(config_path).with_name("quickstart-maxent.yaml")
    if Path(config_path).name == "quickstart.yaml" and other.exists():
        return f"keel train {other}  (the same run regularized by entropy: watch KL and the answers)"
    beside = f"run.directory={from_here(directory.parent)}/{{name}}"  # a resumed run's names that run alone
    changes = ["run.name=another", beside, f"run.seed={settings.run.seed + 1}"]
    return shlex.join(["keel", "train", from_here(directory / "config.yaml"), *changes])
