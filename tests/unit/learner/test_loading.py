"""Token log-probs and entropy against autograd and against transformers' whole logits."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from keel import schema
from keel.errors import ConfigError
from keel.learner import end_tokens, loading, model_files, packing, tiny
from keel.learner.model_text import ModelText
from keel.learner.networks import TokenLogprobs
from keel.learner.packing import TokenBudget

TEMPERATURE = 0.7


def plain(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_log_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (5,))
    weights = torch.randn(2, 5, dtype=torch.float64)
    gradients = []
    for function in (plain, TokenLogprobs.apply):
        logprob, entropy = function(logits, targets, temperature)
        gradients.append(torch.autograd.grad((weights[0] * logprob + weights[1] * entropy).sum(), logits)[0])
        values = torch.stack([logprob, entropy])
        assert torch.allclose(values, torch.stack(plain(logits, targets, temperature)), atol=1e-12)
    assert torch.allclose(*gradients, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_alone_passes_gradcheck(used: int) -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (3,))
    assert torch.autograd.gradcheck(lambda z: TokenLogprobs.apply(z, targets, 1.3)[used], (logits,))


def test_entropy_oracle() -> None:
    """algorithms P2d_tok_entropy: logits [.2, -.5, 1]."""
    logits = torch.tensor([[0.2, -0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    _, entropy = TokenLogprobs.apply(logits, torch.tensor([0]), 1.0)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert entropy.item() == pytest.approx(0.9293476152, abs=1e-9)
    assert gradient[0].tolist() == pytest.approx([0.103421387, 0.1447476333, -0.2481690203], abs=1e-9)


def test_bfloat16_logits_are_summed_in_float32_and_left_alone() -> None:
    logits = torch.randn(4, 50_000).to(torch.bfloat16)
    before = logits.clone()
    targets = torch.randint(0, 50_000, (4,))
    logprob, entropy = TokenLogprobs.apply(logits, targets, TEMPERATURE)
    expected = plain(logits.double(), targets, TEMPERATURE)
    assert logprob.dtype == entropy.dtype == torch.float32
    assert torch.allclose(logprob.double(), expected[0], atol=1e-5)
    assert torch.allclose(entropy.double(), expected[1], atol=1e-4)
    assert torch.equal(logits, before)


def uneven_batch(vocabulary: int = 300) -> pa.RecordBatch:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, vocabulary, n).tolist() for n in (3, 9)]
    tickets = [0, 0, 0, 1, 1]
    return pa.record_batch(
        {
            "ticket": pa.array(tickets, pa.int64()),
            "prompt_tokens": pa.array([prompts[t] for t in tickets], schema.TOKENS),
            "completion_tokens": pa.array(
                [rng.integers(3, vocabulary, n).tolist() for n in (5, 1, 8, 2, 4)], schema.TOKENS
            ),
        }
    )


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("qwen2", True), ("gpt_neox", False)])
def test_packed_and_padded_rows_equal_rows_on_their_own(tmp_path: Path, architecture: str, tied: bool) -> None:
    """Against transformers' whole logits, one unpadded row at a time; gradients too, in one head piece and in five."""
    policy = loading.load_policy(tiny.write(tmp_path / "m", architecture, tied), "float32")
    batch = uneven_batch()
    expected = []
    for prompt, completion in zip(
        *(batch.column(n).to_pylist() for n in ("prompt_tokens", "completion_tokens")), strict=True
    ):
        logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected.append(torch.stack(plain(logits, torch.tensor(completion), TEMPERATURE)))
    want = torch.cat(expected, dim=1)
    want[0].sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    for shared, pieces in ((0, 1), (0, 5), (64, 1), (64, 5)):
        policy.zero_grad()
        got = torch.zeros_like(want)
        for units in packing.plan(batch, 1, TokenBudget(40, shared, 64)).micro_batches[0]:
            micro = packing.tensors(batch, units)
            values = torch.stack(policy(micro, TEMPERATURE, pieces))
            values[0].sum().backward()
            got[:, torch.from_numpy(micro.items)] = values.detach()
        assert torch.allclose(got, want, atol=1e-5), (shared, pieces)
        for name, parameter in policy.named_parameters():
            scale = gradients[name].abs().max()
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-5 * float(scale) + 1e-6), (
                name,
                shared,
                pieces,
            )


