"""Nothing that came from a file or the network is run: no pickle is opened, no model's or dataset's code is imported."""

import ast
import io
import json
import os
import pickle
import socket
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from keel import schema
from keel.config import loader
from keel.config.monitoring import MetricsSettings
from keel.config.prompts import PromptSettings
from keel.config.workers import GeneratorSettings
from keel.errors import ConfigError
from keel.learner import loading, reward_models, tiny
from keel.observability import endpoint, metrics
from keel.online import preflight
from keel.rollout import datasets, generator
from source_tree import imports, modules

UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "runpy"}
OPENERS = {"load_checkpoint", "read_pickle", "unsafe_load", "full_load"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
LOADERS = {("torch", "load"), ("numpy", "load"), ("np", "load"), ("yaml", "load"), ("yaml", "load_all")}
KEYWORDS = {"trust_remote_code": False, "use_safetensors": True, "allow_pickle": False}


def opened(tree: ast.Module) -> set[str]:
    """What a module uses that could run something it reads."""
    found = {full.split(".")[0] for full in imports(tree)} & UNPICKLERS
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        owner, _, name = ast.unparse(call.func).rpartition(".")
        if name in OPENERS or (owner, name) in LOADERS or (name in BUILT_IN and not owner):
            found.add(name)
        for keyword in call.keywords:
            if keyword.arg in KEYWORDS and getattr(keyword.value, "value", None) is not KEYWORDS[keyword.arg]:
                found.add(keyword.arg)
    return found


def test_no_module_opens_a_pickle_or_runs_a_text() -> None:
    assert {(name, what) for name, tree in modules().items() for what in opened(tree)} == set()


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from joblib import load", "torch.load(p)", "np.load(p, allow_pickle=True)", "f(allow_pickle=x)",
     "yaml.load(t)", "yaml.unsafe_load(t)", "eval(t)", "engine.load_checkpoint(p)", "f(trust_remote_code=yes)"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert opened(ast.parse(code))


def test_every_model_is_loaded_from_safetensors_without_its_code() -> None:
    seen = 0
    for name, tree in modules().items():
        for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
            if not (isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"):
                continue
            kind = ast.unparse(call.func.value)
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
            seen += 1
            assert kind == "GenerationConfig" or given.get("trust_remote_code") is False, (name, kind)
            assert not kind.startswith("AutoModel") or given.get("use_safetensors") is True or "gguf_file" in given, (
                name
            )
    assert seen >= 8
    given = generator.engine_arguments("folder", GeneratorSettings(), 128)
    assert given["load_format"] == "safetensors" and "trust_remote_code" not in given
    tree = modules()["rollout.generator"]
    engines = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "LLM"]
    assert [ast.unparse(engine) for engine in engines] == ["LLM(**arguments)"]
    set_arguments = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("arguments")
    ]
    assert set_arguments == [
        "arguments = engine_arguments(folder, settings, max_model_tokens)",
        "arguments['enable_prefix_caching'] = False",
    ]


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    """A path that must not come to exist, although opening `bomb(marker)` makes it."""
    path = tmp_path / "ran"
    pickle.loads(bomb(path))
    path.rmdir()
    yield path
    assert not path.exists()


def bomb(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker))


def torch_bomb(marker: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"weight": Bomb(marker)}, content)
    return content.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "consolidated.00.pth"])
