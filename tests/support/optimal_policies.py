"""Policies that are optimal for each arm, over a vocabulary of whole answers."""

import numpy as np

PROXY = np.array([0.2, 0.6, 1.0, 0.4, 3.0] + [0.0] * 2000)


GOLD = np.array([0.2, 0.6, 1.0, 0.4, -2.0] + [-3.0] * 2000)


REFERENCE = np.array([0.45, 0.30, 0.15, 0.0998, 1e-4] + [1e-4 / 2000] * 2000)


OPTIMA = {
    ("kl", 0.2): (2.8199, -1.7566, 8.2213, 0.3551, 0.9153),
    ("kl", 0.5): (0.6748, 0.6083, 0.2382, 1.3163, 0.0133),
    ("kl", 1.0): (0.5506, 0.5443, 0.0468, 1.3030, 0.0012),
    ("entropy", 0.2): (2.9981, -2.0005, 9.2042, 0.0104, 0.9993),
    ("entropy", 0.5): (0.5049, -2.8109, 8.6720, 6.7808, 0.1669),
    ("entropy", 2.0): (0.0083, -2.9882, 9.1524, 7.6017, 0.0022),
}


def optimum(arm: str, temperature: float) -> np.ndarray:
    weights = np.exp((PROXY - PROXY.max()) / temperature) * (REFERENCE if arm == "kl" else 1.0)
    return weights / weights.sum()
