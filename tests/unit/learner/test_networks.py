"""Value heads, critics and the pieces of the output head: who is trained by what, joined how, and computed how often."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from keel import schema
from keel.config.objective import CriticSettings
from keel.learner import loading, packing, tiny
from keel.learner.networks import Critic, Learnable, Policy, TokenLogprobs, ValueHead

HIDDEN = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("networks") / "tiny")


@pytest.fixture
def policy(folder: Path) -> Iterator[Policy]:
    yield loading.load_policy(folder, "float32")


def step_of(lengths: tuple[int, ...] = (5, 1, 4)) -> packing.MicroBatch:
    """Rows of two prompts in one micro-batch."""
    random = np.random.default_rng(3)
    tickets = [0, 0, 1][: len(lengths)]
    prompts = [random.integers(3, 300, 4).tolist(), random.integers(3, 300, 2).tolist()]
    columns = {
        "ticket": pa.array(tickets, pa.int64()),
        "prompt_tokens": pa.array([prompts[ticket] for ticket in tickets], schema.TOKENS),
        "completion_tokens": pa.array([random.integers(3, 300, n).tolist() for n in lengths], schema.TOKENS),
    }
    batch = pa.record_batch(columns)
    return packing.tensors(batch, [np.array([row]) for row in range(len(lengths))])


def moved(module: nn.Module) -> bool:
    """Whether any parameter has a gradient that is not zero."""
    return any(entry.grad is not None and bool(entry.grad.abs().max() > 0) for entry in module.parameters())


# ---- which parameters a critic trains


@pytest.mark.parametrize(
    ("trunk", "trains_policy", "trains_own"),
    [("shared", True, False), ("detached", False, False), ("own", False, True)],
)
@pytest.mark.parametrize("softmin", [None, 0.3])
def test_a_critic_trains_its_heads_and_the_trunk_it_says(
    policy: Policy, folder: Path, trunk: Any, trains_policy: bool, trains_own: bool, softmin: float | None
) -> None:
    subject = loading.load_trunk(folder, "float32") if trunk == "own" else None
    config = CriticSettings(trunk=trunk, softmin_temperature=softmin)
    critic = Critic(config, subject, policy.model.config.hidden_size, ["value", "entropy"])
    for parameter in critic.heads.parameters():
        nn.init.normal_(parameter)
    module = Learnable(policy, critic)
    logprobs, _, values, _ = module(step_of(), 1.0, 1, False, None)
    assert values.shape == (len(logprobs), 2)
    (values * torch.randn_like(values)).sum().backward()
    assert moved(policy) == trains_policy
    assert all(moved(head) for heads in critic.heads for head in heads)
    assert subject is None or moved(subject) == trains_own
    policy.zero_grad()
    module(step_of(), 1.0, 1, False, None)[0].sum().backward()
    assert moved(policy)  # and the loss of the policy trains it in any case


def test_a_critic_on_the_policys_states_reads_them_and_one_of_its_own_does_not(policy: Policy, folder: Path) -> None:
    hidden = policy.model.config.hidden_size
    values = {}
    for trunk in ("shared", "detached", "own"):
        torch.manual_seed(0)
        subject = loading.load_trunk(folder, "float32") if trunk == "own" else None
        values[trunk] = Critic(CriticSettings(trunk=trunk), subject, hidden, ["value"])  # type: ignore[arg-type]
    micro = step_of()
    before = {name: critic(micro, policy.states(micro)).detach() for name, critic in values.items()}
    assert torch.equal(before["shared"], before["detached"])
    assert torch.allclose(before["shared"], before["own"], atol=1e-5)  # the same weights, still
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    after = {name: critic(micro, policy.states(micro)).detach() for name, critic in values.items()}
    assert torch.equal(after["own"], before["own"])
    assert not torch.allclose(after["shared"], before["shared"], atol=1e-3)


# ---- heads


def constant(critic: Critic, head: int, numbers: list[float]) -> None:
    """Let every member of a head say its own number of any state."""
    for member, number in zip(critic.heads[head], numbers, strict=True):
        nn.init.zeros_(member.weight)
        nn.init.constant_(member.bias, number)


@pytest.mark.parametrize(("temperature", "numbers"), [(0.3, [1.0, 2.0]), (0.3, [2.0, -1.0]), (2.0, [0.5, 4.0])])
def test_twin_heads_are_joined_by_a_soft_minimum(temperature: float, numbers: list[float]) -> None:
    """-a (log mean exp(-v / a)), neither mean nor minimum; the head of the entropy has no twin and keeps its column."""
    critic = Critic(CriticSettings(trunk="shared", softmin_temperature=temperature), None, HIDDEN, ["value", "entropy"])
    assert [len(members) for members in critic.heads] == [2, 1]
    constant(critic, 0, numbers)
    constant(critic, 1, [7.0])
    values = critic(step_of(), torch.randn(10, HIDDEN))
    expected = -temperature * math.log(sum(math.exp(-entry / temperature) for entry in numbers) / 2)
    assert values[:, 0].tolist() == pytest.approx([expected] * 10, abs=1e-6)
    assert values[:, 1].tolist() == pytest.approx([7.0] * 10)
    assert min(numbers) + 1e-3 < expected < sum(numbers) / 2 - 1e-3
    values[:, 0].sum().backward()
    weights = np.exp(-np.array(numbers) / temperature)
    gradients = [float(member.bias.grad) for member in critic.heads[0]]
    assert gradients == pytest.approx(10 * weights / weights.sum(), abs=1e-5)


def test_a_single_head_is_what_it_says() -> None:
    critic = Critic(CriticSettings(trunk="shared"), None, HIDDEN, ["value"])
    assert [len(members) for members in critic.heads] == [1]
    constant(critic, 0, [-3.5])
    assert critic(step_of(), torch.randn(10, HIDDEN)).tolist() == [[-3.5]] * 10


@pytest.mark.parametrize(("kind", "width"), [("linear", 64), ("mlp", 16)])
def test_a_new_head_is_small_and_works_in_single_precision(kind: str, width: int) -> None:
    """Its last layer is drawn from N(0, 1/sqrt(size + 1)) without bias; bfloat16 states are summed in float32."""
    torch.manual_seed(0)
    heads = [ValueHead(64, kind) for _ in range(200)]
    weights = torch.stack([head.weight for head in heads])
    assert weights.shape == (200, 1, width) and all(float(head.bias.detach()) == 0 for head in heads)
    assert float(weights.std()) == pytest.approx((width + 1) ** -0.5, rel=0.05)
    states = torch.randn(9, 64)
    head = heads[0].to(torch.bfloat16)
    nn.init.constant_(head.bias, 0.25)
    result = head(states.to(torch.bfloat16))
    assert result.dtype == torch.float32 and result.shape == (9,)
    inside = head.body(states.to(torch.bfloat16)).float()
    assert torch.allclose(result, inside @ head.weight[0].float() + 0.25, atol=1e-6)
    assert ValueHead(64, kind).double()(states.double()).dtype == torch.float64
    body = [type(layer) for layer in head.body] if kind == "mlp" else type(head.body)
    assert body == ([nn.LayerNorm, nn.Linear, nn.GELU] if kind == "mlp" else nn.Identity)


# ---- the output head, piece by piece


@pytest.mark.parametrize(("bytes_", "pieces"), [(0, 1), (5119, 1), (5120, 1), (10_239, 1), (10_240, 2), (15_361, 3)])
def test_as_many_pieces_are_kept_as_fit(policy: Policy, bytes_: int, pieces: int) -> None:
    rows, _ = policy.head.weight.shape
    unit = 4 * rows * 4  # four tokens, fp32
    policy.keep(bytes_ * unit // 5120, 4)
    assert policy.kept_chunks == pieces


@pytest.mark.parametrize("kept", [1, 2, 4, 9])
@pytest.mark.parametrize("pieces", [1, 4])
def test_pieces_that_are_not_kept_are_made_again_and_nothing_else_changes(
    policy: Policy, pieces: int, kept: int
) -> None:
    """Forward every piece once, backward again those before the last `kept`; without gradients never again."""
    micro, calls = step_of((5, 1, 4)), [0]
    states = policy.states(micro).detach()
    policy.head.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def read(count: int) -> tuple[Tensor, Tensor, Tensor]:
        leaf = states.clone().requires_grad_()
        logprobs, entropies, terms = policy.read(leaf, micro.targets, 0.7, count, True, lambda z, a, b: z[:, a] + b)
        assert terms is not None and entropies is not None
        gradient = torch.autograd.grad((logprobs + 0.3 * entropies + 0.1 * terms).sum(), leaf)[0]
        return torch.stack([logprobs, entropies]).detach(), gradient, terms.detach()

    policy.kept_chunks = kept
    result = read(pieces)
    assert calls[0] == pieces + max(0, pieces - kept)
    policy.kept_chunks = 1
    whole = read(1)
    assert torch.allclose(result[0], whole[0], atol=1e-5)
    logits = policy.head(states).float() / 0.7
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(10), pieces)])
    places = [(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True) for _ in range(start, stop)]
    expected = torch.stack([logits[item, start] + stop for item, (start, stop) in enumerate(places)])
    assert torch.allclose(result[2], expected, atol=1e-5)  # each piece is told where it stands
    if pieces == 1:
        assert torch.equal(result[1], whole[1])
    calls[0] = 0
    with torch.no_grad():
        policy.read(states, micro.targets, 0.7, pieces, False)
    assert calls[0] == pieces


def test_a_policy_keeps_its_last_piece_and_has_one_unless_it_is_told(policy: Policy) -> None:
    micro, calls = step_of(), [0]
    policy.head.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    assert policy.kept_chunks == 1
    policy(micro, 1.0)[0].sum().backward()
    assert calls[0] == 1
    policy(micro, 1.0, 3)[0].sum().backward()
    assert calls[0] == 1 + 3 + 2


def test_what_nobody_asks_for_is_not_there(policy: Policy) -> None:
    micro = step_of()
    logprobs, entropies = policy(micro, 1.0, 2, entropy=False)
    assert entropies is None and logprobs.shape == (10,)
    logprobs, entropies, values, terms = Learnable(policy, None)(micro, 1.0, 2, True, None)
    assert values is None and terms is None and entropies.shape == (10,)


# ---- log-probs and entropies of any number of rows


def plain(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -0.4)])
def test_blocks_of_rows_are_those_of_log_softmax(rows: int, weights: tuple[float, float]) -> None:
    """Also the empty piece, a block that is exactly full, one row more, and a gradient of one output alone."""
    torch.manual_seed(rows)
    logits = (3 * torch.randn(rows, 9, dtype=torch.float64)).requires_grad_()
    targets, subject = torch.randint(0, 9, (rows,)), torch.randn(rows, dtype=torch.float64)
    result = []
    for function in (plain, TokenLogprobs.apply):
        outputs = function(logits, targets, 0.6)
        used = [(weight * subject * output).sum() for weight, output in zip(weights, outputs, strict=True) if weight]
        result.append((*outputs, torch.autograd.grad(sum(used), logits)[0]))
    for left, right in zip(*result, strict=True):
        assert torch.allclose(left, right, atol=1e-11)
    assert TokenLogprobs.apply(logits, targets, 0.6, False)[1] is None


def test_a_second_pass_takes_what_the_first_one_kept() -> None:
    logits = torch.randn(70, 5, dtype=torch.float64, requires_grad=True)
    targets, kept = torch.randint(0, 5, (70,)), []
    first = TokenLogprobs.apply(logits, targets, 1.3, True, kept)
    marked = [entry.clone() for entry in kept]
    assert len(kept) == 3 and not any(entry.requires_grad for entry in kept)
    second = TokenLogprobs.apply(logits, targets, 1.3, True, kept)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(*pair) for pair in zip(kept, marked, strict=True)) and len(kept) == 3
    gradients = [torch.autograd.grad((a + 2 * b).sum(), logits, retain_graph=True)[0] for a, b in (first, second)]
    assert torch.equal(*gradients)