def test_dropout_is_off(tmp_path: Path) -> None:
    """A configuration with dropout gives the same numbers twice in training mode."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout=0.5, attention_dropout=0.5,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "m")
    policy = loading.load_policy(tmp_path / "m", "float32").train()
    micro = packing.tensors(uneven_batch(), [np.array([0])])
    assert torch.equal(policy(micro, 1.0)[0], policy(micro, 1.0)[0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "no such folder"),
        ("wheel:unknown", "unknown wheel"),
        ("justaname", "no such folder"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loading.locate(model, "policy.model")
    assert str(caught.value).startswith(f"policy.model={model}: ") and "\n" not in str(caught.value)


def test_end_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "m")
    tokenizer = loading.load_tokenizer(folder, "policy.model")
    text, vocabulary = ModelText(tokenizer), model_files.vocabulary(folder, str(folder))
    assert end_tokens.decide(folder, text, vocabulary).stop == (tiny.SPECIAL.index("<|im_end|>"),)
    (folder / "generation_config.json").unlink()
    assert end_tokens.decide(folder, text, vocabulary).stop == (tokenizer.eos_token_id,)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="no tokenizer"):
        loading.load_tokenizer(folder, "policy.model")


def run_directory(root: Path, *folders: str, config: bool = True) -> Path:
    """A run's directory with copies of a model at these places."""
    root.mkdir(exist_ok=True)
    if config:
        (root / "config.yaml").write_text("")
        (root / "stage.json").write_text("{}")
    for folder in folders:
        tiny_folder = root / folder
        tiny_folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (tiny_folder / name).write_bytes(b"{}")
    return root


def test_a_run_directory_is_the_model_it_trained(tmp_path: Path) -> None:
    """A stage's model; of an online run the policy of the newest whole checkpoint; a model folder is itself."""
    stage = run_directory(tmp_path / "stage", "model")
    assert loading.locate(str(stage), "s") == stage / "model"
    online = run_directory(tmp_path / "online", *(f"checkpoints/step-{n:06d}/policy" for n in (5, 10, 15)))
    for step in (5, 10):
        (online / "checkpoints" / f"step-{step:06d}" / "COMMIT").write_bytes(b"")
    assert loading.locate(str(online), "s") == online / "checkpoints" / "step-000010" / "policy"
    both = run_directory(tmp_path / "both", "model", "checkpoints/step-000005/policy")
    (both / "checkpoints" / "step-000005" / "COMMIT").write_bytes(b"")
    assert loading.locate(str(both), "s") == both / "model"
    itself = run_directory(tmp_path, "itself").joinpath("itself")
    (itself / "config.yaml").write_text("")
    assert loading.locate(str(itself), "s") == itself


def test_best_is_the_policy_of_the_best_checkpoint(tmp_path: Path) -> None:
    """RUN_DIR/best, the start where nothing was better, or one line that says why there is none."""
    online = run_directory(tmp_path / "online", *(f"checkpoints/step-{n:06d}/policy" for n in (5, 10)))
    newest = online / "checkpoints" / "step-000010"
    for step in (5, 10):
        (online / "checkpoints" / f"step-{step:06d}" / "COMMIT").write_bytes(b"")
    (newest / "state.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"policy\.model=.*/best: the run keeps no best checkpoint; expected a run with"
    ):
        loading.locate(str(online / "best"), "policy.model")
    best = {"step": 5, "reward": "gold", "mean": 0.5, "standard_error": 0.1, "rows": 4}
    (newest / "state.json").write_text(json.dumps({"guard": {"best": best}}))
    assert loading.locate(str(online / "best"), "s") == online / "checkpoints" / "step-000005" / "policy"
    (newest / "state.json").write_text(json.dumps({"guard": {"best": best | {"step": 0}}}))
    start = run_directory(tmp_path / "start", "model") / "model"
    (online / "config.yaml").write_text(yaml.safe_dump({"policy": {"model": str(start)}}))
    assert loading.locate(str(online / "best"), "s") == start
    (online / "config.yaml").write_text(yaml.safe_dump({"policy": {"model": str(tmp_path / "moved")}}))
    with pytest.raises(
        ConfigError, match=r"/best, which is the policy that the run started from: policy.model=.*moved"
    ):
        loading.locate(str(online / "best"), "s")
    (newest / "state.json").write_text(json.dumps({"guard": {"best": best | {"step": 7}}}))
    with pytest.raises(ConfigError, match=r"/best: step 7, gold .*: no checkpoint of it is there; expected a run"):
        loading.locate(str(online / "best"), "s")
    with pytest.raises(ConfigError, match="no such folder"):
        loading.locate(str(tmp_path / "absent" / "best"), "s")


def test_an_ensemble_of_reward_models_is_a_model(tmp_path: Path) -> None:
    stage = run_directory(tmp_path / "stage")
    (stage / "model").mkdir()
    (stage / "model" / "ensemble.json").write_text('{"members": []}')
    assert loading.locate(str(stage), "s") == loading.locate(str(stage / "model"), "s") == stage / "model"


def test_a_run_that_trained_nothing_yet_is_one_line(tmp_path: Path) -> None:
    empty = run_directory(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no config\.json in it; expected a Hugging Face model folder"):
        loading.locate(str(empty), "policy.model")
    unfinished = run_directory(tmp_path / "run", "checkpoints/step-000005/policy")  # without COMMIT
    with pytest.raises(ConfigError, match=r"no config\.json in it"):
        loading.locate(str(unfinished), "policy.model")
