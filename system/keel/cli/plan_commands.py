"""`keel plan`: what a configuration will take, and how to divide a budget; main.py registers it."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from keel.analysis.allocation import WorkerBudget, best, of_cpus, of_gpus, ranked
from keel.analysis.plan import Footprint, Machine, Prediction, footprints, predict
from keel.analysis.rates import Rates
from keel.cluster import capacity
from keel.cluster.capacity import configured
from keel.config import loader
from keel.config.run import Settings
from keel.errors import ConfigError
from keel.observability.console import console, errors, progress_display, quiet_libraries
from keel.observability.utilization import LEARNER

_SHOWN = 5  # allocations
_SEARCH_STEPS = 8
"""Simulated for each allocation; half as many where there are many workers, which even themselves out."""
_MANY = 100


def plan(
    config_path: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of an online run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="settings to change, as a.b=c")] = None,
    runs: Annotated[
        list[Path] | None, typer.Option("--from", help="run directory whose rates to use; repeatable")
    ] = None,
    rates_path: Annotated[Path | None, typer.Option("--rates", help="YAML file of rates")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="number of devices to divide")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="cores of one machine to divide")] = None,
    staleness: Annotated[
        list[int] | None, typer.Option("--max-staleness", min=0, help="in place of the configuration's; repeatable")
    ] = None,
    save_rates: Annotated[Path | None, typer.Option(help="write the rates here, for --rates")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Predict step time, idle shares and memory by simulation, and the best counts for a budget.

    Without --from and --rates, a few steps are run here to measure.
    """
    if runs and rates_path:
        raise ConfigError(f"--rates={rates_path}: --from is given, too; expected one of them")
    if save_rates and not save_rates.absolute().parent.is_dir():
        raise ConfigError(f"--save-rates={save_rates}: no such folder; expected one that exists")
    settings = loader.load(config_path, overrides or [])
    variants = [_with_staleness(settings, bound) for bound in staleness or [settings.buffer.max_staleness]]
    budgets = [_budget(variant, gpus, cpus) for variant in variants]  # before minutes of measuring
    rates = _rates(settings, runs or [], rates_path, as_json)
    if settings.reference and rates.reference is None:
        raise ConfigError("rates.reference: missing, but the configuration has a reference; expected a block")
    if save_rates:
        save_rates.write_text(yaml.safe_dump(rates.model_dump(mode="json"), sort_keys=False), encoding="utf8")
    machine = Machine(cores=_cores(settings, gpus, cpus))
    plans = [_planned(variant, rates, machine, budget) for variant, budget in zip(variants, budgets, strict=True)]
    parameters = rates.policy_parameters or _parameters(settings)
    last = plans[-1]["best"][0] if plans[-1]["best"] else plans[-1]["configured"]
    memory = footprints(settings, parameters, last.counts[LEARNER]) if parameters else []
    if as_json:
        typer.echo(json.dumps(_tree(rates, machine, plans, memory), indent=2))
    else:
        _show(rates, machine, plans, memory, last.counts[LEARNER])


def _rates(settings: Settings, runs: list[Path], path: Path | None, as_json: bool) -> Rates:
    if path:
        return loader.load_as(Rates, path)
    if runs:
        from keel.analysis import measurement

        return measurement.measured(runs)
    quiet_libraries()
    from keel.analysis import calibration

    with progress_display(errors if as_json else console, calibration.STEPS) as display:
        display.note(f"measuring {calibration.STEPS} steps of {settings.run.name}")
        return calibration.run(settings, display)


def _cores(settings: Settings, gpus: int | None, cpus: int | None) -> float | None:
    """Cores all workers share; None: they have devices or machines of their own.

    Of this machine those this process may run on: a container or a job may have fewer than there are. A quota of
    processor time is not seen.
    """
    asked = [ask.of("GPU") for ask in capacity.asks(settings, configured(settings))]
    if gpus or any(asked) or (settings.cluster.address_to_join and not cpus):
        return None
    return float(cpus or len(os.sched_getaffinity(0)))


def _budget(settings: Settings, gpus: int | None, cpus: int | None) -> WorkerBudget | None:
    if gpus and cpus:
        raise ConfigError(f"--cpus={cpus}: --gpus is given, too; expected one of them")
    if gpus:
        return of_gpus(settings, configured(settings), gpus)
    return of_cpus(settings, configured(settings), cpus) if cpus else None