@pytest.mark.parametrize("form", [bomb, torch_bomb])
def test_weights_that_are_a_pickle_are_refused(folder: Path, marker: Path, name: str, form: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(form(marker))
    line = rf"^policy\.model=.*its weights are a pickle \({name}\), which is never opened; expected \*\.safetensors$"
    with pytest.raises(ConfigError, match=line):
        loading.locate_policy(str(folder), "policy.model")
    with pytest.raises(ConfigError, match="its weights are a pickle"):
        reward_models.members(folder, "rewards.mine.source")
    (folder / "ensemble.json").write_text('{"members": ["."]}')
    with pytest.raises(ConfigError, match="its weights are a pickle"):
        reward_models.members(folder, "rewards.mine.source")
    for load in (loading.load_policy, loading.load_trunk):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            load(folder, "float32")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        reward_models.load_reward_model(folder)


@pytest.mark.parametrize("form", [bomb, torch_bomb])
def test_a_pickle_beside_safetensors_is_left_alone(folder: Path, marker: Path, form: Any) -> None:
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "model.ckpt",
        "adapter_model.bin",
        "vocab.pkl",
    ):
        (folder / name).write_bytes(form(marker))
    assert loading.locate_policy(str(folder), "policy.model") == folder
    loading.load_policy(folder, "float32")
    loading.load_trunk(folder, "float32")
    (folder / "model.safetensors").unlink()
    save_file({"score.weight": torch.zeros(1, 4)}, folder / "other.safetensors")  # as if there were weights
    for load in (loading.load_policy, loading.load_trunk):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            load(folder, "float32")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        reward_models.load_reward_model(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(ConfigError, match=r"holds adapter_config\.json; expected whole weights"):
        loading.locate(str(folder), "policy.model")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json"]
)
@pytest.mark.parametrize("form", [bomb, torch_bomb])
def test_a_tokenizer_that_is_a_pickle_is_refused_or_not_read(folder: Path, marker: Path, name: str, form: Any) -> None:
    (folder / name).write_bytes(form(marker))
    if name in ("tokenizer.json", "tokenizer_config.json"):
        with pytest.raises(ConfigError, match=r"^policy\.model=.*tokenizer cannot be loaded"):
            loading.load_tokenizer(folder, "policy.model")
    else:
        loading.load_tokenizer(folder, "policy.model")  # tokenizer.json is there


CODE = """
import os
os.mkdir({marker!r})
class Mine: ...
"""


def with_code(folder: Path, marker: Path, name: str, **changes: Any) -> None:
    (folder / "mine.py").write_text(CODE.format(marker=str(marker)))
    tree = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(tree | changes))


CODE_OF = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine", "AutoModel": "mine.Mine"}
CODE_OF["AutoModelForSequenceClassification"] = "mine.Mine"


def test_a_model_that_needs_its_authors_code_is_refused(folder: Path, marker: Path) -> None:
    with_code(folder, marker, "config.json", auto_map=CODE_OF, model_type="mine")
    line = r"model_type=mine needs its author's code \(auto_map in config\.json\), which is never run; expected"
    for check in (loading.locate, loading.locate_policy, lambda path, setting: reward_models.members(folder, setting)):
        with pytest.raises(ConfigError, match=line):
            check(str(folder), "policy.model")
    for load in (loading.load_policy, loading.load_trunk):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(folder, "float32")


def test_a_model_that_transformers_has_is_loaded_without_the_code_beside_it(folder: Path, marker: Path) -> None:
    with_code(folder, marker, "config.json", auto_map=CODE_OF)
    assert loading.locate_policy(str(folder), "policy.model") == folder
    loading.load_policy(folder, "float32")
    loading.load_trunk(folder, "float32")


def test_a_tokenizer_never_runs_code(folder: Path, marker: Path) -> None:
    changes: dict[str, Any] = {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, "tokenizer_class": "Mine"}
    with_code(folder, marker, "tokenizer_config.json", **changes)
    try:
        loading.load_tokenizer(folder, "policy.model")
    except ConfigError as error:
        assert "tokenizer cannot be loaded" in str(error)  # whether or not, the marker's fixture looks for what ran


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\x80", '{"a": ' * 50_000])
def test_a_damaged_config_is_one_line(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin1"))
    for check in (loading.locate_policy, lambda path, setting: reward_models.members(folder, setting)):
        with pytest.raises(ConfigError, match=r"^policy\.model=.*config\.json"):
            check(str(folder), "policy.model")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"members": []}', '{"members": "all"}', '{"members": [1]}'])
def test_a_damaged_ensemble_is_one_line(folder: Path, content: str) -> None:
    (folder / "ensemble.json").write_text(content)
    with pytest.raises(ConfigError, match=r"names no members"):
        reward_models.members(folder, "rewards.mine.source")


def pickled_type(marker: Path) -> pa.Schema:
    """A column of the extension type that pyarrow once unpickled when it opened a file."""
    hostile = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb(marker)}
    return pa.schema([pa.field("prompt", pa.string(), metadata=hostile)], metadata={"pandas": bomb(marker)})


