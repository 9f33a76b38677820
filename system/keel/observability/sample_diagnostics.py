"""What a batch of samples says about over-optimization without a gold: repetition, templates, tails, correlations.

    one number a completion   repetition, reference_nll
    one number a batch        template_overlap, compression_ratio, correlation, tail_index, importance

Pure numpy. Rows are completions of the batch; a statistic that the rows cannot give is None.
"""

import math
import zlib

import numpy as np
import pyarrow as pa
from scipy import sparse
from scipy.special import logsumexp

from keel import schema

_GRAM = 3
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MIN_TAIL_ROWS = 16
_OVERLAP_ROWS = 512


def trigrams(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Every 3-gram of token ids in the batch: its number and its row, each [3-grams]; equal 3-grams, equal numbers."""
    tokens, lengths = schema.ragged(batch, "completion_tokens")
    rows = np.repeat(np.arange(len(lengths)), lengths)
    if len(tokens) < _GRAM:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    inside = rows[: 1 - _GRAM] == rows[_GRAM - 1 :]
    places = [tokens[start : len(tokens) - _GRAM + 1 + start].astype(np.uint64) for start in range(_GRAM)]
    hashes = (places[0] * _MIX + places[1]) * _MIX + places[2]  # modulo 2^64
    _, numbers = np.unique(hashes[inside], return_inverse=True)
    return numbers, rows[: 1 - _GRAM][inside]


def repetition(batch: pa.RecordBatch) -> np.ndarray:
    """1 - distinct / all 3-grams of each completion, [rows] in [0, 1); 0 where it has fewer than three tokens."""
    grams, rows = trigrams(batch)
    counts = np.bincount(rows, minlength=batch.num_rows)
    width = int(grams.max()) + 1 if len(grams) else 1
    distinct = np.bincount(np.unique(rows * width + grams) // width, minlength=batch.num_rows)
    return np.where(counts > 0, 1 - distinct / np.maximum(counts, 1), 0.0)


def template_overlap(batch: pa.RecordBatch) -> float | None:
    """Mean over pairs of completions of different prompts of |A & B| / |A | B|, their sets of 3-grams; None: no pair.

    Near 0 where answers depend on their question, towards 1 where one template answers all of them (template collapse,
    2604.06268), which entropy within a prompt does not show. Two empty sets have overlap 0.
    """
    overlaps, pairs = prompt_overlaps(batch)
    return float(overlaps.sum() / pairs.sum()) if pairs.any() else None


def prompt_overlaps(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """That overlap summed over the pairs of completions of every two prompts, and the number of pairs.

    [prompts, prompts] each, 0 on the diagonal. Of more than 512 rows, 512 evenly spaced ones: the work grows with their
    square.
    """
    if batch.num_rows > _OVERLAP_ROWS:
        batch = batch.take(pa.array(np.linspace(0, batch.num_rows - 1, _OVERLAP_ROWS).round().astype(int)))
    prompts = np.unique(batch.column("ticket").to_numpy(), return_inverse=True)[1]
    grams, rows = trigrams(batch)
    shape = (batch.num_rows, int(grams.max()) + 1 if len(grams) else 1)
    sets = sparse.csr_array((np.ones(len(grams)), (rows, grams)), shape=shape)
    sets.data[:] = 1.0  # repeated 3-grams were added up
    sizes = np.asarray(sets.sum(axis=1)).ravel()
    shared = (sets @ sets.T).toarray()
    union = sizes[:, None] + sizes[None, :] - shared
    overlap = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    member = prompts[:, None] == np.arange(prompts.max(initial=-1) + 1)
    counts = member.sum(0, dtype=np.float64)
    different = ~np.eye(len(counts), dtype=bool)
    return (member.T @ overlap @ member) * different, np.outer(counts, counts) * different


def compression_ratio(batch: pa.RecordBatch) -> float | None:
    """Bytes of all completions joined by line ends over their bytes after zlib; higher is more repetitive.

    Shaib et al. 2403.00553. None where the batch holds no text. Comparable between batches of equal size alone.
    """
    text = "\n".join(batch.column("completion").to_pylist()).encode("utf8", "replace")
    return len(text) / len(zlib.compress(text)) if text.strip() else None


def reference_nll(batch: pa.RecordBatch) -> np.ndarray:
    """-log pi_ref(y | x) / |y| of each completion, nats a token, [rows]."""
    logprobs, lengths = schema.ragged(batch, "reference_logprobs")
    return -schema.row_sums(logprobs, lengths) / lengths


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation over rows where both are finite; None for fewer than three, or where one is constant."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3 or np.ptp(x[both]) == 0 or np.ptp(y[both]) == 0:
        return None
    return float(np.corrcoef(x[both], y[both])[0, 1])


def tail_index(values: np.ndarray) -> float | None:
    """Hill's estimate of how heavy the upper tail is: mean of log(x_i / x_(k+1)) over the k largest, no unit.

    x are excesses over the median, k = ceil(sqrt(n)). Near 0: light; above 1/2: no variance. Where the error of a
    proxy is heavy-tailed, a bound on KL does not bound over-optimization (2407.14503). None for fewer than 16 rows or
    fewer than k + 1 excesses. Of one batch it is a noisy number: its standard error is about index / sqrt(k).
    """
    values = values[np.isfinite(values)]
    if len(values) < _MIN_TAIL_ROWS:
        return None
    excesses = np.sort(values - np.median(values))[::-1]
    count = math.ceil(math.sqrt(len(values)))
    if excesses[count] <= 0:
        return None
    return float(np.log(excesses[:count] / excesses[count]).mean())


def importance(log_ratio: np.ndarray) -> tuple[float, float] | None:
    """Mass and effective sample ratio of the weights w = pi_ref(y) / pi(y) = exp(-log_ratio) over sampled completions.

    mean(w) estimates the share of the reference's completions that the policy can still sample (1 where it covers all
    of them); (sum w)^2 / (n sum w^2), in (0, 1], says on how much of the batch that estimate rests.
    """
    weights = -log_ratio[np.isfinite(log_ratio)]
    if not len(weights):
        return None
    total, squares, count = logsumexp(weights), logsumexp(2 * weights), math.log(len(weights))
    return float(np.exp(total - count)), float(np.exp(2 * total - squares - count))
