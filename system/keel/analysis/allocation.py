"""Finds the counts of workers that suit a budget: predictions of many allocations, the fastest first.

A budget of devices is divided; cores of one machine are shared, so there any role may have up to as many workers as
there are cores. Where allocations are few all are tried, else neighbors of the best so far, from shares by work on.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from keel.analysis.plan import Prediction
from keel.analysis.rates import Rates
from keel.cluster import capacity
from keel.config.run import Settings
from keel.errors import ConfigError
from keel.observability.utilization import LEARNER

_ALL = 1500
"""Allocations that are all tried."""
_LARGE = 32
"""Devices or cores with which there are more."""
_EQUAL_RATIO = 0.005
"""Step times this close are equal; then fewer workers are better."""

_ROUNDING = 1e-6
"""Shares of a GPU add up to no more than this above what they should: Ray counts in 1e-4."""

Counts = Mapping[str, int]


@dataclass(frozen=True)
class WorkerBudget:
    """An amount of devices or cores, and the cost of one worker of each role."""

    amount: float
    costs: Mapping[str, float]
    most: Mapping[str, int]
    """Workers of a role at the most."""
    setting: str
    """The option that gave it: --gpus or --cpus."""

    def allows(self, counts: Counts) -> bool:
        spent = sum(self.costs[role] * count for role, count in counts.items())
        return spent <= self.amount + _ROUNDING and all(1 <= counts[role] <= self.most[role] for role in counts)


def of_gpus(settings: Settings, counts: Counts, gpus: int) -> WorkerBudget:
    """Devices: what the configuration asks for a worker; where it asks for none at all, one for each model that runs.

    Scorers without a device are counted in nothing.
    """
    costs = {ask.role: ask.of("GPU") for ask in capacity.asks(settings, counts)}
    if not any(costs.values()):
        models = any(reward.kind == "model" for reward in settings.rewards)
        costs = {role: float(role != "scorer" or models) for role in counts}
    limits = {role: int(gpus / cost + _ROUNDING) if cost else gpus for role, cost in costs.items()}
    return _checked(WorkerBudget(gpus, costs, _most(settings, limits), "--gpus"), counts)


def of_cpus(settings: Settings, counts: Counts, cpus: int) -> WorkerBudget:
    """Cores of one machine, which all workers share: they cost nothing, they only slow each other down."""
    for ask in capacity.asks(settings, counts):
        if ask.of("GPU"):
            raise ConfigError(f"--cpus={cpus}: {ask.setting('GPU')}; expected --gpus, or no GPUs in the configuration")
    limits = dict.fromkeys(counts, cpus)
    return _checked(WorkerBudget(cpus, dict.fromkeys(counts, 0.0), _most(settings, limits), "--cpus"), counts)


def _most(settings: Settings, limits: Counts) -> dict[str, int]:
    """No more than `limits` has, and than work on something: groups in flight, rows of a step."""
    groups = settings.buffer.groups_per_step
    useful = dict.fromkeys(limits, groups * (1 + settings.buffer.max_staleness))
    useful[LEARNER] = groups * settings.sampling.samples_per_prompt
    return {role: max(1, min(limits[role], useful[role])) for role in limits}


def _checked(budget: WorkerBudget, counts: Counts) -> WorkerBudget:
    if not budget.allows(dict.fromkeys(counts, 1)):
        needed = sum(budget.costs.values())
        raise ConfigError(
            f"{budget.setting}={budget.amount:g}: one worker of each role takes {needed:g}; expected at least that"
        )
    return budget


def best(
    budget: WorkerBudget, rates: Rates, counts: Counts, simulate: Callable[[Counts], Prediction]
) -> list[Prediction]:
    """Predictions of allocations, the best first. `counts`: any allocation, its keys say which roles there are."""
    tried: dict[tuple[int, ...], Prediction] = {}
    roles = list(counts)

    def trial(allocation: tuple[int, ...]) -> Prediction:
        if allocation not in tried:
            tried[allocation] = simulate(dict(zip(roles, allocation, strict=True)))
        return tried[allocation]

    every = list(itertools.islice(_all(budget, roles), _ALL + 1))
    if len(every) <= _ALL:
        for allocation in every:
            trial(allocation)
    else:
        _climb(budget, roles, _start(budget, rates, roles), trial)
    return ranked(list(tried.values()))


def _all(budget: WorkerBudget, roles: list[str]) -> Iterator[tuple[int, ...]]:
    if budget.amount > _LARGE:
        yield from itertools.repeat((1,) * len(roles), _ALL + 1)  # more than _ALL, without looking through them
        return
    for allocation in itertools.product(*(range(1, budget.most[role] + 1) for role in roles)):
        if budget.allows(dict(zip(roles, allocation, strict=True))):
            yield allocation


def _start(budget: WorkerBudget, rates: Rates, roles: list[str]) -> tuple[int, ...]:
    """Shares by the work of a sequence in each role; where nothing is divided, one worker of each role."""
    work = {role: (rates.learner if role == LEARNER else rates.of(role)).seconds(1) for role in roles}
    left, paid = budget.amount - sum(budget.costs.values()), sum(work[role] for role in roles if budget.costs[role])
    if not paid:
        return (1,) * len(roles)
    extra = {role: int(left * work[role] / paid / (budget.costs[role] or 1.0)) for role in roles}
    return tuple(min(budget.most[role], 1 + extra[role]) for role in roles)


def _climb(
    budget: WorkerBudget, roles: list[str], allocation: tuple[int, ...], trial: Callable[[tuple[int, ...]], Prediction]
) -> None:
    """Move workers between roles, many at first, then one, as long as that makes steps shorter."""
    stride = max(1, max(budget.most.values()) // 4)
    while stride:
        near = [
            counts for counts in _neighbors(allocation, stride) if budget.allows(dict(zip(roles, counts, strict=True)))
        ]
        better = min(near, key=lambda counts: trial(counts).step_seconds, default=allocation)
        if trial(better).step_seconds < (1 - _EQUAL_RATIO / 5) * trial(allocation).step_seconds:
            allocation = better
        else:
            stride = 1 if 1 < stride < 4 else stride // 4


def _neighbors(allocation: tuple[int, ...], stride: int) -> Iterator[tuple[int, ...]]:
    """More workers of one role: new ones, or another role's, also a busier one's: they may hardly save it any time."""
    places = range(len(allocation))
    for more in places:
        yield tuple(count + stride * (place == more) for place, count in enumerate(allocation))
        for fewer in places:
            if fewer != more:
                moved = {more: stride, fewer: -stride}
                yield tuple(count + moved.get(place, 0) for place, count in enumerate(allocation))


def ranked(predictions: list[Prediction]) -> list[Prediction]:
    """Sort by step seconds, within 0.5 % by fewer workers; leave out those that only add workers to a better one."""
    fastest = min((prediction.step_seconds for prediction in predictions), default=0.0)
    order = sorted(
        predictions,
        key=lambda prediction: (
            int((prediction.step_seconds / fastest - 1) / _EQUAL_RATIO),
            sum(prediction.counts.values()),
            prediction.step_seconds,
        ),
    )
    kept: list[Prediction] = []
    for prediction in order:
        if not any(all(better.counts[role] <= count for role, count in prediction.counts.items()) for better in kept):
            kept.append(prediction)
    return kept