def _with_staleness(settings: Settings, bound: int) -> Settings:
    tree = settings.model_dump(mode="json")
    tree["buffer"]["max_staleness"] = bound
    return loader.parse(tree)


def _planned(settings: Settings, rates: Rates, machine: Machine, budget: WorkerBudget | None) -> dict[str, Any]:
    """The configuration's own counts, and the best ones for the budget if there is one."""
    counts = configured(settings)
    candidates = best(budget, rates, counts, partial(_search, settings, rates, machine))[:_SHOWN] if budget else []
    # Predicted again over as many steps as the configured counts.
    again = [predict(settings, rates, candidate.counts, machine) for candidate in candidates]
    return {
        "max_staleness": settings.buffer.max_staleness,
        "configured": predict(settings, rates, counts, machine),
        "best": ranked(again),
    }


def _search(settings: Settings, rates: Rates, machine: Machine, counts: Mapping[str, int]) -> Prediction:
    steps = _SEARCH_STEPS if sum(counts.values()) < _MANY else _SEARCH_STEPS // 2
    return predict(settings, rates, counts, machine, steps)


def _parameters(settings: Settings) -> int | None:
    """Count the parameters of the policy if its files are local; None else: nothing is downloaded for that."""
    model = settings.policy.model
    if not (model.startswith("wheel:") or Path(model).is_dir()):
        return None
    quiet_libraries()
    from keel.learner import loading, model_files

    return model_files.num_parameters(loading.locate_policy(model, "policy.model"))


def _tree(rates: Rates, machine: Machine, plans: list[dict[str, Any]], memory: list[Footprint]) -> dict[str, Any]:
    return {
        "rates": rates.model_dump(mode="json"),
        "machine": asdict(machine),
        "plans": [
            {**plan, "best": list(map(asdict, plan["best"])), "configured": asdict(plan["configured"])}
            for plan in plans
        ],
        "memory_bytes": {footprint.role: dict(footprint.parts) for footprint in memory},
    }


def _show(rates: Rates, machine: Machine, plans: list[dict[str, Any]], memory: list[Footprint], ranks: int) -> None:
    console.print(f"Rates    {rates.source}", soft_wrap=True)
    shared = f"{machine.cores:g} cores shared by all workers" if machine.cores else "every worker has its own device"
    console.print(f"Machine  {shared}")
    rows = [plan["configured"] for plan in plans]
    console.print(_table("as configured", rows, waits=len(rows)))
    for plan in plans:
        if plan["best"]:
            title = f"best counts for the budget, max_staleness {plan['max_staleness']}"
            console.print(_table(title, plan["best"], waits=1))
    if not memory:
        console.print("Memory   unknown: the model is not here; policy_parameters of the rates would say it")
        return
    title = "memory, lower bounds (see docs/operate/scaling.md)"
    table = Table("one", "GiB", "of which", title=title, title_justify="left")
    for footprint in memory:
        parts = ", ".join(f"{name} {num_bytes / 2**30:.2f}" for name, num_bytes in footprint.parts.items())
        one = f"of {ranks} learner ranks" if footprint.role == LEARNER else footprint.role
        table.add_row(one, f"{footprint.num_bytes / 2**30:.2f}", parts)
    console.print(table)


def _table(title: str, predictions: list[Prediction], waits: int) -> Table:
    """A row for each prediction; the first `waits` of them also say what a role waits for."""
    roles = list(predictions[0].counts)
    table = Table("counts", "late", "step s", "p90", "tok/s", *roles, title=title, title_justify="left")
    for place, row in enumerate(predictions):
        counts = " : ".join(str(count) for count in row.counts.values())
        late = ", ".join(f"{versions}: {share:.0%}" for versions, share in row.staleness.items())
        shares = [f"{row.busy[role]:.0%} busy{_idle(row.idle[role]) if place < waits else ''}" for role in roles]
        numbers = (f"{row.step_seconds:.2f}", f"{row.step_seconds_p90:.2f}", f"{row.tokens_per_second:,.0f}")
        table.add_row(counts, late, *numbers, *shares)
    return table


def _idle(shares: Mapping[str, float]) -> str:
    """List what a role waits for, the longest wait first."""
    waits = sorted(shares.items(), key=lambda pair: -pair[1])
    return "".join(f"\n{share:.0%} on {on}" for on, share in waits[:3] if share >= 0.005)
