"""Peak memory and time of log-probs and full-vocabulary entropy, forward and backward, through an output head.

Usage: python benchmarks/head_memory.py [--tokens N] [--vocabulary V] [--hidden H] [--repetitions R] [--chunk N]

    naive   whole logits [N, V] in fp32, log_softmax, gather, entropy as -sum p log p, autograd
    keel    keel.learner.networks.Policy.read in pieces of --chunk tokens
    each once with entropy and once without (what keel does when no setting asks for entropy)

Loss: a weighted sum of log-probs plus a weighted sum of entropies. Head weights and states are fp32 or bf16, log-probs
and entropies fp32 in both. Every variant has a process of its own. Peak: largest resident set during a repetition
(VmHWM, reset by /proc/self/clear_refs, so Linux only) above the resident set before it, when states, weights, their
gradients and everything a first call allocates are there; the largest of all repetitions. Seconds: median of the
repetitions, which alternate between the variants. Ratios: naive / this variant for the same outputs, above 1 is better.
Before that, values and gradients of both are compared in another process: relative error in the Frobenius norm at most
1e-4 in fp32, 2e-2 in bf16 (8 bits of mantissa; the pieces' gradients of the weight are added in bf16).

Exits with 1 when values or gradients differ, or when with entropy naive / keel is below 3 in memory or keel takes more
than 10 % longer. Without entropy the same is printed and not judged: a matrix product more (each piece's logits are
computed again in the backward pass, 4 products in place of 3) is then most of the time.
"""

import argparse
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from keel.config.workers import LearnerSettings
from keel.learner.networks import Policy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
WARM_UP_TOKENS = 8
MIN_PEAK_RATIO = 3.0
MAX_SLOWDOWN = 1.1


KEPT_BYTES = LearnerSettings().head_kept_bytes


@dataclass(frozen=True)
class Size:
    tokens: int
    vocabulary: int
    hidden: int
    chunk: int


@dataclass(frozen=True)
class Variant:
    code: str
    """naive or keel."""
    dtype: str
    entropy: bool

    @property
    def label(self) -> str:
        return self.code + ("" if self.entropy else ", no entropy")


class HeadOnly(nn.Module):
    """A language model without a trunk: what Policy.read asks of one."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_model = nn.Identity()
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False, dtype=dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.base_model(input_ids).last_hidden_state))


class Work:
    """States, targets, head and loss weights; alike for all variants of a dtype."""

    def __init__(self, size: Size, dtype: str) -> None:
        torch.manual_seed(0)
        self.size = size
        self.model = HeadOnly(size, DTYPES[dtype])
        nn.init.normal_(
            self.model.head.weight, std=2 / size.hidden**0.5
        )  # logits of deviation 2: p neither flat nor 0/1
        self.states = torch.randn(size.tokens, size.hidden).to(DTYPES[dtype]).requires_grad_()
        self.targets = torch.randint(size.vocabulary, (size.tokens,))
        self.by_logprob, self.by_entropy = torch.randn(size.tokens), torch.randn(size.tokens)
        self.policy = Policy(self.model)
        self.policy.keep(KEPT_BYTES, size.chunk)

    def run(self, code: str, entropy: bool, tokens: int | None = None) -> list[Tensor]:
        """Forward and backward of the first tokens; log-probs and entropies. Gradients add up in .grad."""
        used = slice(tokens)
        states, targets = self.states[used], self.targets[used]
        logprobs, entropies = (self._keel if code == "keel" else self._naive)(states, targets, entropy)
        loss = (self.by_logprob[used] * logprobs).sum()
        if entropies is not None:
            loss = loss + (self.by_entropy[used] * entropies).sum()
        loss.backward()
        return [values.detach() for values in (logprobs, entropies) if values is not None]

    def _naive(self, states: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        log_p = self.model.head(states).float().log_softmax(-1)
        logprobs = log_p.gather(-1, targets[:, None]).squeeze(-1)
        return logprobs, -(log_p.exp() * log_p).sum(-1) if entropy else None

    def _keel(self, states: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        chunks = -(-len(targets) // self.size.chunk)
        return self.policy.read(states, targets, temperature=1.0, head_chunks=chunks, entropy=entropy)[:2]

    def gradients(self) -> list[Tensor]:
        """Of states and weight; the next run starts from none."""
        found = [self.states.grad, self.model.head.weight.grad]
        self.states.grad = self.model.head.weight.grad = None
        return found


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (largest since the last reset) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def prepare(size: Size, variant: Variant) -> None:
    """Make this process one of the variant: inputs, gradients, and one call on a few tokens."""
    global work
    work = Work(size, variant.dtype)
    work.run(variant.code, variant.entropy, WARM_UP_TOKENS)


def measure(variant: Variant) -> tuple[int, float]:
    """Peak bytes above what was resident before, and seconds, of one repetition."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    work.run(variant.code, variant.entropy)
    seconds = time.perf_counter() - started
    return resident("VmHWM") - before, seconds


