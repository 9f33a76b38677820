"""The files of a model folder: which of them hold its weights, and which parameters the model has.

A folder may hold more than a model's parameters: another format's copy of all weights, a copy of a tied head, mask
buffers of older versions. The files are those that transformers reads, the parameters those that the model has.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from keel.errors import ConfigError
from keel.text import one_line

INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """Files that hold the weights, in order: model.safetensors, or the shards that the index names; else none.

    Raises ConfigError for an index that cannot be read, or names a file that is not there.
    """
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        paths = [folder / name for name in names]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"{folder / INDEX}: cannot be read ({reason}); expected names of files by weight") from None
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ConfigError(f"{folder / INDEX}: {len(missing)} of its {len(paths)} files are missing: {missing[0]}")
    return paths


def headers(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in the weight files, from their headers, nothing loaded."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, tuple(entry["shape"])


def parameter_shapes(folder: Path, named: str = "") -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the folder's language model, as it is published; no weights are read.

    Buffers and the copy of a tied head are none. Raises ConfigError for a file that lacks a parameter, or holds it in
    another shape: transformers would draw it at random. `named`: the setting and its value.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    named = named or str(folder)
    config = model_config(folder, named)
    with torch.device("meta"):  # its head is tied as the configuration says, whatever the file repeats
        parameters = dict(AutoModelForCausalLM.from_config(config, trust_remote_code=False).named_parameters())
    loaded = _loaded(folder, named, AutoModelForCausalLM)
    _check_tied(folder, named, set(parameters), {name for name, _ in loaded.named_parameters()})
    published = revert_weight_conversion(loaded, {n: p for n, p in loaded.named_parameters() if n in parameters})
    return {name: tuple(tensor.shape) for name, tensor in published.items()}


def _loaded(folder: Path, named: str, kind: Any) -> Any:
    """The model without its numbers. Raises ConfigError where the weights are not those of the configuration."""
    loaded, report = kind.from_pretrained(
        folder,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    for what, names in (("missing", report["missing_keys"]), ("of another shape", report["mismatched_keys"])):
        for name in sorted(str(key if isinstance(key, str) else key[0]) for key in names)[:1]:
            raise ConfigError(
                f"{named}: its weights are not those of config.json: {len(names)} parameters are {what} ({name});"
                " expected all of them"
            )
    return loaded


def check_whole(folder: Path, named: str) -> None:
    """Raise ConfigError where a language or reward model lacks a parameter; a trunk's head is yet to be trained."""
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = next(iter(model_config(folder, named).architectures or []), "")
    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        parameter_shapes(folder, named)
    elif architecture.endswith("ForSequenceClassification"):
        _loaded(folder, named, AutoModelForSequenceClassification)


def num_parameters(folder: Path) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(folder).values())


def _check_tied(folder: Path, named: str, parameters: set[str], held: set[str]) -> None:
    """A second copy of a tied weight equals the first. Raises ConfigError: samplers would read one, learners both."""
    copies = held - parameters
    if not copies:
        return
    import torch
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            names = [n for n in file.keys() if n in copies or n.endswith(_EMBEDDINGS)]  # noqa: SIM118 no mapping
            tensors |= {name: file.get_tensor(name) for name in names}
    inputs = [tensor for name, tensor in tensors.items() if name not in copies]
    for name in sorted(copies & set(tensors)):
        if not any(torch.equal(tensors[name], tensor) for tensor in inputs):
            raise ConfigError(
                f"{named}: config.json ties {name} to the embedding, but its weights hold another one; expected"
                " tie_word_embeddings=false, or weights without it"
            )


_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "embeddings.weight")


@contextmanager
def served(folder: Path) -> Iterator[Path]:
    """The folder for a reader that opens every *.safetensors where there is no index: the weights, and no other."""
    files = weight_files(folder)
    others = {path.name for path in folder.glob("*.safetensors")} - {path.name for path in files}
    indexed = (folder / INDEX).is_file()
    if not others or (indexed and files != [folder / _WHOLE]):
        yield folder
        return
    with TemporaryDirectory(prefix="keel-model-") as view:
        for path in folder.iterdir():
            if path.name not in others and path.name != INDEX:
                (Path(view) / path.name).symlink_to(path.resolve())
        yield Path(view)


def model_config(folder: Path, named: str) -> Any:
    """A folder's configuration as transformers reads it. Raises ConfigError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{named}: config.json cannot be read ({one_line(error)[:200]})") from None


def vocabulary(folder: Path, named: str) -> int:
    """Rows of a model's embedding. Raises ConfigError where its configuration has no such number."""
    size = getattr(model_config(folder, named).get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ConfigError(f"{named}: config.json has no vocab_size; expected a language model")
    return size


def check_text_alone(folder: Path, named: str) -> Any:
    """The configuration of a model that reads text and nothing else.

    Raises ConfigError for one of a family that reads images or sound, too: its text model alone has other parameter
    names than the checkpoint, so samplers could not take what is trained.
    """
    config = model_config(folder, named)
    inner = config.get_text_config()
    if inner is not config:
        raise ConfigError(
            f"{named}: model_type={config.model_type} reads more than text; expected its text model as a checkpoint of"
            f" its own (model_type={inner.model_type})"
        )
    return config
