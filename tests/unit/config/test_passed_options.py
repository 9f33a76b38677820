"""learners.deepspeed and generators.engine: what is passed through, and what Keel sets itself."""

from typing import Any

import pytest

from keel.config import loader, passed_options
from keel.config.workers import GeneratorSettings, LearnerSettings
from keel.errors import ConfigError
from keel.learner.optimizer import engine_config
from keel.rollout.generator import check_engine, engine_arguments

TREE = {"policy": {"model": "m"}, "prompts": {"source": "p"}, "rewards": [{"name": "r", "source": "a:b"}]}


def nested(name: str, value: Any) -> dict[str, Any]:
    head, _, rest = name.partition(".")
    return {head: nested(rest, value) if rest else value}


def refusal(block: str, option: str, options: dict[str, Any]) -> str:
    with pytest.raises(ConfigError, match=rf"^{block}\.{option}\.") as error:
        loader.parse({**TREE, block: {option: options}})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", passed_options.DEEPSPEED_OWNED)
def test_what_keel_sets_of_deepspeed_is_refused_with_the_reason(name: str) -> None:
    line = refusal("learners", "deepspeed", nested(name, 1))
    assert line == f"learners.deepspeed.{name}=1: {passed_options.DEEPSPEED_OWNED[name]}; expected no such option"


@pytest.mark.parametrize("name", passed_options.VLLM_OWNED)
def test_what_keel_sets_of_vllm_is_refused_with_the_reason(name: str) -> None:
    line = refusal("generators", "engine", {name: False})
    assert line == f"generators.engine.{name}=False: {passed_options.VLLM_OWNED[name]}; expected no such option"


def test_all_that_keel_tells_deepspeed_and_vllm_is_its_own() -> None:
    """An option that is added later must be owned, or a user could change it unseen; those that may be are named."""
    told = {name for name in engine_config(LearnerSettings()) if name not in passed_options.DEEPSPEED_OWNED}
    assert told == {"zero_optimization", "steps_per_print"}
    sampler = engine_arguments("folder", GeneratorSettings(gpus=1, tensor_parallel=2), 64)
    assert set(sampler) - set(passed_options.VLLM_OWNED) == {"enable_chunked_prefill"}


def test_a_name_that_deepspeed_would_pass_over_is_refused() -> None:
    line = refusal("learners", "deepspeed", {"zero_optimisation": {}})
    assert line.startswith("learners.deepspeed.zero_optimisation: expected one of aio, ")


def test_blocks_are_merged_option_by_option() -> None:
    plain = engine_config(LearnerSettings(zero_stage=3))
    options = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 10}, "wall_clock_breakdown": True}
    merged = engine_config(LearnerSettings(zero_stage=3, deepspeed=options))
    assert merged["zero_optimization"] == {"stage": 3, "overlap_comm": True, "reduce_bucket_size": 10}
    assert merged | {"zero_optimization": plain["zero_optimization"]} == plain | {"wall_clock_breakdown": True}
    assert engine_config(LearnerSettings(zero_stage=3, deepspeed={})) == plain


def test_an_argument_reaches_vllm_or_is_unknown_there() -> None:
    settings = GeneratorSettings(engine={"max_num_batched_tokens": 512})
    check_engine(settings)
    told = engine_arguments("folder", settings, 64)
    assert told == engine_arguments("folder", GeneratorSettings(), 64) | {"max_num_batched_tokens": 512}
    message = (
        r"^generators\.engine\.max_batched_tokens: vLLM's engine has no such argument; expected max_num_batched_tokens"
    )
    with pytest.raises(ConfigError, match=message):
        check_engine(GeneratorSettings(engine={"max_batched_tokens": 512}))