def disagreement(size: Size, dtype: str) -> float:
    """Largest relative error of any value or gradient between naive and keel, with and without entropy."""
    work, largest = Work(size, dtype), 0.0
    for entropy in (True, False):
        expected = work.run("naive", entropy) + work.gradients()
        found = work.run("keel", entropy) + work.gradients()
        errors = [torch.dist(a.float(), b.float()) / b.float().norm() for a, b in zip(found, expected, strict=True)]
        largest = max(largest, *map(float, errors))
    return largest


def process(*arguments: object) -> ProcessPoolExecutor:
    """A fresh process; with arguments, prepared by them."""
    initializer = prepare if arguments else None
    return ProcessPoolExecutor(1, get_context("spawn"), initializer, arguments)


def measured(size: Size, dtype: str, repetitions: int) -> dict[Variant, tuple[int, float]]:
    """Largest peak and median seconds of each variant, repetitions taking turns."""
    variants = [Variant(code, dtype, entropy) for entropy in (True, False) for code in ("naive", "keel")]
    workers = {variant: process(size, variant) for variant in variants}
    seen: dict[Variant, list[tuple[int, float]]] = {variant: [] for variant in variants}
    for _ in range(repetitions):
        for variant, worker in workers.items():
            seen[variant].append(worker.submit(measure, variant).result())
    for worker in workers.values():
        worker.shutdown()
    return {
        variant: (max(peak for peak, _ in pairs), statistics.median(seconds for _, seconds in pairs))
        for variant, pairs in seen.items()
    }


def report(size: Size, repetitions: int) -> list[str]:
    """Print the table; what is not as it should be."""
    rows = ["| variant | dtype | peak MiB | ratio | median seconds | ratio |", "|---|---|---|---|---|---|"]
    wrong = []
    for dtype in DTYPES:
        with process() as worker:
            error = worker.submit(disagreement, size, dtype).result()
        if not error <= TOLERANCE[dtype]:
            wrong.append(f"{dtype}: values or gradients differ by {error:.1e}, more than {TOLERANCE[dtype]:.0e}")
        table = measured(size, dtype, repetitions)
        for variant, (peak, seconds) in table.items():
            base_peak, base_seconds = table[Variant("naive", dtype, variant.entropy)]
            memory, speed = base_peak / peak, base_seconds / seconds
            rows.append(
                f"| {variant.label} | {dtype} | {peak / 2**20:.0f} | {memory:.2f} | {seconds:.2f} | {speed:.2f} |"
            )
            judged = variant.code == "keel" and variant.entropy
            if judged and memory < MIN_PEAK_RATIO:
                wrong.append(f"{variant.label}, {dtype}: peak ratio {memory:.2f}, below {MIN_PEAK_RATIO}")
            if judged and seconds > MAX_SLOWDOWN * base_seconds:
                wrong.append(f"{variant.label}, {dtype}: {seconds / base_seconds - 1:.0%} slower than naive")
        print(f"{dtype}: naive and keel agree to {error:.1e}", file=sys.stderr)
    print("\n".join(rows))
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=512, help="tokens in the head at once (keel)")
    given = vars(parser.parse_args())
    failures = report(repetitions=given.pop("repetitions"), size=Size(**given))
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(1 if failures else 0)
