"""RESULTS.md: the paper's claims decided by the numbers of finished runs.

    python benchmarks/maxent/results.py [--check] [--folder FOLDER]

Reads the four Parquet files of collect.py in the folder, by default this one, and nothing else, and writes RESULTS.md
and two pictures beside them. The same numbers give the same page to the byte: every draw has a fixed seed. `--check`
writes nothing and ends with exit code 1 where the page is not what the numbers give.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import equal_kl
import figures
import guard_record
import numpy as np
from claims import CLAIMS, MARGIN, MIN_ARMS, MIN_SEEDS, SUPPORTED, UNDECIDED, Claim, Row, over_optimization
from curves import ENTROPY_FAMILIES, FAMILIES, OFFLINE, ArmCurves, Experiment, load, payment

from keel.analysis.hierarchical_bootstrap import over_seeds_and_prompts
from keel.observability.diagnostics import Estimate

HERE = Path(__file__).parent
IDENTITY_TESTS = {
    "tests/unit/algorithms/test_simpo_is_maxent.py": (
        "test_simpo_recovers_the_rewards_up_to_the_length_term",
        "test_with_the_exact_margin_it_ends_at_the_maximum_entropy_policy",
    ),
    "tests/unit/algorithms/test_oracles_preferences.py": (
        "test_maximum_entropy_policy_answers_bradley_terry",
        "test_simpo_is_maximum_entropy_up_to_a_length_term",
    ),
}
"""What proves claim 6."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with RESULTS.md, write nothing")
    parser.add_argument("--folder", type=Path, default=HERE)
    arguments = parser.parse_args()
    experiment = load(arguments.folder)
    text, path = page(experiment), arguments.folder / "RESULTS.md"
    if arguments.check:
        if not path.exists() or path.read_text(encoding="utf8") != text:
            print(f"{path} is not what the numbers give; python benchmarks/maxent/results.py", file=sys.stderr)
            raise SystemExit(1)
        return
    path.write_text(text, encoding="utf8")
    figures.draw(experiment, arguments.folder)
    print(path)


def page(experiment: Experiment) -> str:
    claims = [claim(experiment, rate) for claim in CLAIMS for rate in experiment.learning_rates]
    if len(experiment.learning_rates) == 1:  # the paper has claim 1 at a lower one, too
        statement = over_optimization(experiment, experiment.learning_rates[0]).statement
        claims.append(Claim("1", f"{statement} No run has a lower learning rate.", None, (), ()))
    claims.sort(key=lambda claim: claim.number)
    parts = [
        introduction(experiment),
        rules(experiment),
        verdicts(claims),
        pictures(),
        arms_table(experiment),
        *(claim_section(claim) for claim in claims if claim.rows),
        identity(),
        equal_kl_section(experiment),
        payments(experiment),
        guard_section(experiment),
    ]
    return "\n\n".join(parts) + "\n"


def introduction(experiment: Experiment) -> str:
    seeds = sorted({seed for arm in experiment.arms for seed in arm.seeds})
    online = [arm for arm in experiment.arms if not arm.settings["offline"]]
    prompts = online[0].end("gold").shape[1]
    runs = sum(len(arm.seeds) for arm in experiment.arms)
    return f"""# What the runs say of the paper's claims

Written by `python benchmarks/maxent/results.py` from the Parquet files beside it; `--check` compares. {runs} runs of
{len(experiment.arms)} arms, seeds {", ".join(map(str, seeds))}, {prompts} held-out prompts. An arm is a setting of the
regularizer at one learning rate. *Proxy* is the reward that is trained on, *gold* the one that is wanted, *KL* that to the
policy before training, in nats over a completion ([glossary](../../docs/understand/glossary.md))."""  # noqa: E501


