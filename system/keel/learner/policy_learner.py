"""DeepSpeed behind the Learner protocol: one rank of a learner group. Every rank gets all rows and trains its own.

step:  measure   log-probs and values of the whole step under the current weights, if the objective reads them;
                 the exact KL on a share of its completions, if asked for
       weigh     the whole batch (numpy, alike on every rank)
       for epoch: for micro-batch of this rank: forward -> objective.loss -> backward
                  clip, Adam, learning rate of the step                               -> version + 1
       adapt     coefficients that move with what the step saw
"""

import functools
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from keel import schema
from keel.algorithms import registry, regularizers
from keel.algorithms.types import Credit, Measured, Outputs, Rows, labeled
from keel.config.run import LearnerSpec
from keel.errors import NotFinite
from keel.learner import activation_checkpointing, forward_contract, loading, optimizer, packing, weights
from keel.learner.engine import Engine, join_ranks
from keel.learner.forward_contract import Verdict
from keel.learner.frozen_models import FrozenModels
from keel.learner.networks import ChunkTerm, Critic, Learnable, Policy
from keel.learner.packing import MicroBatch, PackingPlan
from keel.observability import diagnostics
from keel.protocols import LoadReceipt, StepReport, Weights


class DeepSpeedLearner:
    """One rank. All public methods are collective: every rank must be called with the same arguments."""

    def __init__(
        self,
        settings: LearnerSpec,
        folder: str,
        others: Mapping[str, str],
        rank: int,
        ranks: int,
        address: str,
        port: int,
    ) -> None:
        """`others`: folders of the frozen models that live in the learner (reference, teacher) and of `critic`."""
        learners = settings.learners
        join_ranks(learners, rank, ranks, address, port, settings.deadlines.step_seconds)
        self.settings, self.folder, self.others = settings, folder, others
        self.rank, self.ranks = rank, ranks
        self.version = 0
        self.objective = registry.build(settings)
        self._engine = Engine(learners, ranks, settings.run.steps)
        self.device = self._engine.device
        dtype = "float32" if learners.precision == "fp32" else "bfloat16"
        policy = loading.load_policy(Path(folder), dtype)
        policy.keep(learners.head_kept_bytes, learners.head_chunk_tokens)
        activation_checkpointing.enable(policy.model, learners.activation_checkpointing)
        torch.manual_seed(settings.run.seed)  # of new value heads
        module = Learnable(policy, self._critic(policy, dtype)).to(self.device)
        rate = module.critic.config.learning_rate if module.critic is not None else None
        self._engine.drive(module, optimizer.optimizer(learners, module, rate))
        verdicts = [forward_contract.verdict(folder, settings.max_model_tokens) for folder in self._folders()]
        self._verdict = functools.reduce(Verdict.both, verdicts)
        frozen_dtype = settings.reference.dtype if settings.reference else dtype
        names = self._frozen_names()
        self._frozen_models = FrozenModels(self.objective.vocabulary, names, self._folder_of, frozen_dtype, self.device)

    def _folder_of(self, name: str) -> str:
        return self.others.get(name, self.folder)

    def _frozen_names(self) -> frozenset[str]:
        """Frozen models in the learner: those of the vocabulary term, and the reference where a share is measured."""
        term = self.objective.vocabulary
        names = term.models - {"old"} if term is not None else frozenset()
        return names | ({"reference"} if self.settings.regularizer.kl.exact_share else frozenset())

    def _folders(self) -> set[Path]:
        """Folders of all models that read this rank's micro-batches."""
        critic = getattr(self.settings.objective, "critic", None)
        names = set(self._frozen_names())
        names |= {"critic"} if critic is not None and critic.trunk == "own" else set()
        return {Path(self.folder), *(Path(self._folder_of(name)) for name in names)}

    def _critic(self, policy: Policy, dtype: str) -> Critic | None:
        config = getattr(self.settings.objective, "critic", None)
        if config is None:
            return None
        folder = Path(self._folder_of("critic"))
        trunk = loading.load_trunk(folder, dtype) if config.trunk == "own" else None
        if trunk is not None:
            activation_checkpointing.enable(trunk, self.settings.learners.activation_checkpointing)
        hidden = (trunk if trunk is not None else policy.model).config.get_text_config().hidden_size
        critic = Critic(config, trunk, hidden, self.objective.heads).to(loading.DTYPES[dtype])
        if trunk is not None and (head := loading.score_head(folder)):
            critic.start_from(*head)
        return critic

    def step(self, batch: pa.RecordBatch) -> StepReport:
        """Make `objective.epochs` optimizer updates. Raises NotFinite before an update that would not be finite."""
        state, updates = self.objective.state(), self._engine.updates
        try:
            return self._step(batch)
        except NotFinite as error:
            self.objective.restore(state)
            error.weights_moved = self._engine.updates > updates
            raise

    def _step(self, batch: pa.RecordBatch) -> StepReport:
        started = time.monotonic()
        plan = self._plan(batch)
        rate = self._engine.set_rate(self.version)
        coefficients = self.objective.coefficients()
        epochs = self.objective.epochs
        micro_batches = (micro for micro, _ in self._micro_batches(batch, plan))
        self._frozen_models.keep_old(self._engine.module.policy, micro_batches)
        measured = self._measure(batch, plan, self._asked(epochs))
        exact_kl = self._exact_kl(batch)
        seen = self.objective.visible(batch)
        credit = self.objective.credited(seen, measured)
        old = measured.logprobs if epochs > 1 and self.objective.reads_old else None
        sums = first = self._update(batch, plan, credit, old)
        for _ in range(epochs - 1):
            if self.objective.weighs_every_epoch:
                credit = self.objective.credited(seen, self._measure(batch, plan, self._asked(epochs)))
            sums = self._update(batch, plan, credit, old)
        self.objective.adapt(seen, first)
        self.version += 1
        metrics = dict(diagnostics.summarize(batch)) | dict(credit.metrics) | sums | coefficients | exact_kl
        # later updates move away from the sampler on purpose
        metrics |= {name: first[name] for name in ("gap_nats", "fresh_gap_nats") if name in first}
        metrics |= {"learning_rate": rate, "step_seconds": time.monotonic() - started}
        metrics |= {"micro_batches": float(len(plan.real[self.rank])), "trained_tokens": float(credit.num_tokens)}
        return StepReport(self.version, labeled(metrics), credit.counts, credit.finished)

    def _asked(self, epochs: int) -> frozenset[str]:
        """What must be measured before weighing; several updates also need the log-probs they start from."""
        return self.objective.measures | ({"logprobs"} if epochs > 1 and self.objective.reads_old else frozenset())

    def _update(
        self, batch: pa.RecordBatch, plan: PackingPlan, credit: Credit, old: np.ndarray | None
    ) -> dict[str, float]:
        """One optimizer update over this rank's micro-batches; metric sums added over all ranks."""
        sums: dict[str, float] = defaultdict(float)
        fresh = self._fresh(batch)
        num_fresh = int(fresh.sum())
        for micro, chunks in self._micro_batches(batch, plan):
            rows = self._rows(batch, micro, credit, old)
            chunk_term = None
            if self.objective.needs_vocabulary:
                chunk_term = self._frozen_models.chunk_term(micro, rows, credit, self.settings.sampling.temperature)
            outputs = self._forward(micro, chunks, self.objective.needs_entropy, chunk_term)
            terms = self.objective.loss(rows, outputs, credit)
            self._engine.backward(terms.loss, real=micro.real)
            if micro.real:
                for name, share in terms.sums.items():
                    sums[name] += share
                if rows.sampler is not None:
                    difference = (outputs.logprobs.detach() - rows.sampler).abs()
                    sums["gap_nats"] += difference.sum().item() / credit.num_tokens
                    if num_fresh:
                        own_tokens = torch.from_numpy(fresh[micro.items]).to(self.device)
                        sums["fresh_gap_nats"] += difference[own_tokens].sum().item() / num_fresh
        sums = self._engine.sum_named(sums)
        return sums | {"grad_norm": self._engine.update(self.version + 1, sums["loss"], sums)}

    def _fresh(self, batch: pa.RecordBatch) -> np.ndarray:
        """bool [tokens] of completion tokens that were sampled under the current weights; all False for stored rows."""
        lengths = schema.lengths(batch, "completion_tokens")
        if "weight_versions" not in batch.schema.names:
            return np.zeros(int(lengths.sum()), bool)
        fresh = schema.ragged(batch, "weight_versions")[0] == self.version
        return fresh & np.repeat(schema.sampled(batch), lengths)

    def compare(self, batch: pa.RecordBatch) -> dict[str, float]:
        """|learner - sampler| log-prob of the stored completion tokens: mean and largest, nats."""
        logprobs = self._measure(batch, self._plan(batch), frozenset({"logprobs"})).logprobs
        sampler, _ = schema.ragged(batch, "completion_logprobs")
        difference = np.abs(logprobs - sampler)
        return {"gap_mean_nats": float(difference.mean()), "gap_max_nats": float(difference.max())}

    def assess(self, batch: pa.RecordBatch) -> dict[str, float]:
        """The objective's numbers on held-out rows under the current weights; nothing is learned."""
        measured = self._measure(batch, self._plan(batch), frozenset({"logprobs"}))
        return self.objective.assess(self.objective.visible(batch), measured)

    def publish(self) -> tuple[Weights | None, LoadReceipt | None]:
        """The current policy as one buffer and its proof, on rank 0; the others take part in gathering."""
        started = time.monotonic()
        named = self._full_parameters()
        if self.rank != 0:
            return None, None
        packed = weights.pack(named.items(), self.version, self.settings.weights_dtype)
        return packed, LoadReceipt(packed.version, packed.digest, packed.buffer.nbytes, time.monotonic() - started)

    def save(self, directory: str) -> None:
        """Write `learner/` (every rank its share) and `policy/` (rank 0)."""
        self._engine.save(directory, self.version)
        self.export(f"{directory}/policy")

    def state(self) -> dict[str, Any]:
        """What changes the run and is not in the weights, alike on every rank: for state.json."""
        return self.objective.state()

    def export(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder, on rank 0; the others take part in gathering."""
        named = self._full_parameters()
        if self.rank == 0:
            from keel.learner import export

            coefficients = self.objective.coefficients()
            export.policy(Path(folder), Path(self.folder), named, self.settings, self.version, coefficients)

    def restore_checkpoint(self, directory: str) -> int:
        """Continue from what any number of ranks saved; returns its version."""
        self.version = self._engine.restore_checkpoint(directory)
        self.objective.restore(json.loads((Path(directory) / "state.json").read_text())["objective"])
        return self.version

    def set_multipliers(self, kl: float, learning_rate: float) -> None:
        """Multiply the KL coefficient and the learning rate of later steps: the guard's actions."""
        self.objective.multiply_kl(kl)
        self._engine.rate_multiplier = learning_rate

    def renew_reference(self, folder: str) -> None:
        """Read the frozen reference inside the learner from another folder, where there is one."""
        self._frozen_models.renew_reference(folder)

    def _plan(self, batch: pa.RecordBatch) -> PackingPlan:
        learners, verdict = self.settings.learners, self._verdict
        budget = packing.TokenBudget(
            learners.tokens_per_batch,
            learners.shared_prompt_tokens if verdict.shared else 0,
            learners.head_chunk_tokens,
            min(learners.packed_tokens, learners.tokens_per_batch) if verdict.packed else 0,
        )
        return packing.plan(batch, self.ranks, budget)

    def _micro_batches(self, batch: pa.RecordBatch, plan: PackingPlan) -> Iterator[tuple[MicroBatch, int]]:
        passes = zip(plan.micro_batches[self.rank], plan.real[self.rank], plan.head_chunks, strict=True)
        for units, real, chunks in passes:
            yield packing.tensors(batch, units, real=real), chunks

    def _rows(self, batch: pa.RecordBatch, micro: MicroBatch, credit: Credit, old: np.ndarray | None) -> Rows:
        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values[micro.items].astype(np.float32)).to(self.device)

        def stored(name: str) -> Tensor | None:
            return column(schema.ragged(batch, name)[0]) if name in batch.schema.names else None

        lengths = schema.lengths(batch, "completion_tokens")[micro.rows]
        mixed = 0 < self.settings.sampling.stored_ratio < 1
        return Rows(
            advantages=column(credit.advantages),
            lengths=torch.from_numpy(lengths.astype(np.float32)).to(self.device),
            row_of_item=micro.row_of_item.to(self.device),
            sampler=stored("completion_logprobs"),
            old=None if old is None else column(old),
            reference=stored("reference_logprobs"),
            targets=None if credit.targets is None else column(credit.targets),
            old_values=None if credit.old_values is None else column(credit.old_values),
            penalized=None if credit.penalized is None else column(credit.penalized),
            stored=torch.from_numpy(~schema.sampled(batch)[micro.rows]).to(self.device) if mixed else None,
        )

    def _forward(self, micro: MicroBatch, chunks: int, entropy: bool, chunk_term: ChunkTerm | None = None) -> Outputs:
        temperature = self.settings.sampling.temperature
        return Outputs(*self._engine(micro, temperature, chunks, entropy, chunk_term))

    @torch.no_grad()
    def _measure(self, batch: pa.RecordBatch, plan: PackingPlan, asked: frozenset[str]) -> Measured:
        """Log-probs [tokens] and values [tokens, K] of the whole step under the current weights, every rank's."""
        if not asked:
            return Measured(version=self.version)
        num_tokens = int(schema.lengths(batch, "completion_tokens").sum())
        num_heads = len(self.objective.heads) if "values" in asked else 0
        flat = torch.zeros(num_tokens, 1 + num_heads, device=self.device)
        for micro, chunks in self._micro_batches(batch, plan):
            outputs = self._forward(micro, chunks, entropy=False)
            if micro.real:
                columns = [outputs.logprobs[:, None]] + ([outputs.values] if num_heads else [])
                flat[torch.from_numpy(micro.items).to(self.device)] = torch.cat(columns, dim=1)  # type: ignore[arg-type]
        measured = self._engine.sum_over_ranks(flat).cpu().numpy()
        if not np.isfinite(measured).all():
            raise NotFinite(f"step {self.version + 1}: log-probs or values of the learner are not finite")
        return Measured(measured[:, 0], measured[:, 1:] if num_heads else None, self.version)

    @torch.no_grad()
    def _exact_kl(self, batch: pa.RecordBatch) -> dict[str, float]:
        """KL(pi, ref) over the whole vocabulary before the update, summed over a completion, mean over a share of them.

        At the places the sampler came to, at the sampling temperature. Nothing where no share is asked for.
        """
        share, sampled = self.settings.regularizer.kl.exact_share, np.flatnonzero(schema.sampled(batch))
        if not share or not len(sampled):
            return {}
        seeds = batch.column("seed").to_numpy()[sampled]
        order = np.argsort(regularizers.token_draws(seeds, np.ones(len(seeds), int), self.version), kind="stable")
        rows, total = batch.take(np.sort(sampled[order[: math.ceil(share * len(seeds) - 1e-6)]])), 0.0
        for micro, chunks in self._micro_batches(rows, self._plan(rows)):
            chunk_term = self._frozen_models.exact_kl(micro, self.settings.sampling.temperature)
            outputs = self._forward(micro, chunks, entropy=False, chunk_term=chunk_term)
            assert outputs.vocabulary is not None
            total += outputs.vocabulary.sum().item() if micro.real else 0.0
        return self._engine.sum_named({"kl_exact_nats": total / rows.num_rows})

    def _full_parameters(self) -> dict[str, Tensor]:
        """The whole policy under checkpoint names in the published number format, on rank 0; the others take part."""
        policy = self._engine.module.policy
        named = self._engine.gather(policy, self.rank, loading.DTYPES[self.settings.weights_dtype])
        return policy.to_hf_names(named) if self.rank == 0 else {}