def test_an_arrow_file_runs_nothing(marker: Path, tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_arrays([pa.array(["hello", "you"])], schema=pickled_type(marker))
    assert schema.from_bytes(schema.to_bytes(batch)).column("prompt").to_pylist() == ["hello", "you"]
    pq.write_table(pa.Table.from_batches([batch]), tmp_path / "prompts.parquet")
    rows = datasets.read_rows(PromptSettings(source=str(tmp_path / "prompts.parquet")))
    assert [row.prompt for row in rows] == ["hello", "you"]


def test_a_dataset_folder_runs_nothing(marker: Path, tmp_path: Path) -> None:
    """A loading script, a pickle among the files, a pickle in an archive."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("a.pickle", "a.pyd", "a.pth", "a.npy"):
            content = torch_bomb(marker) if name == "a.pth" else bomb(marker)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    files = {
        "prompts.py": CODE.format(marker=str(marker)).encode(),
        "train.pkl": bomb(marker),
        "train.tar": archive.getvalue(),
    }
    files["train.pickle"] = bomb(marker)
    for name, content in files.items():
        own = tmp_path / name.replace(".", "_") / "prompts"
        own.mkdir(parents=True)
        (own / name).write_bytes(content)
        with pytest.raises(ConfigError, match=r"^prompts\.source=.*" + ("an archive" if name == "train.tar" else "")):
            datasets.read_rows(PromptSettings(source=str(own)))


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [{"filename": "x.arrow"}]}'])
def test_a_damaged_saved_dataset_is_one_line(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "x.arrow").write_bytes(b"ARROW1")
    with pytest.raises(ConfigError, match=r"^prompts\.source=.*cannot be loaded as a dataset"):
        datasets.read_rows(PromptSettings(source=str(tmp_path)))


def test_a_yaml_tag_builds_nothing(marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in (f"a: !!python/object/apply:os.mkdir ['{marker}']", "a: !!python/name:os.system ''"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not YAML: could not determine a constructor"):
            loader.load(path)
        with pytest.raises(ConfigError, match="the value is not YAML"):
            loader._apply({}, text.replace(": ", "=", 1))


def test_the_metrics_are_for_this_machine_alone(tmp_path: Path) -> None:
    others = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    page = metrics.RunMetrics("run", tmp_path / "metrics.jsonl").page
    with endpoint.serving(MetricsSettings(port=0), "run", tmp_path, page) as url:
        assert url.startswith("http://127.0.0.1:")
        assert b"keel_" in urllib.request.urlopen(url, timeout=5).read()
        for address in others:
            port = int(url.removesuffix("/metrics").rpartition(":")[2])
            with (
                pytest.raises(ConnectionRefusedError, match="refused"),
                socket.create_connection((address, port), timeout=5),
            ):
                pass
    if not others:
        pytest.skip("this machine has no address but loopback")


def test_an_embedded_ray_has_no_dashboard() -> None:
    calls = [
        node
        for node in ast.walk(modules()["cluster.actors"])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init"
    ]
    embedded = [{k.arg: ast.unparse(k.value) for k in call.keywords} for call in calls]
    own = [given for given in embedded if given.get("address") == "'local'"]
    assert len(own) == 1 and own[0]["include_dashboard"] == "False"


def test_preflight_looks_at_every_model_of_a_run(folder: Path, marker: Path, tmp_path: Path) -> None:
    harmless = tiny.write(tmp_path / "policy")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb(marker))
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "What is {n}?"}}\n' for n in range(8)))
    tree: dict[str, Any] = {
        "run": {"directory": str(tmp_path / "run")},
        "policy": {"model": str(harmless)},
        "prompts": {"source": str(tmp_path / "p.jsonl"), "max_tokens": 32, "held_out": 2},
        "sampling": {"max_tokens": 8},
        "rewards": [{"name": "distinct", "source": "keel.examples:distinct_token_ratio"}],
        "metrics": {"port": 0},
        "cluster": {"object_store_bytes": 2**27, "min_memory_bytes": 0},
    }
    preflight.prepare(loader.parse(tree))
    reward = {"name": "learnt", "kind": "model", "source": str(folder), "role": "monitor"}
    critic = {"advantage": "gae", "critic": {"model": str(folder)}}
    changes = [{"policy": {"model": str(folder)}}, {"reference": {"model": str(folder)}}, {"objective": critic}]
    for change in [*changes, {"rewards": [*tree["rewards"], reward]}]:
        with pytest.raises(ConfigError, match="its weights are a pickle"):
            preflight.prepare(loader.parse(tree | change))