def rules(experiment: Experiment) -> str:
    gold = experiment.spread("gold")
    return f"""## How a verdict is reached

Every statistic has a 95 % interval, and a rule asks where the whole interval lies. Intervals are over seeds and held-out
prompts (`keel.analysis.hierarchical_bootstrap`), paired by prompt; ratios and rank correlations, of which a run gives one
number, have intervals over seeds alone. They are not corrected for the number of claims. With fewer than {MIN_SEEDS} seeds a
verdict is *{UNDECIDED}*, whatever the numbers are. A claim about several arms is decided by the mean over these arms; the
rows of single arms are there to be read.

The *peak* is the evaluation with the largest mean gold of a run. The largest of several means is too high by chance, so the
peak of one half of the prompts is chosen by the other half. The *end* is the last evaluation. The *margin* is {MARGIN:g} standard
deviations of gold over the held-out prompts before training, here {MARGIN * gold:.4f}: a smaller fall counts as none. Gold *fell*
where the interval of end - peak lies below 0, and *held* where it does not and lies above minus the margin.

| claim | supported where | not supported where |
|---|---|---|
| 1 entropy arms over-optimize | gold fell, and the interval of the proxy's change since the peak of gold lies above 0 | gold held, or the proxy's interval lies below 0 |
| 2 their KL is unstable | both ratios to the KL arms lie above 1: the KL at the end, and the largest rise from a training step to the next | either lies below 1 |
| 3 KL arms stay stable | gold held, and the KL grew in the last third of the steps by less than a sixth of all its growth, half of an even growth | gold fell, or the KL grew by more than that sixth |
| 4a entropy does not prevent hacking | the gap of the entropy arms minus that of arm `none` lies above -{MARGIN:g} | it lies below -{MARGIN:g} |
| 4b entropy goes with hacking | both rank correlations with the gap lie above 0, over at least {MIN_ARMS} arms | either lies below 0 |
| 5 offline SimPO works | its gold minus the start's, and minus that of the best entropy arm at its end, lie above 0 | either lies below 0 |

In all other cases the verdict is *{UNDECIDED}*. The *gap* is the rise of the proxy since the start minus that of gold, each in
standard deviations over the held-out prompts before training."""  # noqa: E501


def verdicts(claims: Sequence[Claim]) -> str:
    lines = [(claim.number, claim.statement, at(claim.learning_rate), f"**{claim.verdict}**") for claim in claims]
    lines.append(("6", "SimPO is maximum entropy up to a length term.", "-", "proved by unit tests, no data"))
    return "## Verdicts\n\n" + table(("claim", "", "learning rate", "verdict"), lines)


def pictures() -> str:
    return f"""![proxy and gold against the root of the KL]({figures.FRONTIER})

![gold by step, a thin line a seed]({figures.GOLD})"""


def arms_table(experiment: Experiment) -> str:
    lines = [arm_line(arm, begun(experiment, arm)) for arm in experiment.arms]
    for rate in experiment.learning_rates:
        missing = [name for name in FAMILIES if not experiment.family([name], rate)]
        lines += [(f"{name}{'' if name == 'none' else '-*'}, {rate:g}", "none: no finished run") for name in missing]
    lines += [(name, "none: no evaluation") for name in OFFLINE if experiment.named(name, None) is None]
    note = "All runs that were begun are finished."
    if experiment.unfinished:
        note = f"Not finished, and in no number: {'; '.join(experiment.unfinished)}."
    columns = ("arm, learning rate", "seeds", "steps", "peak at step", "gold at the peak", "gold at the end")
    columns += ("proxy at the end", "KL at the end (nats)", "entropy (nats a token)", "length (tokens)")
    return f"## All arms\n\n{note} The step of the peak is that of each seed's own mean.\n\n{table(columns, lines)}"


def begun(experiment: Experiment, arm: ArmCurves) -> int:
    """Runs of an arm, finished or not."""
    return len(arm.seeds) + sum(run.startswith(f"{arm.label}, seed ") for run in experiment.unfinished)


def arm_line(arm: ArmCurves, runs: int) -> tuple[str, ...]:
    count = len(arm.seeds)
    seeds = str(count) if count == runs else f"{count} of {runs}"
    ends = [
        number(over_seeds_and_prompts([(1, arm.end(q))]))
        for q in ("gold", "proxy", "kl_nats", "entropy", "length_tokens")
    ]
    if arm.settings["offline"]:
        return arm.label, seeds, "-", "-", "-", *ends
    means = np.nanmean(arm.values["gold"], axis=2)
    peaks = sorted({arm.steps[place] for place in means.argmax(axis=1)})
    peak = str(peaks[0]) if len(peaks) == 1 else f"{peaks[0]}-{peaks[-1]}"
    return arm.label, seeds, str(arm.steps[-1]), peak, number(over_seeds_and_prompts([(1, arm.at_peak("gold"))])), *ends


def claim_section(claim: Claim) -> str:
    return (
        f"## Claim {claim.number}, learning rate {at(claim.learning_rate)}: {claim.verdict}\n\n{claim.statement} A row in bold"  # noqa: E501
        f" decides.\n\n{rows_table(claim.columns, claim.rows)}"
    )


def rows_table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        subject, verdict = (f"**{text}**" if row.decides else text for text in (row.subject, row.verdict))
        lines.append((subject, str(row.seeds), *map(number, row.numbers), verdict))
    return table(("", "seeds", *columns, "verdict"), lines)


