"""Whether the workers of a run fit on the nodes of a cluster. Arithmetic only, no Ray.

    settings, counts -> asks ---+
    nodes' resources -----------+--> problems: lines that say what can never fit, with the arithmetic
    the autoscaler's limits ----+

Only what is proven not to fit is refused: where a proof would take too long, the run starts and waits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from keel.config.commands import AnySettings
from keel.config.run import Settings
from keel.config.workers import GeneratorSettings, WorkerSettings

Amounts = Mapping[str, float]
"""Amounts by resource: CPU, GPU, custom ones."""
BLOCKS = {"generator": "generators", "reference": "reference", "scorer": "scorers", "learner": "learners"}
"""Roles -> their blocks of the configuration."""
_UNITS = 10_000
"""Ray counts resources in parts of 1/10,000; integer sums of these are exact."""
_MOST_FILLINGS = 30_000
"""Ways to fill a node that are tried before a packing counts as possible."""
_SHOWN_NODES = 8


@dataclass(frozen=True)
class Ask:
    """The workers of one role; each needs all of its resources on one node."""

    role: str
    count: int
    workers: WorkerSettings

    @property
    def amounts(self) -> dict[str, float]:
        """Sum the resources of one worker."""
        total: dict[str, float] = {}
        for bundle in bundles(self.workers):
            total |= {name: total.get(name, 0.0) + amount for name, amount in bundle.items()}
        return total

    def of(self, name: str) -> float:
        return self.amounts.get(name, 0.0)

    @property
    def block(self) -> str:
        return BLOCKS[self.role]

    @property
    def one(self) -> str:
        return f"one {self.role}{' rank' if self.role == 'learner' else ''}"

    def setting(self, name: str) -> str:
        """The setting that asks for a resource, with its value."""
        if name == "CPU":
            return f"{self.block}.threads={self.workers.threads}"
        if name != "GPU":
            return f"{self.block}.resources.{name}={self.workers.resources[name]:g}"
        if isinstance(self.workers, GeneratorSettings) and self.workers.tensor_parallel > 1:
            return f"{self.block}.tensor_parallel={self.workers.tensor_parallel}"
        return f"{self.block}.gpus={self.workers.gpus:g}"


def bundles(workers: WorkerSettings) -> list[dict[str, float]]:
    """List one worker's bundles: that of its actor, then one for each GPU of a tensor parallel engine."""
    actor = {"CPU": float(workers.threads)}
    if isinstance(workers, GeneratorSettings) and workers.tensor_parallel > 1:
        return [actor | workers.resources, *({"GPU": 1.0} for _ in range(workers.tensor_parallel))]
    return [actor | ({"GPU": workers.gpus} if workers.gpus else {}) | workers.resources]


def workers(settings: AnySettings) -> dict[str, WorkerSettings]:
    """Settings of the workers by role, in the order in which a batch passes through them."""
    blocks = {role: getattr(settings, block, None) for role, block in BLOCKS.items()}
    return {role: block for role, block in blocks.items() if block is not None}


def configured(settings: Settings) -> dict[str, int]:
    """Workers by role as the configuration has them."""
    return {role: config.count for role, config in workers(settings).items()}


def asks(settings: AnySettings, counts: Mapping[str, int]) -> list[Ask]:
    """The asks of these counts of workers."""
    return [Ask(role, counts[role], config) for role, config in workers(settings).items() if counts.get(role)]


def one_of_each(asked: Sequence[Ask]) -> list[Ask]:
    """One worker of each role: the least with which a run continues."""
    return [replace(ask, count=1) for ask in asked]


def problems(asked: Sequence[Ask], nodes: Sequence[Amounts], limits: Amounts | None = None) -> list[str]:
    """A line for each thing that can never fit; empty if all may fit, now or when other programs leave.

    `limits`: the most that all nodes together may have of a resource, where an autoscaler adds some.
    """
    if limits is not None:
        names = {name for node in nodes for name in node} | set(limits)
        grown = {name: max(_total(nodes, name), limits.get(name, 0.0)) for name in names}
        return _sums(asked, [grown], "may grow to")
    alone = [line for ask in asked if (line := _alone(ask, nodes))]
    return alone or _sums(asked, nodes, "has") or _packing(asked, nodes)


def packs(asked: Sequence[Ask], nodes: Sequence[Amounts]) -> bool:
    """Whether all workers fit on the nodes at once. False only where that is proven, by sums or by trying all."""
    names = sorted({name for ask in asked for name in ask.amounts})
    sizes = [[round(ask.of(name) * _UNITS) for name in names] for ask in asked]
    if any(not _holds({name: _total(nodes, name)}, {name: _wanted(asked, name)}) for name in names):
        return False
    states = {tuple(ask.count for ask in asked)}  # workers that have no place yet, by role
    tried = 0
    for node in nodes:
        left: set[tuple[int, ...]] = set()
        for state in states:
            for filling in _fillings(sizes, state, [round(node.get(name, 0.0) * _UNITS) for name in names]):
                left.add(tuple(count - placed for count, placed in zip(state, filling, strict=True)))
                tried += 1
                if tried > _MOST_FILLINGS:
                    return True
        states = left
    return any(not any(state) for state in states)


