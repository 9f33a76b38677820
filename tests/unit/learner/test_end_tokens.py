"""Which tokens end a completion, and what a run says of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from keel.config import loader
from keel.config.label import LabelSettings
from keel.config.stages import PreferSettings, RewardModelSettings, SupervisedSettings
from keel.errors import ConfigError
from keel.learner import end_tokens, tiny
from keel.learner.end_tokens import EndTokens
from keel.learner.model_text import ModelText
from keel.online import preflight
from keel.stages import evaluate, label, policy, reward
from vocabularies import CLOSES, byte_level, family


def decided(tokenizer: Any, folder: Path, configured: list[int] | None = None, **files: Any) -> EndTokens:
    """The decision for a tokenizer beside these eos_token_id of generation_config and config (a value, or a tree)."""
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        tree = value if isinstance(value, dict) else {"eos_token_id": value}
        (folder / f"{name}.json").write_text(json.dumps(tree))
    return end_tokens.decide(folder, ModelText(tokenizer), len(tokenizer), configured)


def warned(ends: EndTokens) -> list[str]:
    return [line for line in ends.notes if line.startswith("warning: ")]


@pytest.mark.parametrize("name", list(CLOSES))
def test_the_template_and_the_tokenizer_both_stop_and_the_templates_is_trained(name: str, tmp_path: Path) -> None:
    tokenizer = family(name)
    eos = tokenizer.eos_token_id
    closing = eos if CLOSES[name] is None else tokenizer.convert_tokens_to_ids(CLOSES[name])
    ends = decided(tokenizer, tmp_path)
    assert set(ends.stop) == {eos, closing} and (ends.chat, ends.plain) == (closing, eos)
    assert ends.notes[0].startswith("end tokens: ") and "\n" not in "".join(ends.notes)
    shown = tokenizer.convert_ids_to_tokens(closing)
    assert shown in ends.notes[0]
    assert any("the chat template closes a turn with" in line for line in warned(ends)) == (
        closing != eos or CLOSES[name] is None
    )


@pytest.mark.parametrize(
    ("files", "stop", "warnings"),
    [
        ({"generation_config": 0}, {0, 2}, 1),
        ({"generation_config": [0, 1]}, {0, 1, 2}, 1),
        ({"generation_config": [0, 1, 2]}, {0, 1, 2}, 0),
        ({"config": 0}, {0, 2}, 1),
        ({"config": [2, 0]}, {0, 2}, 0),
        ({"config": {"text_config": {"eos_token_id": [0]}}}, {0, 2}, 1),
        ({"config": {"eos_token_id": None, "text_config": {"eos_token_id": 0}}, "generation_config": 1}, {0, 1, 2}, 2),
        ({"generation_config": None, "config": None}, {2}, 0),
        ({"config": True}, {2}, 0),
    ],
)
def test_all_that_know_of_an_end_are_asked(
    files: dict[str, Any], stop: set[int], warnings: int, tmp_path: Path
) -> None:
    ends = decided(family("chatml"), tmp_path, **files)
    assert set(ends.stop) == stop and ends.chat == ends.plain == 2
    assert len(warned(ends)) == warnings


def test_a_file_that_forgets_the_end_of_a_turn_is_named(tmp_path: Path) -> None:
    lines = warned(decided(family("llama 3"), tmp_path, generation_config=1, config=[1, 4]))
    assert (
        "the tokenizer's end token is '<|end_of_text|>' (1), the chat template closes a turn with '<|eot_id|>' (4)"
        in lines[0]
    )
    assert lines[1].startswith("warning: generation_config.json names '<|end_of_text|>' (1) and not '<|eot_id|>' (4)")
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("generation", "stops"),
    [
        ({"eos_token_id": 40}, True),  # its author named an ordinary token
        ({"eos_token_id": 40, "_from_model_config": True}, False),  # a default that transformers copied
        ({"eos_token_id": 50256}, False),  # beyond the vocabulary
    ],
)
def test_defaults_of_another_tokenizer_end_nothing(generation: dict[str, Any], stops: bool, tmp_path: Path) -> None:
    ends = decided(family("chatml"), tmp_path, generation_config=generation, config=generation["eos_token_id"])
    assert set(ends.stop) == ({2, 40} if stops else {2})
    assert any("are no special tokens of the tokenizer" in line for line in warned(ends)) != stops


def test_where_nothing_ends_a_completion_the_run_says_so(tmp_path: Path) -> None:
    ends = decided(byte_level(["<pad>"], pad_token="<pad>"), tmp_path)
    assert (ends.stop, ends.chat, ends.plain) == ((), None, None)
    assert "none (nothing names one)" in ends.notes[0] and "nothing can end a completion" in warned(ends)[0]


def test_the_setting_decides_alone(tmp_path: Path) -> None:
    tokenizer = family("llama 3")
    ends = decided(tokenizer, tmp_path, [1], generation_config=[1, 4])
    assert (ends.stop, ends.chat, ends.plain) == ((1,), 1, 1)
    assert warned(ends) == [
        "warning: sampling.stop_token_ids leaves out '<|eot_id|>' (4), with which the chat template closes a turn"
    ]
    ends = decided(tokenizer, tmp_path, [], generation_config=[1, 4])
    assert (ends.stop, ends.chat, ends.plain) == ((), None, None)
    assert ends.notes == (
        "end tokens: none (sampling.stop_token_ids=[]): completions run to their budget, and none is trained behind"
        " answers",
    )


@pytest.mark.parametrize("number", [-1, 10_000])
def test_a_stop_token_that_the_model_has_not_is_refused(number: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^sampling.stop_token_ids=\[2, {number}\]: {number} is beyond the model's"):
        decided(family("chatml"), tmp_path, [2, number])


@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_an_end_token_that_the_model_has_not_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is beyond the model's vocabulary of 1; expected the model's own tokenizer"):
        end_tokens.decide(tmp_path, ModelText(family(name)), 1)


# ---- every command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: its tokenizer, generation config and config end with <pad>, its template with <|im_end|>."""
    folder = tiny.write(tmp_path_factory.mktemp("models") / "base")
    for name, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**tree, key: "<pad>" if key == "eos_token" else 0}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return folder


