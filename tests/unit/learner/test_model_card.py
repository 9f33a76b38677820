"""The model card says all that a policy was trained with, and where a better one may be."""

from typing import Any

import pytest

from keel.config import loader
from keel.config.stages import PreferSettings
from keel.learner import export

TREE = {
    "policy": {"model": "m"},
    "prompts": {"source": "p"},
    "rewards": [{"name": "r", "source": "a:b"}],
    "sampling": {"samples_per_prompt": 4},
}


def card(tree: dict[str, Any], coefficients: dict[str, float] | None = None) -> str:
    return export._card(loader.parse({**TREE, **tree}), 3, coefficients or {})


def rows(text: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in text.split("\n") if line.startswith("| ")]
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2}


CHANGED: list[dict[str, Any]] = [
    {"regularizer": {"chi_squared": {"coefficient": 0.25, "max_ratio": 3.0}}},
    {"regularizer": {"answer_entropy": {"coefficient": -0.5}}},
    {"regularizer": {"entropy": {"form": "token_bonus", "coefficient": 0.01, "top_share": 0.5}}},
    {"regularizer": {"kl": {"coefficient": 0.1, "controller": {"kind": "dual", "target_nats": 2.5}}}},
    {"regularizer": {"terms": [{"name": "brief", "source": "a:b", "coefficient": 0.125}]}},
    {"objective": {"epochs": 2, "covariance": {"form": "kl_cov", "share": 0.375}}},
    {"objective": {"kind": "preference", "loss": "simpo", "beta": 2.25}},
    {"shaping": {"overlong_buffer_tokens": 7}},
]


def leaves(node: Any) -> list[Any]:
    if isinstance(node, dict | list):
        return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in leaves(child)]
    return [node]


@pytest.mark.parametrize("tree", CHANGED, ids=lambda tree: next(iter(next(iter(tree.values())))))
def test_every_setting_of_the_objective_that_is_no_default_is_there(tree: dict[str, Any]) -> None:
    plain, changed = rows(card({})), rows(card(tree))
    new = {name: value for name, value in changed.items() if name.startswith("`") and name not in plain}
    for leaf in leaves(tree):
        assert any(str(leaf) in value for value in new.values()), (leaf, new)
    assert all(name.strip("`").partition(".")[0] in tree for name in new)


def test_a_coefficient_that_moved_is_there_as_it_is_in_force() -> None:
    moved = rows(
        card({"regularizer": {"kl": {"coefficient": 0.1}}}, {"kl_coefficient": 0.4, "entropy_coefficient": 0.0})
    )
    assert moved["KL to the reference"] == "coefficient 0.1, in the reward"
    assert moved["kl_coefficient in force at this step"] == "0.4"
    assert "entropy_coefficient in force at this step" not in moved


def test_a_run_with_a_gold_names_its_best_policy() -> None:
    gold = {"name": "gold", "source": "a:b", "role": "monitor"}
    assert "the best by `gold` is `RUN_DIR/best`" in card({"rewards": [*TREE["rewards"], gold]})  # type: ignore[misc]
    assert "best" not in card({})
    assert "best" not in card({"rewards": [*TREE["rewards"], gold], "guard": {"keep_best": False}})  # type: ignore[misc]


def test_an_offline_policy_was_not_trained_online() -> None:
    tree = {"policy": {"model": "m"}, "prompts": {"source": "p"}, "objective": {"kind": "preference", "loss": "dpo"}}
    text = export._card(loader.parse_as(PreferSettings, tree).learner_spec(5), 5, {})
    assert "`m` after 5 steps of training on stored completions" in text and "online" not in text
    assert "online reinforcement learning" in card({})
