"""Frozen models that a vocabulary term reads beside the policy, and the policy as it was when the step began."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keel.algorithms.regularizers import ExactKL
from keel.algorithms.types import Credit, Rows, VocabularyTerm
from keel.learner import loading
from keel.learner.networks import ChunkTerm, Policy, in_precision
from keel.learner.packing import MicroBatch


@dataclass(frozen=True)
class FrozenView:
    """A micro-batch as a frozen model sees it: its states, and what makes logits of them."""

    states: Tensor
    """[N, H]."""
    read: Callable[[Tensor], Tensor]
    """States [n, H] -> logits [n, V]."""

    @torch.no_grad()
    def logits(self, places: Tensor, temperature: float) -> Tensor:
        return in_precision(self.read(self.states[places]), temperature)


def chunk_term_of(
    term: VocabularyTerm,
    targets: Tensor,
    advantages: Tensor,
    selected: Tensor | None,
    views: Mapping[str, FrozenView],
    temperature: float,
) -> ChunkTerm:
    """The term of an objective as something a policy can read chunk by chunk; 0 at tokens that are not selected."""

    def chunk_term(logits: Tensor, start: int, stop: int) -> Tensor:
        places = torch.arange(start, stop, device=logits.device)
        chosen = places if selected is None else places[selected[start:stop]]
        others = {name: view.logits(chosen, temperature) for name, view in views.items()}
        values = term(logits[chosen - start], targets[chosen], advantages[chosen], others)
        return torch.zeros(len(places), dtype=logits.dtype, device=logits.device).index_add(0, chosen - start, values)

    return chunk_term


class FrozenModels:
    """The models a term names, inside the learner, on its device."""

    def __init__(
        self,
        term: VocabularyTerm | None,
        names: frozenset[str],
        folder: Callable[[str], str],
        dtype: str,
        device: torch.device,
    ) -> None:
        """`folder` gives the model folder of each of the names: `reference`, `teacher`."""
        self.term, self.dtype, self.device = term, dtype, device
        self._frozen = {name: loading.load_frozen(Path(folder(name)), dtype, device) for name in names}
        self._old: tuple[dict[bytes, Tensor], Callable[[Tensor], Tensor]] | None = None

    def renew_reference(self, folder: str) -> None:
        """Read the reference from another folder, where there is one here."""
        if "reference" in self._frozen:
            self._frozen["reference"] = loading.load_frozen(Path(folder), self.dtype, self.device)

    @torch.no_grad()
    def keep_old(self, policy: Policy, micro_batches: Iterable[MicroBatch]) -> None:
        """Keep the current policy for terms that stay anchored there for all epochs: [N, H] and [V, H] numbers.

        Never [N, V]: logits are read again from states and head, chunk by chunk.
        """
        if self.term is not None and "old" in self.term.models:
            states = {micro.items.tobytes(): policy.states(micro) for micro in micro_batches}
            head = copy.deepcopy(policy.head).requires_grad_(False)
            self._old = states, functools.partial(policy.logits, head=head)

    def chunk_term(self, micro: MicroBatch, rows: Rows, credit: Credit, temperature: float) -> ChunkTerm | None:
        """The term of this micro-batch, to be read together with the policy's own logits; None without a term."""
        if self.term is None:
            return None
        chosen = credit.selected
        selected = None if chosen is None else torch.from_numpy(chosen[micro.items]).to(self.device)
        targets = micro.targets.to(self.device)
        return chunk_term_of(self.term, targets, rows.advantages, selected, self._views(micro), temperature)

    def exact_kl(self, micro: MicroBatch, temperature: float) -> ChunkTerm:
        """KL to the reference over the whole vocabulary at every token of this micro-batch, nats."""
        targets, advantages = micro.targets.to(self.device), torch.zeros(len(micro.targets), device=self.device)
        return chunk_term_of(ExactKL(1.0), targets, advantages, None, self._views(micro), temperature)

    @torch.no_grad()
    def _views(self, micro: MicroBatch) -> dict[str, FrozenView]:
        views = {name: FrozenView(frozen.states(micro), frozen.logits) for name, frozen in self._frozen.items()}
        if self._old is not None:
            states, read = self._old
            views["old"] = FrozenView(states[micro.items.tobytes()], read)
        return views