def _fillings(sizes: Sequence[Sequence[int]], most: Sequence[int], free: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield counts of workers of each size that fill a node, so that none more of the last size fits."""
    if not sizes:
        yield ()
        return
    fits = min([most[0], *(amount // size for amount, size in zip(free, sizes[0], strict=True) if size)])
    for count in range(fits, -1 if len(sizes) > 1 else fits - 1, -1):
        rest = [amount - count * size for amount, size in zip(free, sizes[0], strict=True)]
        for others in _fillings(sizes[1:], most[1:], rest):
            yield (count, *others)


def _alone(ask: Ask, nodes: Sequence[Amounts]) -> str | None:
    """Why no node, even an empty one, holds one worker of this role; None: one does."""
    if any(_holds(node, ask.amounts) for node in nodes):
        return None
    many = len(nodes) > 1
    for name, amount in ask.amounts.items():
        largest = max(node.get(name, 0.0) for node in nodes)
        if not _holds({name: largest}, {name: amount}):
            has = f"the only node has {largest:g}" if largest else "the only node has none"
            if many:
                of = f"the largest of {len(nodes)} nodes has {largest:g} ({_listed(nodes, name)})"
                has = of if largest else f"none of {len(nodes)} nodes has any"
            return f"{ask.setting(name)}: {ask.one} asks for {_amount(amount, name)}; {has}"
    shown = "; ".join(_words({name: node.get(name, 0.0) for name in ask.amounts}) for node in nodes[:_SHOWN_NODES])
    more = "; ..." if len(nodes) > _SHOWN_NODES else ""
    wanted = f"{ask.one} asks for {words(ask.amounts)} on one node"
    return f"{ask.setting('CPU')}: {wanted}; none of {len(nodes)} nodes has that together ({shown}{more})"


def _sums(asked: Sequence[Ask], nodes: Sequence[Amounts], has: str) -> list[str]:
    """A line for each resource of which all workers together ask for more than the nodes have."""
    lines = []
    for name in dict.fromkeys(name for ask in asked for name in ask.amounts):
        total, wanted = _total(nodes, name), _wanted(asked, name)
        if _holds({name: total}, {name: wanted}):
            continue
        users = [ask for ask in asked if ask.of(name)]
        terms = [f"{ask.count} x {ask.of(name):g} ({ask.block})" for ask in users]
        terms[0] = f"{users[0].count} x {_amount(users[0].of(name), name)} ({users[0].block})"
        setting, expected = _way_out(asked, users, nodes, name)
        sum_of = f"{' + '.join(terms)} = {_amount(wanted, name)}"
        lines.append(f"{setting}: {sum_of}; the cluster {has} {total:g}; expected {expected}")
    return lines


def _packing(asked: Sequence[Ask], nodes: Sequence[Amounts]) -> list[str]:
    """A line where the sums fit, and yet the workers cannot be divided among the nodes."""
    if packs(asked, nodes):
        return []
    names = list(dict.fromkeys(name for ask in asked for name in ask.amounts))
    setting, expected = _way_out(asked, asked, nodes, names[0])
    terms = " + ".join(f"{ask.count} x {words(ask.amounts)} ({ask.block})" for ask in asked)
    offered = " and ".join(f"{_listed(nodes, name)} {_unit(2, name)}" for name in names)
    return [f"{setting}: {terms} cannot be divided among {len(nodes)} nodes with {offered}; expected {expected}"]


def _way_out(asked: Sequence[Ask], users: Sequence[Ask], nodes: Sequence[Amounts], name: str) -> tuple[str, str]:
    """The setting to change, with its value, and the value that would fit."""
    by_use = sorted(users, key=lambda ask: -ask.count * ask.of(name))
    for ask in by_use:
        if most := _most(asked, ask, nodes):
            return f"{ask.block}.count={ask.count}", f"at most {most} {ask.block}"
    return by_use[0].setting(name if by_use[0].of(name) else "CPU"), "a larger cluster, or less for each"


def _most(asked: Sequence[Ask], ask: Ask, nodes: Sequence[Amounts]) -> int:
    """The most workers of one role that fit beside all others; 0: not even one."""
    fits, too_many = 0, ask.count
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        if packs([replace(other, count=count) if other is ask else other for other in asked], nodes):
            fits = count
        else:
            too_many = count
    return fits


def words(amounts: Amounts) -> str:
    """`2 CPUs and 1 GPU`."""
    return _words({name: amount for name, amount in amounts.items() if amount})


def free_words(nodes: Sequence[Amounts], names: Sequence[str]) -> str:
    """`free are 1, 0 CPUs and 1, 1 GPUs on 2 nodes`."""
    amounts = " and ".join(f"{_listed(nodes, name)} {_unit(2, name)}" for name in names)
    return f"free are {amounts} on {len(nodes)} node{'s' * (len(nodes) != 1)}"


def _words(amounts: Amounts) -> str:
    return " and ".join(_amount(amount, name) for name, amount in amounts.items())


def _amount(amount: float, name: str) -> str:
    return f"{amount:g} {_unit(amount, name)}"


def _unit(amount: float, name: str) -> str:
    return name + "s" * (name in ("CPU", "GPU") and amount != 1)


def _listed(nodes: Sequence[Amounts], name: str) -> str:
    """Amounts of all nodes, the largest first."""
    amounts = sorted((node.get(name, 0.0) for node in nodes), reverse=True)
    return ", ".join([*(f"{amount:g}" for amount in amounts[:_SHOWN_NODES]), *["..."] * (len(amounts) > _SHOWN_NODES)])


def _total(nodes: Sequence[Amounts], name: str) -> float:
    return sum(node.get(name, 0.0) for node in nodes)


def _wanted(asked: Sequence[Ask], name: str) -> float:
    return sum(ask.count * ask.of(name) for ask in asked)


def _holds(free: Amounts, wanted: Amounts) -> bool:
    return all(round(amount * _UNITS) <= round(free.get(name, 0.0) * _UNITS) for name, amount in wanted.items())
