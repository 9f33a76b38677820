"""Networks: a policy that gives token log-probs and entropy in fp32, a critic on its own or the policy's states.

Shapes: U sequences, T padded tokens, H hidden size, V vocabulary, N completion tokens of all rows (flat, row by row),
K value heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keel.algorithms import critics
from keel.algorithms.credit import VocabularyTerm
from keel.batch import MicroBatch
from keel.objective_settings import CriticSettings

Piece = Callable[[Tensor, int, int], Tensor]
"""Something of each token that reads the whole vocabulary: logits [n, V] in fp32 at the temperature, the places start
to stop of these tokens among the N -> [n]."""


class TokenLogprobs(torch.autograd.Function):
    """Log-prob of the target and, if asked, entropy of each row of logits, in fp32, both at the same temperature.

        z = logits / temperature,  p = softmax(z)
        logprob = z_y - logsumexp(z)          d logprob / dz = onehot(y) - p
        entropy = logsumexp(z) - sum(p z)     d entropy / dz = -p (log p + entropy)

    Logits [n, V] of any float type are kept as they are for the backward pass; fp32 copies live only inside
    forward and backward. Returns fp32 tensors [n] (float64 in, float64 out); None for an entropy nobody asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        scaled = in_precision(logits, temperature)
        normaliser = torch.logsumexp(scaled, dim=-1)
        logprob = scaled.gather(-1, targets[:, None]).squeeze(-1) - normaliser
        entropy = None
        if with_entropy:
            probabilities = (scaled - normaliser[:, None]).exp_()
            entropy = normaliser - torch.linalg.vecdot(probabilities, scaled)
        ctx.save_for_backward(logits, targets, normaliser, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, targets, normaliser, entropy = ctx.saved_tensors
        by_logprob, by_entropy = gradients
        log_p = in_precision(logits, ctx.temperature).sub_(normaliser[:, None])
        if by_entropy is None:
            by_logits = log_p.exp_()
            by_logits.mul_(-by_logprob[:, None] if by_logprob is not None else 0.0)
        else:
            probabilities = log_p.exp()
            factor = log_p.add_(entropy[:, None]).mul_(-by_entropy[:, None])
            if by_logprob is not None:
                factor.sub_(by_logprob[:, None])
            by_logits = probabilities.mul_(factor)
        if by_logprob is not None:
            by_logits.scatter_add_(-1, targets[:, None], by_logprob[:, None])
        if ctx.temperature != 1.0:
            by_logits.div_(ctx.temperature)
        return by_logits.to(logits.dtype), None, None, None


def in_precision(logits: Tensor, temperature: float) -> Tensor:
    """A copy in fp32 (float64 stays), at the temperature: everything must come from the same untouched logits."""
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scaled = logits.to(precise, copy=True)
    return scaled if temperature == 1.0 else scaled.div_(temperature)


def hidden_states(trunk: Any, micro: MicroBatch) -> Tensor:
    """Last hidden state before each completion token, [N, H].

    Tokens are right-padded: a causal model never lets a completion see the padding after it, so rows on their
    own need no mask; packed rows bring theirs.
    """
    device = next(trunk.parameters()).device
    hidden = trunk(
        input_ids=micro.tokens.to(device),
        attention_mask=None if micro.mask is None else micro.mask.to(device),
        position_ids=micro.places.to(device),
        use_cache=False,
    ).last_hidden_state
    return hidden.flatten(0, 1)[micro.positions.to(device)]


class Policy(nn.Module):
    """A causal language model that returns what training needs of its completions, never [U, T, V] logits.

    Only positions that predict a completion token go through the head, `head_chunks` pieces one after the other;
    each piece is recomputed in the backward pass, so one piece of [n, V] logits exists at a time. The number of
    pieces is an argument because under ZeRO-3 every rank must enter the head equally often.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def checkpoint(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under this module's parameter names -> under the names of a Hugging Face checkpoint.

        They differ where transformers renames on loading (GPT-NeoX: embed_out is lm_head in memory); vLLM and every
        other reader know the names of the file.
        """
        from transformers.core_model_loading import revert_weight_conversion

        inner = {name.removeprefix("model."): tensor for name, tensor in named.items()}
        return dict(revert_weight_conversion(self.model, inner))

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def states(self, micro: MicroBatch) -> Tensor:
        return hidden_states(self.model.base_model, micro)

    def forward(
        self, micro: MicroBatch, temperature: float, head_chunks: int = 1, entropy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies (fp32 [N], nats; None if not asked for) of a micro-batch's completion tokens."""
        states = self.states(micro)
        return self.read(states, micro.targets.to(states.device), temperature, head_chunks, entropy)[:2]

    def read(
        self,
        states: Tensor,
        targets: Tensor,
        temperature: float,
        head_chunks: int,
        entropy: bool,
        piece: Piece | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs, entropies and vocabulary term of states [N, H], each [N]; None where not asked for."""
        parts, start = [], 0
        for state, target in zip(states.tensor_split(head_chunks), targets.tensor_split(head_chunks), strict=True):
            arguments = (state, target, temperature, entropy, piece, start)
            keep = not torch.is_grad_enabled()
            parts.append(self._score(*arguments) if keep else checkpoint(self._score, *arguments, use_reentrant=False))
            start += len(target)
        columns = zip(*parts, strict=True)
        logprobs, entropies, terms = (None if column[0] is None else torch.cat(column) for column in columns)
        assert logprobs is not None
        return logprobs, entropies, terms

    def _score(
        self, states: Tensor, targets: Tensor, temperature: float, entropy: bool, piece: Piece | None, start: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits = self.head(states)
        logprobs, entropies = TokenLogprobs.apply(logits, targets, temperature, entropy)
        if piece is None:
            return logprobs, entropies, None
        return logprobs, entropies, piece(in_precision(logits, temperature), start, start + len(targets))


@dataclass(frozen=True)
class FrozenView:
    """A micro-batch as a model sees it that nobody trains: its states, and the head that reads them."""

    states: Tensor
    """[N, H]."""
    head: nn.Module

    @torch.no_grad()
    def logits(self, places: Tensor, temperature: float) -> Tensor:
        return in_precision(self.head(self.states[places]), temperature)


def vocabulary_piece(
    term: VocabularyTerm,
    targets: Tensor,
    advantages: Tensor,
    selected: Tensor | None,
    views: Mapping[str, FrozenView],
    temperature: float,
) -> Piece:
    """The term of an objective as something a policy can read piece by piece; 0 at tokens that are not selected."""

    def piece(logits: Tensor, start: int, stop: int) -> Tensor:
        places = torch.arange(start, stop, device=logits.device)
        own = places if selected is None else places[selected[start:stop]]
        others = {name: view.logits(own, temperature) for name, view in views.items()}
        values = term(logits[own - start], targets[own], advantages[own], others)
        return torch.zeros(len(places), dtype=logits.dtype, device=logits.device).index_add(0, own - start, values)

    return piece


class ValueHead(nn.Module):
    """One number of each state, in fp32; the last layer starts as in 2403.17031, N(0, 1/sqrt(H + 1)), bias 0."""

    def __init__(self, hidden: int, kind: str) -> None:
        super().__init__()
        width = hidden // 4
        mlp = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width), nn.GELU()) if kind == "mlp" else None
        self.body = mlp or nn.Identity()
        size = width if mlp else hidden
        self.weight = nn.Parameter(torch.randn(1, size) / (size + 1) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor) -> Tensor:
        """[N, H] -> [N]."""
        inside = self.body(states)
        precise = torch.promote_types(inside.dtype, torch.float32)
        weight, bias = self.weight.to(precise), self.bias.to(precise)
        return nn.functional.linear(inside.to(precise), weight, bias).squeeze(-1)


class Critic(nn.Module):
    """Values of the states before each completion token, on its own trunk or the policy's states."""

    def __init__(self, by: CriticSettings, trunk: Any, hidden: int, heads: Sequence[str]) -> None:
        super().__init__()
        self.by, self.trunk = by, trunk
        twin = by.softmin_temperature is not None
        self.heads = nn.ModuleList(
            nn.ModuleList(ValueHead(hidden, by.head) for _ in range(2 if twin and head == "value" else 1))
            for head in heads
        )

    def forward(self, micro: MicroBatch, states: Tensor) -> Tensor:
        """[N, K]; two heads of a value are joined by a soft minimum."""
        if self.trunk is not None:
            states = hidden_states(self.trunk, micro)
        elif self.by.trunk == "detached":
            states = states.detach()
        columns = []
        for members in self.heads:
            values = torch.stack([member(states) for member in members], dim=-1)
            temperature = self.by.softmin_temperature
            joined = values.squeeze(-1) if len(members) == 1 else critics.soft_min(values, temperature or 1.0)
            columns.append(joined)
        return torch.stack(columns, dim=-1)


class Learnable(nn.Module):
    """Everything one optimizer trains: the policy, and a critic where the objective has one."""

    def __init__(self, policy: Policy, critic: Critic | None) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(
        self, micro: MicroBatch, temperature: float, head_chunks: int, entropy: bool, piece: Piece | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs, entropies, values [N, K], vocabulary term; None where not asked for."""
        states = self.policy.states(micro)
        targets = micro.targets.to(states.device)
        logprobs, entropies, terms = self.policy.read(states, targets, temperature, head_chunks, entropy, piece)
        values = self.critic(micro, states) if self.critic is not None else None
        return logprobs, entropies, values, terms
