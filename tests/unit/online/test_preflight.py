"""What can be known to fail is one line, before anything is written."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from keel import files
from keel.config import loader
from keel.errors import ConfigError
from keel.learner import tiny
from keel.online import preflight


def wrong_count(completions: list[str], **columns: Any) -> list[float]:
    return [1.0]


def raises(completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("answer")


def right_answer(completions: list[str], answer: list[str | None], **columns: Any) -> list[float]:
    return [float(text in completion) for text, completion in zip(answer, completions, strict=True)]


NOT_A_FUNCTION = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tree(tmp_path: Path, model: Path) -> dict[str, Any]:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(8)))
    return {
        "run": {"directory": str(tmp_path / "run")},
        "policy": {"model": str(model)},
        "prompts": {"source": str(tmp_path / "prompts.jsonl"), "max_tokens": 32, "held_out": 2},
        "sampling": {"max_tokens": 8},
        "rewards": [{"name": "distinct", "source": "keel.examples:distinct_token_ratio"}],
        "metrics": {"port": 0},
        "cluster": {"object_store_bytes": 2**27, "min_memory_bytes": 0},
    }


def refused(tree: dict[str, Any], **blocks: Any) -> str:
    """The one line for these blocks changed; the run directory is still absent."""
    merged = {**tree, **{k: {**tree.get(k, {}), **v} if isinstance(v, dict) else v for k, v in blocks.items()}}
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        preflight.prepare(loader.parse(merged))
    assert "\n" not in str(caught.value)
    assert not Path(tree["run"]["directory"]).exists()
    return str(caught.value)


def test_a_good_run_is_prepared_and_nothing_is_written(tree: dict[str, Any]) -> None:
    prepared = preflight.prepare(loader.parse(tree))
    assert prepared.sampling.stop_token_ids == (tiny.SPECIAL.index("<|im_end|>"),)
    assert prepared.prompts.counts["held_out"] == 2 and prepared.prompts.counts["train"] == 6
    assert prepared.models.reference == prepared.models.policy
    assert not prepared.directory.exists()
    few = "prompts.held_out=2: fewer than guard.min_rows=8, so its detectors that read evaluations say nothing"
    assert few in prepared.notes
    enough = preflight.prepare(loader.parse({**tree, "guard": {"min_rows": 2}}))
    assert not [note for note in enough.notes if "held_out" in note]


def test_stop_tokens_come_from_the_setting_the_generation_config_or_the_tokenizer(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    def stop(**sampling: Any) -> tuple[int, ...]:
        changed = {**tree, "policy": {"model": str(folder)}, "sampling": {"max_tokens": 8, **sampling}}
        return preflight.prepare(loader.parse(changed)).sampling.stop_token_ids

    folder = tiny.write(tmp_path / "model")
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert stop() == (2, 7)  # 2 is also what the chat template and the tokenizer end with
    assert stop(stop_token_ids=[9]) == (9,)
    assert stop(stop_token_ids=[]) == ()
    generation.write_text(json.dumps({"eos_token_id": 7}))
    assert set(stop()) == {2, 7}  # a file that forgets the template's own end of a turn no longer hides it
    generation.unlink()
    assert stop() == (tiny.SPECIAL.index("<|im_end|>"),)


def test_missing_model_path(tree: dict[str, Any]) -> None:
    assert refused(tree, policy={"model": "./absent"}).startswith("policy.model=./absent: no such folder; expected")
    assert refused(tree, reference={"model": "./absent"}).startswith("reference.model=./absent: ")


def test_prompts_without_the_scores_that_shaping_centers_by(tree: dict[str, Any], tmp_path: Path) -> None:
    shaping = {"reference_scores": "scores"}
    assert refused(tree, shaping=shaping).startswith("shaping.reference_scores=scores: a row of the prompts has no")
    rows = [{"prompt": f"What is {n}?", "scores": [n, 0.5]} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = preflight.prepare(loader.parse({**tree, "shaping": shaping}))
    assert json.loads(prepared.prompts.batch([0]).column("prompt_columns")[0].as_py())["scores"][1] == 0.5


def test_a_model_without_tokenizer_or_chat_template(tree: dict[str, Any], tmp_path: Path) -> None:
    bare = tiny.write(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    line = refused(tree, policy={"model": str(bare)}, prompts={"system_prompt": "Be brief."})
    assert line.startswith(f"policy.model={bare}: its tokenizer has no chat template, but prompts.system_prompt")
    (bare / "tokenizer.json").unlink()
    line = refused(tree, policy={"model": str(bare)})
    assert line.startswith(f"policy.model={bare}: no tokenizer in it; expected")
    (bare / "config.json").unlink()
    line = refused(tree, policy={"model": str(bare)})
    assert line.startswith(f"policy.model={bare}: no config.json in it; expected")


def test_prompt_files(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    line = refused(tree, prompts={"source": str(tmp_path / "empty.jsonl")})
    assert line == f"prompts.source={tmp_path / 'empty.jsonl'}: no rows; expected one prompt a row"
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    line = refused(tree, prompts={"source": str(tmp_path / "bad.jsonl")})
    assert line.startswith(f"prompts.source={tmp_path / 'bad.jsonl'}: line 2 is not JSON: ") and "; expected" in line
    line = refused(tree, prompts={"source": str(tmp_path / "absent.jsonl")})
    assert line.startswith(f"prompts.source={tmp_path / 'absent.jsonl'}: no such file or folder; expected")
    assert refused(tree, prompts={"max_tokens": 2}).startswith("prompts.max_tokens=2: 8 of 8 prompts of")


def test_a_reward_that_cannot_read_the_evaluation_prompts_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    for name, columns in (("prompts", {"answer": "a"}), ("same", {"answer": "b"}), ("bare", {})):
        rows = [json.dumps({"prompt": f"What is {name} {n}?", **columns}) for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    reward = [{"name": "right", "source": f"{__name__}:right_answer"}]
    same = {**tree, "rewards": reward, "evaluation": {"source": str(tmp_path / "same.jsonl")}}
    counts = preflight.prepare(loader.parse(same)).prompts.counts
    assert (counts["train"], counts["held_out"]) == (8, 2)
    line = refused(tree, rewards=reward, evaluation={"source": str(tmp_path / "bare.jsonl")})
    assert line.startswith(f"rewards.right.source={__name__}:right_answer: raised")


def test_context_of_the_model(tree: dict[str, Any]) -> None:
    line = refused(tree, prompts={"max_tokens": 157}, sampling={"max_tokens": 100})
    assert line.startswith("prompts.max_tokens + sampling.max_tokens=257: the model has 256 positions; expected")
    full = {**tree, "prompts": {**tree["prompts"], "max_tokens": 156}, "sampling": {"max_tokens": 100}}
    assert preflight.prepare(loader.parse(full)).sampling.max_tokens == 100


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("absent_module:f", "cannot be imported"),
        ("keel.examples:absent", "cannot be imported"),
        (f"{__name__}:NOT_A_FUNCTION", "a int; expected a function"),
        (f"{__name__}:wrong_count", "returned 1 values for 2 completions"),
        (f"{__name__}:raises", "raised KeyError"),
    ],
)
def test_reward_functions(tree: dict[str, Any], source: str, expected: str) -> None:
    line = refused(tree, rewards=[{"name": "mine", "source": source}])
    assert line.startswith(f"rewards.mine.source={source}: ") and expected in line


def test_http_rewards_want_a_url(tree: dict[str, Any]) -> None:
    line = refused(tree, rewards=[{"name": "remote", "kind": "http", "source": "localhost:80"}])
    assert line.startswith("rewards.remote.source=localhost:80: expected a URL that starts with http://")


def test_reward_models_want_a_folder(tree: dict[str, Any]) -> None:
    line = refused(tree, rewards=[{"name": "judge", "kind": "model", "source": "./absent"}])
    assert line.startswith("rewards.judge.source=./absent: no such folder; expected")


def test_a_taken_port(tree: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused(tree, metrics={"port": port}).startswith(f"metrics.port={port}: cannot listen on 127.0.0.1")


def test_memory_and_shared_memory(tree: dict[str, Any]) -> None:
    assert refused(tree, cluster={"min_memory_bytes": 2**60}).startswith(f"cluster.min_memory_bytes={2**60}: ")
    assert refused(tree, cluster={"object_store_bytes": 2**60}).startswith(f"cluster.object_store_bytes={2**60}: ")


@pytest.mark.parametrize(
    ("address", "environment", "joined"),
    [
        (None, "", None),
        (None, "head:6379", "head:6379"),
        ("other:6379", "head:6379", "other:6379"),
        ("local", "head:6379", None),
    ],
)
def test_which_ray_a_run_gets_and_shared_memory_only_for_its_own(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, address: str | None, environment: str, joined: str | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", environment)
    settings = loader.parse({**tree, "cluster": {**tree["cluster"], "address": address, "object_store_bytes": 2**60}})
    assert settings.cluster.address_to_join == joined
    if joined is None:
        with pytest.raises(ConfigError, match="/dev/shm has"):
            preflight.check_memory(settings.cluster)
    else:
        preflight.check_memory(settings.cluster)


def test_the_address_of_a_job_server_is_no_cluster_to_join(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert refused(tree).startswith("cluster.address or RAY_ADDRESS=http://head:8265: is where jobs are submitted")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert "RAY_ADDRESS=ray://head:10001: is no address of a cluster; expected HOST:PORT" in refused(tree)


def test_a_directory_of_another_run(tree: dict[str, Any]) -> None:
    settings = loader.parse(tree)
    files.write(Path(settings.run_directory) / "config.yaml", loader.dump(settings).encode())
    preflight.prepare(settings)  # the same settings go on
    other = loader.parse({**tree, "learners": {"learning_rate": 0.5}})
    with pytest.raises(
        ConfigError, match=r"holds a run with other settings \(learners.learning_rate: 1e-06 there, 0.5 here\)"
    ):
        preflight.prepare(other)


def begun(tree: dict[str, Any], trained: int, finished: bool = False, **learners: Any) -> dict[str, Any]:
    """The settings of a run of 4 steps, with a checkpoint at one of them."""
    changed = {**tree, "run": {**tree["run"], "steps": 4}, "learners": learners}
    directory = Path(tree["run"]["directory"])
    files.write(directory / "config.yaml", loader.dump(loader.parse(changed)).encode())
    files.write_json(directory / "checkpoints" / f"step-{trained:06d}" / "state.json", {"finished": finished})
    files.write(directory / "checkpoints" / f"step-{trained:06d}" / "COMMIT", b"")
    return changed


def longer(tree: dict[str, Any], steps: int) -> Any:
    return loader.parse({**tree, "run": {**tree["run"], "steps": steps}})


def test_a_run_can_be_extended_or_ended_earlier_but_not_before_what_it_trained(tree: dict[str, Any]) -> None:
    changed = begun(tree, trained=3)
    for steps in (3, 4, 9):
        assert preflight.prepare(longer(changed, steps)).settings.run.steps == steps
    with pytest.raises(ConfigError, match=r"^run\.steps=2: .*/run has trained 3 steps; expected at least 3$"):
        preflight.prepare(longer(changed, 2))


def test_a_run_that_was_ended_for_good_is_not_extended(tree: dict[str, Any]) -> None:
    changed = begun(tree, trained=3, finished=True)
    written = {path: path.read_bytes() for path in Path(tree["run"]["directory"]).rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError,
        match=r"\Arun\.steps=9: .*/run was ended for good after step 3, by its guard or its objective; expected"
        r" run\.steps=4, or another run\.name\Z",
    ):
        preflight.prepare(longer(changed, 9))
    assert {path: path.read_bytes() for path in Path(tree["run"]["directory"]).rglob("*") if path.is_file()} == written
    for steps in (3, 4):
        assert preflight.prepare(longer(changed, steps)).settings.run.steps == steps


def test_a_run_whose_learning_rate_falls_to_its_end_keeps_its_length(tree: dict[str, Any]) -> None:
    changed = begun(tree, trained=4, schedule="cosine")
    preflight.prepare(longer(changed, 4))
    with pytest.raises(
        ConfigError, match=r"run\.steps=6: learners\.schedule=cosine falls to 0 at run\.steps, which is 4"
    ):
        preflight.prepare(longer(changed, 6))


def test_a_single_sample_a_prompt_is_enough_where_nothing_is_compared(tree: dict[str, Any]) -> None:
    """The reward functions are tried on two completions, also then."""
    alone = {
        "sampling": {**tree.get("sampling", {}), "samples_per_prompt": 1},
        "objective": {"advantage": "reinforce_pp"},
    }
    assert preflight.prepare(loader.parse({**tree, **alone})).prompts.batch([0]).num_rows == 1


def test_a_teacher_speaks_the_same_vocabulary(tree: dict[str, Any], model: Path, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(model, other)
    wanted = {"kind": "logits_convexity", "anchor": "reference", "dense": {"teacher": str(other)}}
    prepared = preflight.prepare(loader.parse({**tree, "objective": wanted}))
    assert prepared.models.frozen == {"teacher": str(other), "reference": str(model)}
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "vocab_size": settings["vocab_size"] + 1}))
    assert "objective.dense.teacher=" in refused(tree, objective=wanted)


def test_a_run_directory_that_cannot_be_made_is_one_line(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.directory=.*/one: .*/file is no folder that can be written to"):
        preflight.check_directory(tmp_path / "file" / "runs" / "one", loader.parse(tree))
    preflight.check_directory(tmp_path / "new" / "one", loader.parse(tree))
