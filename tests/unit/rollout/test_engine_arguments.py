"""What vLLM is told on a CPU, on a GPU, and on several that share one model. No engine is built."""

import pytest

from keel.cluster.capacity import bundles
from keel.config.workers import GeneratorSettings
from keel.rollout.generator import engine_arguments, environment


@pytest.mark.parametrize("gpus", [0, 1])
def test_an_engine_alone_is_in_its_actors_process(gpus: int) -> None:
    settings = GeneratorSettings(threads=3, gpus=gpus, kv_cache_bytes=2**27)
    told = engine_arguments("folder", settings, 96)
    assert not {"tensor_parallel_size", "distributed_executor_backend"} & set(told)
    assert (told["model"], told["max_model_len"], told["kv_cache_memory_bytes"]) == ("folder", 96, 2**27)
    assert told["enable_chunked_prefill"] == (gpus == 1)
    assert environment(settings) == {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_a_tensor_parallel_engine_get_the_bundles_with_a_gpu(ranks: int) -> None:
    settings = GeneratorSettings(gpus=1, tensor_parallel=ranks)
    alone = engine_arguments("folder", GeneratorSettings(gpus=1), 96)
    parallel = {"tensor_parallel_size": ranks, "distributed_executor_backend": "ray"}
    assert engine_arguments("folder", settings, 96) == alone | parallel
    places = [int(place) for place in environment(settings)["VLLM_RAY_BUNDLE_INDICES"].split(",")]
    assert places == [place for place, bundle in enumerate(bundles(settings)) if bundle == {"GPU": 1.0}]
    assert len(places) == ranks
