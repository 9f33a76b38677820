"""Networks: a policy that gives token log-probs and entropy in fp32, a critic on its own or the policy's states.

Shapes: U sequences, T padded tokens, H hidden, V vocabulary, N completion tokens (flat, row by row), K value heads.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keel.algorithms import critics
from keel.config.objective import CriticSettings
from keel.learner import attention_masks
from keel.learner.packing import MicroBatch
from keel.learner.states_to_logits import logits_of

ChunkTerm = Callable[[Tensor, int, int], Tensor]
"""Something of each token that reads the whole vocabulary: logits [n, V] in fp32 at the temperature, the places start
to stop of these tokens among the N -> [n]."""


class TokenLogprobs(torch.autograd.Function):
    """Log-prob of the target and, if asked, entropy of each row of logits, in fp32, both at the same temperature.

        z = logits / temperature,  p = softmax(z)
        logprob = z_y - logsumexp(z)          d logprob / dz = onehot(y) - p
        entropy = logsumexp(z) - sum(p z)     d entropy / dz = -p (log p + entropy)

    Logits [n, V] of any float type are kept as they are for the backward pass; fp32 copies live only inside
    forward and backward. Returns fp32 tensors [n] (float64 in, float64 out); None for an entropy not asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool = True,
        kept: list[Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`kept`: empty in the first pass, which leaves its results there for a second pass over the same logits."""
        results = kept if kept else _forward(logits, targets, temperature, with_entropy)
        if kept is not None and not kept:
            kept.extend(None if tensor is None else tensor.detach() for tensor in results)
        logprob, normalizer, entropy = results
        ctx.save_for_backward(logits, targets, normalizer, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, normalizer, entropy = ctx.saved_tensors
        by_logprob, by_entropy = gradients
        by_logits = torch.empty_like(logits)
        for block, (log_p, slope) in _blocks(logits):
            log_p.copy_(logits[block]).div_(ctx.temperature).sub_(normalizer[block, None])
            torch.exp(log_p, out=slope)
            if by_entropy is None:
                slope.mul_(-by_logprob[block, None] if by_logprob is not None else 0.0)
            else:
                factor = log_p.add_(entropy[block, None]).mul_(-by_entropy[block, None])
                slope.mul_(factor if by_logprob is None else factor.sub_(by_logprob[block, None]))
            if by_logprob is not None:
                slope.scatter_add_(-1, targets[block, None], by_logprob[block, None])
            by_logits[block] = slope.div_(ctx.temperature)
        return by_logits, None, None, None, None


def _forward(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob, logsumexp and entropy of each row."""
    rows = []
    for block, (below, weight) in _blocks(logits):
        top = logits[block].amax(-1, keepdim=True)
        below.copy_(logits[block]).sub_(top).div_(temperature)  # log p + log(total), at most 0
        total = torch.exp(below, out=weight).sum(-1)
        logprob = below.gather(-1, targets[block, None]).squeeze(-1) - total.log()
        normalizer = top.squeeze(-1) / temperature + total.log()
        rows.append((logprob, normalizer, total.log() - torch.linalg.vecdot(weight, below) / total))
    logprobs, normalizers, entropies = (torch.cat(column) for column in zip(*rows, strict=True))
    return logprobs, normalizers, entropies if with_entropy else None


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """64 rows at a time and two fp32 buffers for them, the same ones every time: small enough for a cache."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    work = logits.new_empty(2, min(64, len(logits)), logits.shape[-1], dtype=precise)
    for start in range(0, max(1, len(logits)), 64):  # an empty chunk is one empty block
        stop = min(start + 64, len(logits))
        yield slice(start, stop), work[:, : stop - start]


def in_precision(logits: Tensor, temperature: float) -> Tensor:
    """A copy in fp32 (float64 stays), at the temperature: everything must come from the same untouched logits."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    return scaled if temperature == 1.0 else scaled.div_(temperature)


def hidden_states(trunk: Any, micro: MicroBatch) -> Tensor:
    """Last hidden state before each completion token, [N, H].

    Tokens are right-padded: a causal model never lets a completion see the padding after it, so rows on their own
    need neither mask nor positions, which would only make a model build a dense mask. Rows that share a sequence
    bring their positions; the 2-D mask of ones says that these are no packing of transformers' own.
    """
    device = next(trunk.parameters()).device
    tokens = micro.tokens.to(device)
    if micro.layout is None:
        hidden = trunk(input_ids=tokens, use_cache=False).last_hidden_state
    else:
        layout = micro.layout.to(device)
        with attention_masks.of_rows(layout):
            hidden = trunk(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=layout.places, use_cache=False
            ).last_hidden_state
    return hidden.flatten(0, 1)[micro.positions.to(device)]


class Policy(nn.Module):
    """A causal language model that returns what training needs of its completions, never [U, T, V] logits.

    Only positions that predict a completion token go through the head, `head_chunks` chunks one after the other.
    Softmax and entropy are recomputed in the backward pass; of the [n, V] logits the last `kept_chunks` are kept once,
    as the head gave them, the others are made again. Both numbers are the same on every rank, whatever its rows,
    because under ZeRO-3 all must enter the head equally often.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.kept_chunks = 1  # the last chunk is the first to go backward: keeping it costs nothing

    def keep(self, num_bytes: int, chunk_tokens: int) -> None:
        """Keep the logits of as many chunks of `chunk_tokens` as fit `num_bytes`, and of one at least."""
        weight = self.head.weight
        self.kept_chunks = max(1, num_bytes // (chunk_tokens * len(weight) * weight.element_size()))

    def to_hf_names(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
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

    @property
    def trunk(self) -> nn.Module:
        """The model up to its last hidden states; Llama 4 names another attribute for it than the one it has."""
        return self.model.base_model if self.model.base_model is not self.model else self.model.model

    def states(self, micro: MicroBatch) -> Tensor:
        return hidden_states(self.trunk, micro)

    def logits(self, states: Tensor, head: nn.Module | None = None) -> Tensor:
        """Logits [n, V] of states [n, H] as the family makes them: its own code behind the trunk, not the head alone.

        Granite divides, Cohere multiplies, Gemma 2 caps. `head`: in place of the model's output head.
        """
        return logits_of(self.model, self.trunk, states, {self.head: head} if head is not None else {})

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
        chunk_term: ChunkTerm | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs, entropies and vocabulary term of states [N, H], each [N]; None where not asked for."""
        parts, start = [], 0
        chunks = list(zip(states.tensor_split(head_chunks), targets.tensor_split(head_chunks), strict=True))
        for number, (state, target) in enumerate(chunks, start=1):
            kept: list[Tensor | None] = []  # spares the second pass everything but the head itself
            arguments = (state, target, temperature, entropy, chunk_term, start, kept)
            whole = not torch.is_grad_enabled() or number > len(chunks) - self.kept_chunks
            parts.append(self._score(*arguments) if whole else checkpoint(self._score, *arguments, use_reentrant=False))
            start += len(target)
        columns = zip(*parts, strict=True)
        logprobs, entropies, terms = (None if column[0] is None else torch.cat(column) for column in columns)
        assert logprobs is not None
        return logprobs, entropies, terms

    def _score(
        self,
        states: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        chunk_term: ChunkTerm | None,
        start: int,
        kept: list[Tensor | None],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits = self.logits(states)
        logprobs, entropies = TokenLogprobs.apply(logits, targets, temperature, entropy, kept)
        if chunk_term is None:
            return logprobs, entropies, None
        return logprobs, entropies, chunk_term(in_precision(logits, temperature), start, start + len(targets))


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

    def __init__(self, config: CriticSettings, trunk: Any, hidden: int, heads: Sequence[str]) -> None:
        super().__init__()
        self.config, self.trunk, self.names = config, trunk, tuple(heads)
        twin_heads = config.softmin_temperature is not None
        self.heads = nn.ModuleList(
            nn.ModuleList(ValueHead(hidden, config.head) for _ in range(2 if twin_heads and head == "value" else 1))
            for head in heads
        )

    @torch.no_grad()
    def start_from(self, weight: Tensor, offset: float) -> None:
        """Begin the linear heads of the value as a reward model's: weight [1, H], scores w h - offset.

        Of twin heads the second is moved by a tenth of a new head's size: equal ones would always get equal gradients.
        """
        for name, members in zip(self.names, self.heads, strict=True):
            if name == "value" and self.config.head == "linear":
                for number, member in enumerate(members):
                    apart = 0.1 * number * torch.randn_like(member.weight) / (weight.shape[1] + 1) ** 0.5
                    member.weight.copy_(weight.to(member.weight) + apart)
                    member.bias.fill_(-offset)

    def forward(self, micro: MicroBatch, states: Tensor) -> Tensor:
        """[N, K]; two heads of a value are joined by a soft minimum."""
        if self.trunk is not None:
            states = hidden_states(self.trunk, micro)
        elif self.config.trunk == "detached":
            states = states.detach()
        columns = []
        for members in self.heads:
            values = torch.stack([member(states) for member in members], dim=-1)
            temperature = self.config.softmin_temperature or 1.0
            columns.append(values.squeeze(-1) if len(members) == 1 else critics.soft_min(values, temperature))
        return torch.stack(columns, dim=-1)


class Learnable(nn.Module):
    """Everything one optimizer trains: the policy, and a critic where the objective has one."""

    def __init__(self, policy: Policy, critic: Critic | None) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(
        self, micro: MicroBatch, temperature: float, head_chunks: int, entropy: bool, chunk_term: ChunkTerm | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs, entropies, values [N, K], vocabulary term; None where not asked for."""
        states = self.policy.states(micro)
        targets = micro.targets.to(states.device)
        logprobs, entropies, terms = self.policy.read(states, targets, temperature, head_chunks, entropy, chunk_term)
        values = self.critic(micro, states) if self.critic is not None else None
        return logprobs, entropies, values, terms