def conversations(path: Path) -> Path:
    asked = [{"role": "user", "content": "What is love?"}]
    rows = [
        {
            "prompt": [*asked[:-1], {"role": "user", "content": f"What is {n}?"}],
            "chosen": [{"role": "assistant", "content": "A good question!"}],
            "rejected": [{"role": "assistant", "content": "The quick fox"}],
        }
        for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fair(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def tree_for(command: str, model: Path, tmp_path: Path, **sampling: Any) -> dict[str, Any]:
    source = conversations(tmp_path / "pairs.jsonl")
    judge = {"name": "fair", "source": f"{__name__}:fair"}
    shared = {
        "run": {"name": command, "directory": str(tmp_path / "run")},
        "policy": {"model": str(model)},
        "prompts": {"source": str(source), "held_out": 2, "max_tokens": 64},
        "cluster": {"min_memory_bytes": 2**20, "object_store_bytes": 2**27},
    }
    if command in ("train", "evaluate"):
        return {**shared, "sampling": {"max_tokens": 16, **sampling}, "rewards": [judge], "metrics": {"port": 0}}
    if command == "label":
        return {**shared, "sampling": {"max_tokens": 16, **sampling}, "judge": judge}
    return {**shared, "metrics": {"port": 0}, "training": {"rows_per_step": 2}}


def prepared_for(command: str, tree: dict[str, Any]) -> Any:
    match command:
        case "train":
            return preflight.prepare(loader.parse(tree))
        case "evaluate":
            return evaluate.prepare(loader.parse(tree), tree["policy"]["model"], Path(tree["run"]["directory"]))
        case "label":
            return label.prepare(loader.parse_as(LabelSettings, tree))
        case "reward":
            return reward.prepare(loader.parse_as(RewardModelSettings, tree))
        case "sft":
            messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A good question!"}]
            rows = [{"messages": [{"role": "user", "content": f"What {n}?"}, messages[1]]} for n in range(8)]
            Path(tree["prompts"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
            return policy.prepare(loader.parse_as(SupervisedSettings, tree))
    return policy.prepare(loader.parse_as(PreferSettings, tree))


@pytest.mark.parametrize("command", ["train", "evaluate", "label", "reward", "sft", "prefer"])
def test_every_command_says_what_it_chose_and_where_they_disagree(command: str, base: Path, tmp_path: Path) -> None:
    prepared = prepared_for(command, tree_for(command, base, tmp_path))
    assert prepared.notes[0].startswith("end tokens: '<|im_end|>' (2) of chat template; '<pad>' (0) of tokenizer,")
    assert "the tokenizer's end token is '<pad>' (0), the chat template closes a turn with" in prepared.notes[1]


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, {0, 2}), ([], set()), ([0], {0}), ([2, 5], {2, 5})], ids=str
)
def test_stop_tokens_mean_the_same_in_training_labels_and_evaluation(
    configured: list[int] | None, expected: set[int], base: Path, tmp_path: Path
) -> None:
    """[]: no end token anywhere."""
    prepared = []
    for command in ("train", "evaluate", "label"):
        (tmp_path / command).mkdir()
        tree = tree_for(command, base, tmp_path / command, stop_token_ids=configured)
        against = {"evaluation": {"against": tree["policy"]["model"]}} if command == "evaluate" else {}
        prepared.append(prepared_for(command, tree | against))
    assert [set(stage.models.sampling(stage.settings.sampling).stop_token_ids) for stage in prepared] == [expected] * 3
    assert set(prepared[1].other.end_tokens.stop) == expected


@pytest.mark.parametrize("command", ["sft", "prefer"])
def test_what_is_trained_ends_as_the_template_closes(command: str, base: Path, tmp_path: Path) -> None:
    rows = prepared_for(command, tree_for(command, base, tmp_path)).rows
    for ids in rows.held_out().column("completion_tokens").to_pylist():
        assert ids[-1] == 2 and not {0, 2} & set(ids[:-1])


@pytest.mark.parametrize("command", ["train", "label", "evaluate"])
def test_a_stop_token_beyond_the_vocabulary_is_one_line(command: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^sampling.stop_token_ids=\[320\]: 320 is beyond the model's vocabulary of 320"
    ):
        prepared_for(command, tree_for(command, base, tmp_path, stop_token_ids=[320]))


# ---- tokens that the model has not


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a token more than its embedding: <extra> (320)."""
    from transformers import AutoTokenizer

    folder = tiny.write(tmp_path_factory.mktemp("models") / "larger")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(["<extra>"]) == 1 and len(tokenizer) == 321
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["train", "evaluate", "label", "sft", "prefer"])
@pytest.mark.parametrize("place", ["prompt", "answer", "none"])
def test_texts_with_a_token_that_the_model_has_not_are_one_line(
    command: str, place: str, larger: Path, tmp_path: Path
) -> None:
    tree = tree_for(command, larger, tmp_path)
    rows = [
        {
            "prompt": f"What is {n}?" + " <extra>" * (place == "prompt" and n == 5),
            "completion": f"It is {n}." + "<extra>" * (place == "answer" and n == 5),
        }
        for n in range(8)
    ]
    if command == "prefer":
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no"} for r in rows]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["prompts"]["source"] = str(source)
    stages = {"sft": (SupervisedSettings, policy), "prefer": (PreferSettings, policy)}
    if command in stages:
        kind, stage = stages[command]
        prepare = lambda: stage.prepare(loader.parse_as(kind, tree))  # noqa: E731
    else:
        prepare = lambda: prepared_for(command, tree)  # noqa: E731
    if place == "none" or (place == "answer" and command not in stages):
        assert prepare().notes
        return
    with pytest.raises(ConfigError, match=r"its tokenizer makes token 320 .* beyond the model's vocabulary of 320"):
        prepare()


def test_a_run_on_stored_completions_looks_at_them_too(larger: Path, tmp_path: Path) -> None:
    tree = tree_for("train", larger, tmp_path, stored_ratio=1.0, samples_per_prompt=2)
    tree |= {"objective": {"kind": "preference"}, "rewards": [{"name": "label", "kind": "stored"}]}
    rows = [{"prompt": str(n), "chosen": f"It is {n}.<extra>", "rejected": "no"} for n in range(9)]
    Path(tree["prompts"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="token 320 of a text of"):
        prepared_for("train", tree)


def test_a_reward_model_without_its_tokenizers_tokens_is_one_line(larger: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its tokenizer has token 320, beyond the model's vocabulary of 320"):
        prepared_for("reward", tree_for("reward", larger, tmp_path))


# ---- options of the template


@pytest.mark.parametrize("command", ["train", "evaluate", "label", "reward", "sft", "prefer"])
def test_an_option_that_the_template_does_not_read_is_refused(command: str, base: Path, tmp_path: Path) -> None:
    tree = tree_for(command, base, tmp_path)
    tree["policy"]["chat_template_options"] = {"enable_thinkng": False}
    expected = r"^policy.chat_template_options.enable_thinkng: the chat template does not read it; expected an option"
    with pytest.raises(ConfigError, match=expected):
        prepared_for(command, tree)


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "return_dict", "chat_template"])
def test_an_option_that_keel_gives_itself_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    tree = tree_for("train", base, tmp_path)
    tree["policy"]["chat_template_options"] = {name: True}
    with pytest.raises(ConfigError, match=rf"{name} is no option of a template"):
        loader.parse(tree)


@pytest.mark.parametrize("command", ["train", "evaluate", "label", "sft", "prefer"])
def test_an_option_changes_what_every_command_reads(command: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for path in base.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    template = (base / "chat_template.jinja").read_text().replace("assistant\n", "assistant{{ mood }}\n")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    lengths = []
    for mood in ("", "!"):
        tree = tree_for(command, tmp_path / "model", tmp_path)
        tree["policy"]["chat_template_options"] = {"mood": mood}
        prepared = prepared_for(command, tree)
        prompts = prepared.prompts if command in ("train", "evaluate") else None
        rows = prepared.prompts if command == "label" else None
        batch = rows or (prompts.held_out() if prompts else prepared.rows.held_out())
        lengths.append([len(ids) for ids in batch.column("prompt_tokens").to_pylist()])
    assert lengths[1] == [length + 1 for length in lengths[0]]
