"""Selects which completions of a prompt are compared, also by the disagreement of a reward ensemble. Pure numpy.

Pairs of one prompt: iterative preference learning under KL (2312.11456) and Sim-OPRL (2406.18450) in its bandit form,
where dynamics are known, so candidates are sampled completions and only rewards are uncertain.
Shapes: k completions of a prompt, M ensemble members, P pairs of the step.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel.algorithms.advantages import vary
from keel.config.pairs import PairSettings


def plausible(members: np.ndarray) -> np.ndarray:
    """Candidates that at least one member holds to be the best: sorted places, from [M, k]."""
    return np.unique(members.argmax(1))


def most_disagreeing(members: np.ndarray, among: np.ndarray) -> tuple[int, int, float]:
    """The pair among these candidates whose margin the members see most differently, and by how much.

    argmax over (a, b) of max_{i,j} |(R_i(a) - R_i(b)) - (R_j(a) - R_j(b))|. Restricted to the plausible set, or it
    would pick whatever is furthest from anything the members know.
    """
    margins = members[:, among][:, :, None] - members[:, among][:, None, :]
    spread = np.triu(np.ptp(margins, axis=0))
    a, b = np.unravel_index(spread.argmax(), spread.shape)
    return int(among[a]), int(among[b]), float(spread[a, b])


def acceptance(rewards: np.ndarray, temperature: float, before: float | None) -> np.ndarray:
    """Probability to keep each of a prompt's samples in one stage of rejection sampling, [k] -> [k].

    exp((1/eta_i - 1/eta_{i-1}) (r - max r)) carries samples of pi exp(r/eta_{i-1}) to pi exp(r/eta_i); before None is
    the policy itself. Many small stages keep acceptance high (multi-step rejection sampling, 2312.11456).
    """
    sharper = 1 / temperature - (0.0 if before is None else 1 / before)
    return np.exp(sharper * (rewards - rewards.max()))


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the policy it samples, nats: log n - (n-1)/n, an upper bound where samples repeat."""
    return float(np.log(n) - (n - 1) / n)


@dataclass(frozen=True)
class Pairs:
    """The comparisons of a step."""

    chosen: np.ndarray
    """[P] row numbers."""
    rejected: np.ndarray
    """[P] row numbers."""
    dropped: Mapping[str, int]
    """Prompts or pairs left out, by reason: tie, unfinished, settled."""
    metrics: Mapping[str, float]


Choice = Callable[[np.ndarray, np.random.Generator], list[tuple[Any, Any]]]
"""Selection rewards [k] and randomness -> candidate pairs, in any order."""


def _max_random(rewards: np.ndarray, random: np.random.Generator) -> list[tuple[Any, Any]]:
    best = rewards.argmax()
    return [(best, random.choice(np.delete(np.arange(len(rewards)), best)))]


CHOICES: dict[str, Choice] = {
    "max_min": lambda rewards, random: [(rewards.argmax(), rewards.argmin())],
    "max_random": _max_random,
    "random": lambda rewards, random: [tuple(random.choice(len(rewards), 2, replace=False))],
    "max_max": lambda rewards, random: [tuple(np.argsort(-rewards, kind="stable")[:2])],
    # the first sample is the policy's, the best of the others its best-of-(k-1) enhancer's: either may win
    "best_of_n_vs_policy": lambda rewards, random: [(1 + rewards[1:].argmax(), 0)],
    "all": lambda rewards, random: [(a, b) for a in range(len(rewards)) for b in range(a)],
}


@dataclass(frozen=True)
class Candidates:
    """What selection knows of the step's completions, one entry a row."""

    tickets: np.ndarray
    seeds: np.ndarray
    rewards: np.ndarray
    """What pairs are selected by."""
    judged: np.ndarray
    """What orders a pair; NaN where the judge failed."""
    lengths: np.ndarray
    finished: np.ndarray
    members: np.ndarray
    """[M, rows] rewards of the ensemble, M may be 1."""


def select(config: PairSettings, seen: Candidates) -> Pairs:
    """Pairs of every prompt, ordered by the judge; ties and prompts without a pair are counted, never trained on."""
    pairs: list[tuple[int, int]] = []
    dropped: Counter[str] = Counter()
    sizes, spreads = [], []
    selected_by = seen.rewards - config.length_penalty * seen.lengths
    for ticket in np.unique(seen.tickets):
        rows = np.flatnonzero((seen.tickets == ticket) & (seen.finished | (not config.finished_only)))
        if len(rows) < 2:
            dropped["unfinished"] += 1
            continue
        if config.selection == "most_disagreeing":
            among = plausible(seen.members[:, rows])
            sizes.append(len(among))
            if len(among) == 1:
                dropped["settled"] += 1
                continue
            a, b, spread = most_disagreeing(seen.members[:, rows], among)
            spreads.append(spread)
            pairs_of_prompt = [(a, b)]
        else:
            pairs_of_prompt = CHOICES[config.selection](selected_by[rows], np.random.default_rng(seen.seeds[rows[0]]))
        for a, b in pairs_of_prompt:
            judged = seen.judged[[rows[a], rows[b]]]
            margin = judged[0] - judged[1]
            if not (abs(margin) > config.min_margin and vary(judged)):
                dropped["tie" if np.isfinite(margin) else "unjudged"] += 1
            else:
                pairs.append((int(rows[a]), int(rows[b])) if margin > 0 else (int(rows[b]), int(rows[a])))
    metrics = {"pairs": float(len(pairs))}
    if sizes:
        metrics["plausible_completions"] = float(np.mean(sizes))
        metrics["settled_ratio"] = float(np.mean(np.array(sizes) == 1))
        metrics["pair_disagreement"] = float(np.mean(spreads)) if spreads else 0.0
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return Pairs(table[:, 0], table[:, 1], dict(dropped), metrics)
