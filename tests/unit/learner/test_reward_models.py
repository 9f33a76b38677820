"""Reward models: the text they read, padding, heads, and the folders that transformers loads."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaModel,
)

from keel.config.objective import CriticSettings
from keel.config.rewards import RewardSettings
from keel.config.workers import LearnerSettings, ScorerSettings
from keel.errors import ConfigError
from keel.learner import loading, reward_models, tiny
from keel.learner.networks import Critic
from keel.learner.policy_learner import DeepSpeedLearner
from keel.learner.reward_models import RewardModel, RewardText, ScoredText
from keel.rollout import scorers
from keel.rollout.datasets import SourceRow
from keel.stages.reward import texts
from prompt_files import BOS, word_tokenizer
from vocabularies import CHATML, CLOSES, ends_every_text, family

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "how", "are", "you", "fine", "thanks", "and", "well"]
CLS, SEP, HOW, ARE, YOU, FINE, THANKS, AND, WELL = 2, 3, 5, 6, 7, 8, 9, 10, 11
KINDS = ("decoder", "encoder")
HEADS = {"decoder": "score.weight", "encoder": "classifier.weight"}
WIDTHS = {"decoder": 64, "encoder": 16}


def write_encoder(folder: Path) -> Path:
    """A random BERT with a word a token, and dropout in its configuration."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = BertTokenizerFast(vocab={word: place for place, word in enumerate(WORDS)})
    assert tokenizer("how are you")["input_ids"] == [CLS, HOW, ARE, YOU, SEP]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.3}
    config = BertConfig(
        vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.5, **sizes, **dropout
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders to start from: a language model and an encoder."""
    root = tmp_path_factory.mktemp("trunks")
    return {"decoder": tiny.write(root / "decoder"), "encoder": write_encoder(root / "encoder")}


@pytest.fixture
def tokenizer(trunks: dict[str, Path]) -> Any:
    """The language model's: a chat template, no special tokens around plain text."""
    return AutoTokenizer.from_pretrained(trunks["decoder"])


@pytest.fixture
def encoder(trunks: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(trunks["encoder"])


def text(completion: str = "fine thanks", **fields: Any) -> ScoredText:
    return ScoredText(**{"prompt": "how are you", "messages": [], "completion": completion, "finished": True, **fields})


SAID = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how are you"}]
TEXTS = [
    text(),
    text("fine"),
    text("thanks and how are you and you and you", finished=False),
    text("well well well", prompt="how"),
    text("fine and well", prompt="how are you and you"),
]


def trained(trunk: Path, folder: Path, seed: int = 0, max_tokens: int = 40) -> RewardModel:
    """A model folder as a stage writes it, and the model it was written from."""
    model = reward_models.start(trunk, "float32", max_tokens, seed)
    named = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    reward_models.write(folder, model, named)
    return model.eval()


# ---- the text


def test_plain_text_is_prompt_and_completion_and_an_end_where_it_ended(tokenizer: Any) -> None:
    reads = RewardText(tokenizer, False, 100)
    whole = tokenizer("how are youfine thanks")["input_ids"]
    assert reads.tokens(text()) == ([*whole, tokenizer.eos_token_id], len(whole) + 1)
    assert reads.tokens(text(finished=False)) == (whole, len(whole))
    assert reads.tokens(text("fine thanks<|im_end|>")) == reads.tokens(text())  # it brings its end token


def test_a_conversation_goes_through_the_chat_template(tokenizer: Any) -> None:
    reads = RewardText(tokenizer, False, 200)
    begins = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n"
    result = reads.tokens(text(messages=SAID))
    assert result is not None and result[0] == tokenizer(begins + "fine thanks<|im_end|>\n")["input_ids"]
    cut = reads.tokens(text(messages=SAID, finished=False))
    assert cut is not None and cut[0] == tokenizer(begins + "fine thanks")["input_ids"]


def test_a_conversation_without_a_template_is_lines(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    result = RewardText(tokenizer, False, 100).tokens(text(messages=SAID))
    assert result is not None
    assert result[0] == [*tokenizer("be kind\nhow are you\nfine thanks")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("completion", ["end", "im", "<"])
def test_a_cut_completion_that_the_template_also_says(tokenizer: Any, completion: str) -> None:
    reads = RewardText(tokenizer, False, 200)
    result = reads.tokens(text(completion, messages=SAID, finished=False))
    assert result is not None
    assert tokenizer.decode(result[0]).endswith(f"assistant\n{completion}")


def test_an_encoder_reads_a_pair(encoder: Any) -> None:
    reads = RewardText(encoder, True, 100)
    assert reads.tokens(text()) == ([CLS, HOW, ARE, YOU, SEP, FINE, THANKS, SEP], 5)
    messages = [{"role": "user", "content": "how"}, {"role": "user", "content": "are you"}]
    assert reads.tokens(text(messages=messages)) == reads.tokens(text())
    inputs = encoder("how are you", "fine thanks")
    assert inputs["token_type_ids"] == [0] * 5 + [1] * 3


@pytest.mark.parametrize("limit", [12, 9, 8, 7, 6])
def test_what_is_too_long_loses_the_beginning_of_its_prompt(limit: int) -> None:
    """The start token stays, and the whole completion."""
    words = word_tokenizer(chat_template=None, numbers=30)
    zero = words("0")["input_ids"][1]
    reads = RewardText(words, False, limit)
    prompt, completion = " ".join(map(str, range(8))), " 20 21 22"
    whole = [BOS, *(zero + n for n in range(8)), *(zero + n for n in (20, 21, 22))]
    long = text(completion, prompt=prompt)
    expected = whole if limit == 12 else [BOS, *whole[len(whole) - limit + 1 :]]
    assert len(expected) == limit
    assert reads.tokens(long) == (expected, limit)
    assert reads.tokens(long, cut=False) == ((whole, 12) if limit == 12 else None)


def test_a_completion_that_is_too_long_alone_has_no_tokens(encoder: Any) -> None:
    words = word_tokenizer(chat_template=None, numbers=30)
    assert RewardText(words, False, 3).tokens(text(" 20 21 22", prompt="0 1 2")) is None
    assert RewardText(encoder, True, 4).tokens(text("fine thanks and well")) is None


def test_a_pair_that_is_too_long_loses_the_beginning_of_its_first_text(encoder: Any) -> None:
    assert RewardText(encoder, True, 6).tokens(text()) == ([CLS, YOU, SEP, FINE, THANKS, SEP], 3)
    assert RewardText(encoder, True, 7).tokens(text()) == ([CLS, ARE, YOU, SEP, FINE, THANKS, SEP], 4)
    assert RewardText(encoder, True, 7).tokens(text(), cut=False) is None
    assert RewardText(encoder, True, 8).tokens(text(), cut=False) == RewardText(encoder, True, 8).tokens(text())


def test_texts_survive_the_way_through_rollout_columns() -> None:
    texts = [text(), text("cut", finished=False), text(messages=SAID)]
    assert reward_models.from_batch(reward_models.as_batch(texts)) == texts


# ---- padding


def test_the_spare_token_ends_no_text(tokenizer: Any) -> None:
    assert reward_models.spare_token(tokenizer) == tokenizer.pad_token_id == 0
    tokenizer.pad_token = tokenizer.eos_token
    assert reward_models.spare_token(tokenizer) == tiny.SPECIAL.index("<pad>")  # still a special token, and of no use
    tokenizer.pad_token = None
    assert reward_models.spare_token(tokenizer) == tiny.SPECIAL.index("<pad>")


def test_a_tokenizer_whose_only_special_token_is_its_end_has_a_spare_one() -> None:
    """As Pythia's: <|endoftext|> is token 0, and there is no padding token."""
    words = word_tokenizer(chat_template=None)
    only = word_tokenizer(chat_template=None).__class__(tokenizer_object=words.backend_tokenizer)
    only.add_special_tokens({"eos_token": AddedToken("<unk>", special=True)})
    assert only.all_special_ids == [only.eos_token_id] == [0]
    assert reward_models.spare_token(only) != only.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_padded_scores_are_those_of_one_text_at_a_time(kind: str, trunks: dict[str, Path], tmp_path: Path) -> None:
    """Against transformers on unpadded ids, with its own token types; in passes of 1, of some and of all."""
    trained(trunks[kind], tmp_path / "m", max_tokens=64)
    model = reward_models.load_reward_model(tmp_path / "m")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    expected = []
    for one in TEXTS:
        if kind == "encoder":
            inputs = tokenizer(one.prompt, one.completion, return_tensors="pt")
        else:
            end = tokenizer.eos_token if one.finished else ""
            inputs = tokenizer(one.prompt + one.completion + end, return_tensors="pt")
            inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            expected.append(plain(**inputs).logits[0, 0].item())
    assert np.std(expected) > 0.05
    for tokens in (1, 24, 4096):
        assert model.scores(TEXTS, tokens) == pytest.approx(expected, abs=1e-5)
    too_long = text(" ".join(["fine"] * 80))
    with_long = model.scores([TEXTS[0], too_long, TEXTS[1]])
    assert with_long[1] is None and [with_long[0], with_long[2]] == pytest.approx(expected[:2], abs=1e-5)


def test_a_pass_has_no_more_tokens_than_it_may(trunks: dict[str, Path], tmp_path: Path) -> None:
    """Padding included; a text that is longer goes alone."""
    trained(trunks["decoder"], tmp_path / "m", max_tokens=64)
    model = reward_models.load_reward_model(tmp_path / "m")
    passes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
    texts = [text(" ".join(["fine"] * words)) for words in (1, 12, 2, 3, 1, 2, 2)]
    lengths = sorted(len(row[0]) for row in map(model.text.tokens, texts) if row)
    model.scores(texts, lengths[-1] - 1)
    assert len(lengths) == len(texts) and (1, lengths[-1]) in passes
    assert all(rows * width < lengths[-1] for rows, width in passes if rows > 1)
    assert sum(rows for rows, _ in passes) == len(texts) > len(passes)


def test_scores_in_bfloat16_are_near_those_in_float32(trunks: dict[str, Path], tmp_path: Path) -> None:
    trained(trunks["decoder"], tmp_path / "m", max_tokens=64)
    settings = {"name": "r", "kind": "model", "source": str(tmp_path / "m")}
    batch = reward_models.as_batch(TEXTS)
    precise, short = (
        np.asarray(scorers._SCORERS["model"](RewardSettings(**settings), ScorerSettings(dtype=dtype))(batch))
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < np.abs(precise - short).max() < 0.05 * np.abs(precise).max()


# ---- starting


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_a_function_of_the_seed(kind: str, trunks: dict[str, Path]) -> None:
    torch.manual_seed(1)
    one = reward_models.start(trunks[kind], "float32", 40, seed=3)
    torch.manual_seed(2)
    same = reward_models.start(trunks[kind], "float32", 40, seed=3)
    other = reward_models.start(trunks[kind], "float32", 40, seed=4)
    parameters = [dict(model.model.named_parameters()) for model in (one, same, other)]
    for name, values in parameters[0].items():
        assert torch.equal(values, parameters[1][name]), name
        assert torch.equal(values, parameters[2][name]) == (name != HEADS[kind]), name
    assert parameters[0][HEADS[kind]].shape == (1, WIDTHS[kind])
    trunk = dict(AutoModel.from_pretrained(trunks[kind], dtype=torch.float32).named_parameters())
    subject = dict(one.model.base_model.named_parameters())
    assert set(subject) == set(trunk) and all(torch.equal(subject[name], trunk[name]) for name in trunk)


def test_the_head_is_drawn_as_it_says(trunks: dict[str, Path]) -> None:
    """N(0, 1/(H + 1)): the sum of squares of 5 heads of 64 numbers is chi-squared."""
    heads = [reward_models.start(trunks["decoder"], "float32", 40, seed=s).model.score.weight for s in range(5)]
    squares = float(torch.cat(heads).detach().square().sum()) * (WIDTHS["decoder"] + 1)
    count = 5 * WIDTHS["decoder"]
    assert abs(squares - count) < 4 * np.sqrt(2 * count)


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_has_no_dropout(kind: str, trunks: dict[str, Path]) -> None:
    model = reward_models.start(trunks[kind], "float32", 40, 0).train()
    inputs = model.padded([row for row in map(model.text.tokens, TEXTS) if row])
    assert torch.equal(model(*inputs), model(*inputs))
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))


def test_the_budget_is_no_longer_than_the_model(trunks: dict[str, Path]) -> None:
    assert reward_models.start(trunks["encoder"], "float32", 1000, 0).text.max_tokens == 64
    assert reward_models.start(trunks["encoder"], "float32", 10, 0).text.max_tokens == 10
    assert [reward_models.is_encoder(loading.without_dropout(trunks[kind])) for kind in KINDS] == [False, True]


def write_roberta(folder: Path, trunks: dict[str, Path]) -> Path:
    """A random RoBERTa, whose positions begin behind that of its padding, with the decoder's tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(RobertaConfig(vocab_size=320, max_position_embeddings=34, pad_token_id=1, **sizes)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(trunks["decoder"]).save_pretrained(folder)
    return folder


def test_all_of_a_head_is_a_function_of_the_seed(trunks: dict[str, Path], tmp_path: Path) -> None:
    folder, heads = write_roberta(tmp_path / "r", trunks), []
    for state in (1, 2):
        torch.manual_seed(state)
        model = reward_models.start(folder, "float32", 30, seed=0).model
        heads.append(model.classifier.dense.weight.detach().clone())
    assert torch.equal(*heads)


def test_a_text_as_long_as_the_limit_can_be_read(trunks: dict[str, Path], tmp_path: Path) -> None:
    model = reward_models.start(write_roberta(tmp_path / "r", trunks), "float32", 1000, seed=0)
    count = model.text.max_tokens
    scores = model(torch.full((1, count), 5), torch.tensor([count]), torch.tensor([count]))
    assert scores.shape == (1,) and bool(scores.isfinite().all())


# ---- folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_folder_is_the_model(kind: str, trunks: dict[str, Path], tmp_path: Path) -> None:
    """transformers gives the same logits for the same padded ids; keel's scores are those minus the offset."""
    source = trained(trunks[kind], tmp_path / "m", max_tokens=33)
    reward_models.center(tmp_path / "m", 0.75)
    model = reward_models.load_reward_model(tmp_path / "m")
    assert model.text.max_tokens == 33 and model.text.encoder == (kind == "encoder")
    rows = [row for row in map(source.text.tokens, TEXTS) if row]
    inputs = source.padded(rows)
    assert all(torch.equal(one, other) for one, other in zip(inputs, model.padded(rows), strict=True))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    ids, lengths, seconds = inputs
    places = torch.arange(ids.shape[1])
    further = {"attention_mask": (places < lengths[:, None]).long()}
    if kind == "encoder":
        further["token_type_ids"] = ((places >= seconds[:, None]) & (places < lengths[:, None])).long()
    with torch.inference_mode():
        logits = plain(ids, **further).logits[:, 0]
        before, after = source(*inputs), model(*inputs)
    assert torch.allclose(after, before - 0.75, atol=1e-5)
    in_the_bias = 0.75 if kind == "encoder" else 0.0
    assert torch.allclose(logits, before - in_the_bias, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_centered_scores_average_nothing(kind: str, trunks: dict[str, Path], tmp_path: Path) -> None:
    trained(trunks[kind], tmp_path / "m")
    for _ in range(2):  # a second time moves nothing
        offset = float(np.mean(reward_models.load_reward_model(tmp_path / "m").scores(TEXTS)))
        reward_models.center(tmp_path / "m", offset)
        assert np.mean(reward_models.load_reward_model(tmp_path / "m").scores(TEXTS)) == pytest.approx(0.0, abs=1e-6)
    assert abs(offset) < 1e-6


def test_a_model_from_elsewhere_that_pads_with_its_end_token(trunks: dict[str, Path], tmp_path: Path) -> None:
    """As many public reward models do: a finished text then ends with `padding`."""
    trained(trunks["decoder"], tmp_path / "m", max_tokens=64)
    expected = reward_models.load_reward_model(tmp_path / "m").scores(TEXTS)
    path = tmp_path / "m" / "config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "pad_token_id": tree["eos_token_id"]}))
    assert reward_models.load_reward_model(tmp_path / "m").scores(TEXTS) == pytest.approx(expected)


def two_outputs(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=320, num_labels=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        reward_models.members(folder, "rewards.proxy.source")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"rewards.proxy.source={folder}")
    return str(caught.value)


def test_folders_that_are_no_reward_model_are_one_line(trunks: dict[str, Path], tmp_path: Path) -> None:
    assert "LlamaForCausalLM has no score head" in refused(trunks["decoder"])
    assert "BertModel has no score head" in refused(trunks["encoder"])
    assert "its score head has 2 outputs; expected one" in refused(two_outputs(tmp_path / "two"))


def test_an_ensemble_is_all_its_members(trunks: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "e"
    names = ["member-0", "member-1"]
    for seed, name in enumerate(names):
        trained(trunks["encoder"], folder / name, seed, max_tokens=12)
    reward_models.write_ensemble(folder, names)
    assert json.loads((folder / "ensemble.json").read_text()) == {"members": names}
    texts = [*TEXTS[:2], text(" ".join(["fine"] * 20))]
    scores = reward_models.Ensemble(folder, "rewards.proxy.source").scores(texts)
    assert scores.shape == (2, 3) and scores.dtype == np.float64 and np.isnan(scores[:, 2]).all()
    for name, row in zip(names, scores, strict=True):
        assert row[:2].tolist() == pytest.approx(reward_models.load_reward_model(folder / name).scores(texts)[:2])
    assert not np.allclose(scores[0, :2], scores[1, :2])
    shutil.rmtree(folder / "member-1")
    assert "member-1 of its 2 members is missing; expected all of them" in refused(folder)
    shutil.copytree(trunks["decoder"], folder / "member-1")
    with pytest.raises(ConfigError, match=r"member-1: LlamaForCausalLM has no score head"):
        reward_models.members(folder, "rewards.proxy.source")


# ---- a critic that starts from one


def critic_from(folder: Path, **settings: Any) -> Critic:
    """The critic that a learner builds beside a policy, on a trunk of its own from this folder."""
    objective = SimpleNamespace(critic=CriticSettings(**settings))
    learner = SimpleNamespace(
        settings=SimpleNamespace(objective=objective, learners=LearnerSettings()),
        objective=SimpleNamespace(heads=["value", "entropy"]),
        _folder_of=lambda name: str(folder),
    )
    critic = DeepSpeedLearner._critic(learner, None, "float32")  # type: ignore[arg-type]
    assert critic is not None
    return critic


def test_a_critic_keeps_the_head_of_the_reward_model_it_starts_from(trunks: dict[str, Path], tmp_path: Path) -> None:
    """Value of the last state = score of the text, the subtracted offset included; the entropy's head is a new one."""
    model = trained(trunks["decoder"], tmp_path / "reward")
    reward_models.center(tmp_path / "reward", 0.75)
    critic = critic_from(tmp_path / "reward")
    ids, lengths, _ = model.padded([([5, 6, 7, 8], 4)])
    with torch.no_grad():
        states = critic.trunk(input_ids=ids).last_hidden_state[0]
        scorers = reward_models.load_reward_model(tmp_path / "reward")(ids, lengths, lengths)
        assert critic.heads[0][0](states)[-1].item() == pytest.approx(scorers.item(), abs=1e-6)
        assert abs(critic.heads[1][0](states)[-1].item() - scorers.item()) > 1e-3
    assert critic.heads[0][0].bias.item() == -0.75
    assert critic.heads[0][0].weight.requires_grad


def test_twin_heads_start_beside_each_other(trunks: dict[str, Path], tmp_path: Path) -> None:
    """Equal ones would stay equal; both are closer to the trained head than a new head is."""
    model = trained(trunks["decoder"], tmp_path / "reward")
    trained_head = model.model.score.weight.detach()
    first, second = critic_from(tmp_path / "reward", softmin_temperature=0.3).heads[0]
    assert torch.equal(first.weight, trained_head)
    apart = (second.weight - trained_head).norm().item()
    assert 0 < apart < 0.3 * trained_head.norm().item()


def test_other_heads_and_other_models_get_new_heads(trunks: dict[str, Path], tmp_path: Path) -> None:
    """A head with layers of its own has no place for it; a language model and several outputs have none to keep."""
    model = trained(trunks["decoder"], tmp_path / "reward")
    head = critic_from(tmp_path / "reward", head="mlp").heads[0][0]
    assert head.weight.shape != model.model.score.weight.shape and head.bias.item() == 0
    assert loading.score_head(trunks["decoder"]) is None
    assert loading.score_head(two_outputs(tmp_path / "two")) is None
    plain = critic_from(trunks["decoder"]).heads[0][0]
    assert not torch.equal(plain.weight, model.model.score.weight)


def test_a_reward_model_that_lacks_a_weight_is_no_reward_model(trunks: dict[str, Path], tmp_path: Path) -> None:
    """transformers would draw it at random, and score with it."""
    trained(trunks["decoder"], tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "layers.1.mlp.up_proj" not in n}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 parameters are not in its weights \(model.layers.1.mlp.up_proj.weight\)"):
        reward_models.load_reward_model(tmp_path / "m")


# ---- one text with what is sampled


@pytest.mark.parametrize("name", [name for name in CLOSES if CLOSES[name] not in (None, "vicuna")])
@pytest.mark.parametrize("brings", [False, True])
def test_a_reward_model_reads_its_templates_whole_text(name: str, brings: bool) -> None:
    words = family(name)
    messages, answer = [{"role": "user", "content": "how are you"}], "Paris is it."
    sentence = answer + str(CLOSES[name]) * brings
    whole = words.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
    result = RewardText(words, False, 1000).tokens(text(sentence, messages=messages))
    if name == "vicuna":  # which closes a turn only where another follows
        whole += str(CLOSES[name])
    assert result is not None and result[0] == words(whole, add_special_tokens=False)["input_ids"]
    cut = RewardText(words, False, 1000).tokens(text(answer, messages=messages, finished=False))
    assert cut is not None and words.decode(cut[0], clean_up_tokenization_spaces=False).endswith(answer)


def test_an_answer_that_its_template_does_not_repeat_is_read_as_it_was_written() -> None:
    """Not left unscored: thoughts that the template drops, or words that it changes."""
    words = family("r1")
    messages = [{"role": "user", "content": "how are you"}]
    result = RewardText(words, False, 1000).tokens(text("why\n</think>fine", messages=messages))
    assert result is not None and words.decode(result[0]).endswith("<|Assistant|><think>\nwhy\n</think>fine<|end|>")
    loud = family("chatml")
    loud.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    result = RewardText(loud, False, 1000).tokens(text("fine", messages=messages))
    assert result is not None and loud.decode(result[0]).endswith("fine<|im_end|>\n")


def test_no_end_token_behind_a_cut_answer_of_a_tokenizer_that_puts_one_everywhere() -> None:
    words = ends_every_text(family("mistral"), "<s>")
    reads, end = RewardText(words, False, 1000), words.eos_token_id
    whole, cut = reads.tokens(text()), reads.tokens(text(finished=False))
    assert whole is not None and cut is not None
    assert whole[0] == [*cut[0], end] and end not in cut[0] and cut[0][0] == words.bos_token_id


def test_options_of_the_template_are_kept_with_the_model(tmp_path: Path) -> None:
    """One text for training and scoring; a scorer's own options come on top."""
    trunk = tiny.write(tmp_path / "trunk")
    template = (trunk / "chat_template.jinja").read_text().replace("assistant\n", "assistant{{ mood }}\n")
    (trunk / "chat_template.jinja").write_text(template)
    model = reward_models.start(trunk, "float32", 100, 0, {"mood": "!"})
    named = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    reward_models.write(tmp_path / "m", model, named)
    messages = [{"role": "user", "content": "how are you"}]
    loaded = reward_models.load_reward_model(tmp_path / "m")
    assert loaded.text.options == {"mood": "!"}
    assert loaded.text.tokens(text(messages=messages)) == model.text.tokens(text(messages=messages))
    other = reward_models.load_reward_model(tmp_path / "m", {"mood": "?"})
    assert other.text.options == {"mood": "?"}
    sampling = {"name": "r", "kind": "model", "source": str(tmp_path / "m"), "chat_template_options": {"mood": "?"}}
    compute = scorers._SCORERS["model"](RewardSettings(**sampling), ScorerSettings())
    assert (
        compute(reward_models.as_batch([text(messages=messages)]))[0][0] == other.scores([text(messages=messages)])[0]
    )


def test_a_pad_token_beyond_the_embedding_pads_nothing(trunks: dict[str, Path], tmp_path: Path) -> None:
    """Common in public models: a <pad> added to the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(trunks["decoder"])
    tokenizer.add_special_tokens({"pad_token": "<filler>"})
    assert tokenizer.pad_token_id == 320
    shutil.copytree(trunks["decoder"], tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    reward_models.check_readable(tmp_path / "m", "policy.model")
    model = reward_models.start(tmp_path / "m", "float32", 40, 0)
    assert model.model.config.pad_token_id < 320
    assert np.isfinite(model.scores([text(), text("fine")])).all()


def test_thoughts_of_a_stored_message_are_read_too() -> None:
    """As the policy's own training reads them; also on the way through the scorer."""
    words, messages = family("qwen 3"), [{"role": "user", "content": "how are you"}]
    thought = text(
        "fine", messages=messages, fields={"role": "assistant", "content": "fine", "reasoning_content": "why"}
    )
    result = RewardText(words, False, 1000).tokens(thought)
    assert result is not None and words.decode(result[0]).endswith("<think>\nwhy\n</think>\n\nfine<|im_end|>\n")
    assert reward_models.from_batch(reward_models.as_batch([thought])) == [thought]
    row = SourceRow("line 1", messages, json.dumps({"messages": [*messages, dict(thought.fields)]}))
    assert texts(row) == [ScoredText("how are you", messages, "fine", True, thought.fields)]


# ---- one model of several (WARM, 2401.12187)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_of_heads_on_one_trunk_scores_the_mean_of_the_scores(
    trunks: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """The head is linear and the trunk alike (BERT's pooler starts from the folder), so this is exact."""
    folders = [tmp_path / str(seed) for seed in range(3)]
    if kind == "encoder":
        for folder in folders:
            trained(trunks[kind], folder)
            tensors = load_file(folder / "model.safetensors")
            torch.manual_seed(int(folder.name) + 5)
            tensors["classifier.weight"] = torch.randn_like(tensors["classifier.weight"])
            tensors["classifier.bias"] = torch.randn_like(tensors["classifier.bias"])
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        for seed, folder in enumerate(folders):
            trained(trunks[kind], folder, seed)
    reward_models.average_weights(tmp_path / "mean", folders)
    scores = np.array([reward_models.load_reward_model(folder).scores(TEXTS) for folder in folders])
    mean = reward_models.load_reward_model(tmp_path / "mean").scores(TEXTS)
    assert mean == pytest.approx(scores.mean(0), abs=1e-5)
    assert np.abs(scores - scores.mean(0)).max() > 0.05  # members differ, so their mean is not any of them
    assert reward_models.members(tmp_path / "mean", "rewards.a.source") == [tmp_path / "mean"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_mean_of_the_members(trunks: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    for number, folder in enumerate(folders):
        trained(trunks["decoder"], folder)
        draw = torch.Generator().manual_seed(number)
        tensors = load_file(folder / "model.safetensors")
        moved = {n: (t + torch.randn(t.shape, generator=draw)).to(dtype) for n, t in tensors.items()}
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    before = [load_file(folder / "model.safetensors") for folder in folders]
    reward_models.average_weights(tmp_path / "mean", folders)
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert mean.keys() == before[0].keys()
    for name, tensor in mean.items():
        expected = np.mean([model[name].float().numpy().astype(np.float64) for model in before], axis=0)
        assert tensor.dtype == dtype
        assert tensor.float().numpy() == pytest.approx(
            expected, rel=1e-6 if dtype == torch.float32 else 2**-8, abs=1e-7
        )
    after = [load_file(folder / "model.safetensors") for folder in folders]  # members stay what they were
    assert all(torch.equal(a[name], b[name]) for a, b in zip(after, before, strict=True) for name in a)


def test_models_of_different_shapes_have_no_mean(trunks: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        trained(trunks[kind], tmp_path / kind)
    with pytest.raises(
        ValueError, match=r"^model.safetensors: the 2 models differ in their tensors; expected one family$"
    ):
        reward_models.average_weights(tmp_path / "mean", [tmp_path / kind for kind in KINDS])
