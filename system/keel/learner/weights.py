"""Both ends of weight transfer: pack a policy into one buffer, prove it, load it into a vLLM engine.

    learner rank 0: pack -> Weights(version, digest, specs, buffer) -> object store -> every generator: load_engine

A load is accepted only if the digest matches the bytes, every parameter of the model arrives exactly once with its
shape and dtype, and no cache of the old weights survives. The engine is then bit-identical to one started from the
same checkpoint (tested per architecture).
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from keel.errors import KeelError
from keel.protocols import LoadReceipt, TensorSpec, Weights

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class WeightError(KeelError, RuntimeError):
    """Weights that must not be served: wrong digest, coverage, shape or dtype, or a cache that was not cleared."""


def pack(named: Iterable[tuple[str, torch.Tensor]], version: int, dtype: str) -> Weights:
    """Parameters, cast to `dtype`, in one flat uint8 buffer: the memory they share, where they fill it, else a copy.

    In memory of their own nothing is copied: the buffer changes with the tensors.
    """
    tensors = [(name, tensor.detach()) for name, tensor in named]
    flat = _common_memory([tensor for _, tensor in tensors], _DTYPES[dtype])
    in_place = flat is not None
    if flat is None:
        flat = torch.empty(sum(tensor.numel() for _, tensor in tensors), dtype=_DTYPES[dtype])
    specs, end = [], 0
    for name, tensor in tensors:
        start = tensor.storage_offset() if in_place else end
        end = start + tensor.numel()
        if not in_place:
            flat[start:end].view(tensor.shape).copy_(tensor)
        size = flat.element_size()
        specs.append(TensorSpec(name, tuple(tensor.shape), dtype, start * size, tensor.numel() * size))
    buffer = flat.view(torch.uint8).numpy()
    return Weights(version, digest(specs, buffer), tuple(specs), buffer)


def _common_memory(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    """The flat tensor [numbers] that these fill without a gap or an overlap, in any order; None where there is none."""
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.storage_offset(), tensor.numel())):
        alike = tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not alike or tensor.storage_offset() != end:
            return None
        end += tensor.numel()
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    if len(memory) != 1 or tensors[0].untyped_storage().nbytes() != end * dtype.itemsize:
        return None
    return tensors[0].as_strided((end,), (1,), 0)


def unpack(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors of a Weights, without copying."""
    for spec in weights.specs:
        # frombuffer takes the read-only memory of the object store as it is; it is never written to
        piece = torch.frombuffer(weights.buffer.data, dtype=torch.uint8, count=spec.num_bytes, offset=spec.offset)
        yield spec.name, piece.view(_DTYPES[spec.dtype]).view(spec.shape)


def digest(specs: Iterable[TensorSpec], buffer: np.ndarray) -> str:
    """xxh3-128 over names, shapes, dtypes, offsets and bytes."""
    hasher = xxhash.xxh3_128()
    hasher.update(repr([(s.name, s.shape, s.dtype, s.offset, s.num_bytes) for s in specs]).encode())
    hasher.update(buffer.data)
    return hasher.hexdigest()


def verify(weights: Weights, expected: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Raise WeightError unless digest, coverage, shapes and dtype are those of the model that receives them."""
    if digest(weights.specs, weights.buffer) != weights.digest:
        raise WeightError(f"weights version {weights.version}: bytes do not match digest {weights.digest}")
    names = [spec.name for spec in weights.specs]
    problems = {
        "missing": sorted(set(expected) - set(names)),
        "unknown": sorted(set(names) - set(expected)),
        "sent twice": sorted(name for name, count in Counter(names).items() if count > 1),
        "of wrong shape": [s.name for s in weights.specs if s.name in expected and s.shape != expected[s.name]],
        "of wrong dtype": [s.name for s in weights.specs if s.dtype != dtype],
    }
    for problem, names in problems.items():
        if names:
            raise WeightError(f"weights version {weights.version}: {len(names)} parameters {problem}: {names[:3]}")


def load_engine(engine: Any, weights: Weights, expected: dict[str, tuple[int, ...]], dtype: str) -> LoadReceipt:
    """Put verified weights into an in-process vLLM engine (`vllm.LLM`) that is not generating.

    Raises WeightError before anything is touched if the weights are wrong. Any error after that leaves the engine
    half loaded: its owner must be killed and replaced.
    """
    started = time.monotonic()
    verify(weights, expected, dtype)
    engine.collective_rpc(_reload, args=(weights,))
    if not engine.reset_prefix_cache():
        raise WeightError("the prefix cache was not cleared: requests are running")
    return LoadReceipt(weights.version, weights.digest, weights.buffer.nbytes, time.monotonic() - started)


def _reload(worker: Any, weights: Weights) -> None:
    """Runs in the vLLM worker: this process, or with tensor parallelism that of each rank."""
    worker.model_runner.reload_weights(weights_iterator=unpack(weights))
    _repack_heads(worker.model_runner.get_model())


def _repack_heads(model: torch.nn.Module) -> None:
    """Let every output head pack its weights again.

    On CPU a head multiplies with a packed copy of its weight. A head tied to the embedding receives no tensor of
    its own in a reload, so vLLM keeps its packed copy and would silently compute with the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