def identity() -> str:
    tests = "\n".join(
        f"* `{file}`: {', '.join(f'`{name}`' for name in names)}" for file, names in IDENTITY_TESTS.items()
    )
    return f"""## Claim 6: a theorem, not a measurement

SimPO's loss on pairs that Bradley-Terry makes of known rewards has the policy of maximum entropy as its optimum, up to a term
of the lengths, and exactly with `exact_length_margin`. Closed forms and fits of a whole policy hold this:

{tests}"""  # noqa: E501


def equal_kl_section(experiment: Experiment) -> str:
    lines = []
    for pairing in equal_kl.pairings(experiment):
        cells = []
        for place, unit in ((pairing.steps, ""), (pairing.kl, " nats")):
            if isinstance(place, str):
                cells += [place, "-", "-"]
            else:
                cells += [f"{place.level:.4g}{unit}", number(place.gold, "+"), number(place.proxy, "+")]
        lines.append((pairing.arm.label, pairing.control.name, *cells))
    columns = ("arm, learning rate", "minus", "at step", "gold", "proxy", "at a KL of", "gold", "proxy")
    return f"""## Beside the KL arms, at equal steps and at equal KL

Each arm minus a KL arm of its learning rate, as `keel compare` does it: at the last step that both were evaluated at, and at
the largest mean KL that both reached, between two evaluations on the line through them.

{table(columns, lines)}"""  # noqa: E501


def payments(experiment: Experiment) -> str:
    limit, lines = experiment.proxy_range, []
    for arm in experiment.arms:
        if arm.family not in ENTROPY_FAMILIES:
            continue
        most, settings = payment(arm.settings), arm.settings
        place = "not known" if np.isnan(most + limit) else "above" if most > limit else "below"
        lines.append(
            (arm.label, settings["entropy_form"], f"{settings['entropy_coefficient']:g}", f"{most:.3f}", place)
        )
    columns = ("arm, learning rate", "form", "coefficient", "most that it can pay", "the proxy's range")
    return f"""## What entropy can pay

A policy that draws every token evenly from all ids has the most entropy there is. What the term pays for one completion of
it is coefficient x tokens x ln(ids) for the sum, and coefficient x ln(ids) for the means and the token bonus, which is a mean over
tokens in the loss. The proxy's range, from the 1st to the 99th percentile of all evaluations of the arms without an entropy term,
is {limit:.3f}. An arm *above* it gains more by noise than by any answer.

{table(columns, lines)}"""  # noqa: E501


def guard_section(experiment: Experiment) -> str:
    lines = []
    records = guard_record.records(experiment)
    for record in records:
        count, span = len(record.delays), "-"
        if count:
            span = f"{statistics.median(record.delays):+g} ({min(record.delays):+d} to {max(record.delays):+d})"
        lines.append(
            (record.detector, f"{record.fired_healthy} of {record.healthy}", f"{count} of {record.hacked}", span)
        )
    columns = ("detector", "fired in healthy runs", "fired in hacked runs", "steps after the fall: median (range)")
    gains = guard_record.guarded_arms(experiment)
    columns_of_gains = ("gold at the end - bound", "kept checkpoint - bound", "unguarded arm at its end - bound")
    kept = rows_table(columns_of_gains, gains) if gains else "No guarded arm."
    return f"""## The guard

Of all unguarded runs, in which detectors only warn. A run is *healthy* where gold does not end below its peak by more than one
standard error of that difference, paired by prompt, else *hacked*. The *fall* of a hacked run is its first evaluation at which
gold lies more than one such standard error below its largest mean so far; a negative number of steps is a warning before it.

{table(columns, lines)}

Guarded arms beside the unguarded arm of the same name. The bound is the unguarded peak of gold minus one standard error of its
mean; *{SUPPORTED}* where the interval of the guarded arm's gold at the end minus the bound lies above 0, *not supported* below.
The kept checkpoint is the one that `keep_best` keeps, chosen by the other half of the prompts; of the unguarded arm it lies one
standard error above the bound by definition.

{kept}"""  # noqa: E501


def at(learning_rate: float | None) -> str:
    return "-" if learning_rate is None else f"{learning_rate:g}"


def number(value: Estimate, sign: str = "") -> str:
    """Mean and interval; a number without one says so."""
    if np.isnan(value.mean):
        return "-"
    mean, low, high = (f"{round(end, 3) + 0.0:{sign}.3f}" for end in (value.mean, value.low, value.high))  # no -0.000
    return f"{mean} (no spread)" if value.low == value.high else f"{mean} [{low}, {high}]"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a shorter line is filled with empty cells."""
    rows = [columns, ["---"] * len(columns), *([*line, *[""] * (len(columns) - len(line))] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
