"""Settings of objectives that cannot work, in one line each; and steps whose comparisons fail are counted."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from keel.algorithms.types import Credit, Measured
from keel.config import loader
from keel.errors import ConfigError
from tabular import objective, rollout, tree

ALONE: list[Any] = [{"name": "a", "source": "x:y"}]
PREFER: dict[str, Any] = {"kind": "preference"}
CONVEX: dict[str, Any] = {"kind": "logits_convexity"}
WEIGH: dict[str, Any] = {"kind": "weighted_likelihood"}


def kl(placement: str, estimator: str, **more: Any) -> dict[str, Any]:
    return {"kl": {"coefficient": 0.1, "placement": placement, "estimator": estimator, **more}}


def entropy(**settings: Any) -> dict[str, Any]:
    return {"entropy": {"form": "sequence_sum", "coefficient": 0.1, **settings}}


BAD: list[tuple[dict[str, Any], str]] = [
    # estimators where their gradient is none of a KL's
    ({"regularizer": kl("loss", "k1")}, "regularizer.kl.estimator=k1 in the loss: its expected gradient is zero: no regularization at all; expected k2, k3, k3_k2 or exact"),
    ({"regularizer": kl("reward", "k2")}, "regularizer.kl.estimator=k2 in the reward: its expected gradient is not that of any KL; expected k1"),
    ({"regularizer": kl("reward", "k3")}, "regularizer.kl.estimator=k3 in the reward: its expected gradient is KL(pi,ref) minus KL(ref,pi); expected k1"),
    ({"regularizer": kl("reward", "k3_k2")}, "regularizer.kl.estimator=k3_k2 in the reward: "),
    ({"regularizer": kl("reward", "exact")}, "regularizer.kl.estimator=exact in the reward: "),
    ({"regularizer": kl("loss", "k2", token_share=0.5)}, "regularizer.kl.token_share=0.5: estimator=k2 uses all; expected exact"),
    ({"regularizer": kl("loss", "exact", importance_weighted=True)}, "regularizer.kl.importance_weighted=true: exact has no sampled action to weigh; expected k2 or k3"),
    # a KL that is measured alone
    ({"reference": None, "regularizer": {"kl": {"exact_share": 0.1}}}, "regularizer.kl.exact_share=0.1: reference is null; expected a reference block"),
    ({"regularizer": {"kl": {"exact_share": 1.5}}}, "regularizer.kl.exact_share=1.5: input should be less than or equal to 1"),
    ({"regularizer": {"kl": {"exact_share": 0.1}}, "objective": PREFER, "sampling": {"stored_ratio": 1.0}}, "regularizer.kl.exact_share=0.1: a KL is of sampled completions, and all of this run's are stored; expected 0"),
    # a bonus among the likeliest tokens, and a band
    ({"regularizer": entropy(top_share=0.5)}, "regularizer.entropy.top_share=0.5: form=sequence_sum ignores it; expected token_bonus, or 1"),
    ({"regularizer": {**kl("loss", "exact"), **entropy(form="token_bonus", top_share=0.5)}}, "regularizer.entropy.top_share=0.5: regularizer.kl.estimator=exact already reads the whole vocabulary, and one term can; expected top_share 1"),
    ({"objective": CONVEX, "regularizer": entropy(form="token_bonus", top_share=0.5)}, "regularizer.entropy.top_share=0.5: objective.kind=logits_convexity already reads the whole vocabulary"),
    ({"regularizer": entropy(controller={"kind": "band", "low_nats": 1.0})}, "regularizer.entropy.controller.high_nats=null: of kind=band, and kind=band; expected a number of nats"),
    ({"regularizer": entropy(controller={"kind": "dual", "target_nats": 1.0, "low_nats": 1.0})}, "regularizer.entropy.controller.low_nats=1.0: of kind=band, and kind=dual; expected band, or null"),
    ({"regularizer": entropy(controller={"kind": "dual", "target_nats": 1.0, "low_nats": 0.0})}, "regularizer.entropy.controller.low_nats=0.0: of kind=band, and kind=dual; expected band, or null"),
    ({"regularizer": entropy(controller={"kind": "band", "low_nats": 2.0, "high_nats": 1.0})}, "regularizer.entropy.controller.low_nats=2.0: above high_nats=1.0; expected less"),
    ({"regularizer": kl("reward", "k1", controller={"kind": "band", "low_nats": 1.0, "high_nats": 2.0})}, "regularizer.kl.controller.kind=band: is for entropy; expected dual or proportional"),
    ({"regularizer": entropy(coefficient=0.0, controller={"kind": "band", "low_nats": 1.0, "high_nats": 2.0})}, "regularizer.entropy.coefficient=0.0: controller.kind=band starts from it; expected more"),
    # critics
    ({"objective": {"advantage": "gae"}}, "objective.critic=null: advantage=gae needs a learned value; expected a critic block"),
    ({"objective": {"advantage": "value_baseline"}}, "objective.critic=null: advantage=value_baseline needs a learned value"),
    ({"objective": {"entropy_advantage": {}}}, "objective.critic=null: entropy_advantage.critic=true needs a learned value"),
    ({"objective": {"critic": {}}}, "objective.critic: nothing reads it at advantage=rloo; expected gae or value_baseline"),
    ({"objective": {"entropy_advantage": {"critic": False, "gae_lambda": 0.5}}}, "objective.entropy_advantage.gae_lambda=0.5: needs a critic; expected 0"),
    ({"objective": {"advantage": "gae", "critic": {"popart": True, "softmin_temperature": 0.3}}}, "objective.critic.popart=true: two heads under a soft minimum share no scale; expected false"),
    ({"objective": {"advantage": "gae", "critic": {"clipped": "min"}}}, "objective.critic.clipped='min': input should be 'max' or 'mean'"),
    ({"objective": {"advantage": "gae", "critic": {}, "gae_lambda": 1.5}}, "objective.gae_lambda=1.5: input should be less than or equal to 1"),
    # who needs the reference
    ({"reference": None, "objective": PREFER}, "objective.loss=dpo needs column reference_logprobs but reference is null; expected a reference block"),
    ({"reference": None, "objective": {**PREFER, "loss": "kto"}}, "objective.loss=kto needs column reference_logprobs but reference is null"),
    ({"reference": None, "objective": {**CONVEX, "anchor": "reference"}}, "objective.anchor=reference needs column reference_logprobs but reference is null"),
    ({"reference": None, "objective": {**CONVEX, "dense": {"teacher": "t"}}}, "objective.dense needs column reference_logprobs but reference is null"),
    ({"reference": None, "regularizer": kl("loss", "exact")}, "regularizer.kl.coefficient=0.1 needs column reference_logprobs but reference is null"),
    # groups of one
    *[
        ({"sampling": {"samples_per_prompt": 1}, "objective": objective}, f"sampling.samples_per_prompt=1: {what} compares samples of one prompt; expected at least 2")
        for objective, what in [
            ({"advantage": "grpo"}, "grpo"),
            ({"advantage": "reinforce_pp_baseline"}, "reinforce_pp_baseline"),
            (PREFER, "preference"),
            (WEIGH, "weighted_likelihood"),
            (CONVEX, "rloo"),
        ]
    ],
    # levels
    ({"objective": {"level": "sequence", "correction": "none", "reduction": "token_mean"}}, "objective.reduction=token_mean: level=sequence has one term a completion; expected sequence_sum"),
    ({"objective": {"level": "sequence_mean"}}, "objective.correction=token: level=sequence_mean has one ratio a completion; expected sequence or none"),
    ({"objective": {"level": "sequence", "correction": "none", "advantage": "reinforce_pp"}}, "objective.level=sequence: advantage=reinforce_pp differs from token to token; expected token"),
    ({"objective": {"level": "sequence", "correction": "none", "entropy_advantage": {"critic": False}}}, "objective.level=sequence: entropy_advantage differs from token to token; expected token"),
    # options a preference loss has no place for
    ({"objective": {**PREFER, "loss": "ipo_sum", "label_smoothing": 0.1}}, "objective.label_smoothing=0.1: loss=ipo_sum has no labels; expected dpo"),
    ({"objective": {**PREFER, "loss": "orpo", "label_smoothing": 0.1}}, "objective.label_smoothing=0.1: loss=orpo has no labels; expected dpo"),
    ({"objective": {**PREFER, "loss": "cpo", "exact_length_margin": True}}, "objective.exact_length_margin=true: loss=cpo is not length-normalized; expected simpo"),
    ({"objective": {**PREFER, "loss": "orpo", "target_margin": 0.5}}, "objective.target_margin=0.5: loss=orpo has no margin; expected simpo"),
    ({"objective": {**PREFER, "loss": "ipo_average", "pessimism": 0.5}}, "objective.pessimism=0.5: loss=ipo_average has no logit of a pair; expected dpo"),
    ({"objective": {**PREFER, "loss": "kto", "pessimism": 0.5}}, "objective.pessimism=0.5: loss=kto has no logit of a pair; expected dpo"),
    ({"objective": {**PREFER, "loss": "simpo_plackett_luce", "pairs": {"selection": "all"}}}, "objective.pairs: loss=simpo_plackett_luce trains on the whole ranking; expected only min_margin"),
    ({"objective": {**PREFER, "label_smoothing": 0.5}}, "objective.label_smoothing=0.5: input should be less than 0.5"),
    ({"objective": {**PREFER, "beta": 0}}, "objective.beta=0: input should be greater than 0"),
    ({"objective": {**PREFER, "pairs": {"stop_settled_ratio": 0.9}}}, "objective.pairs.stop_settled_ratio=0.9: selection=max_min has no plausible set; expected most_disagreeing"),
    # stored completions
    ({"sampling": {"stored_ratio": 0.5}}, "sampling.stored_ratio=0.5: objective.kind=policy_gradient needs samples of the policy; expected preference or weighted_likelihood"),
    ({"sampling": {"stored_ratio": 0.5}, "objective": CONVEX}, "sampling.stored_ratio=0.5: objective.kind=logits_convexity needs samples of the policy"),
    ({"sampling": {"stored_ratio": 1, "temperature": 0.7}, "objective": PREFER}, "sampling.temperature=0.7: stored completions are scored at 1; expected 1"),
    ({"rewards": [{"name": "s", "kind": "stored"}], "objective": PREFER}, "rewards.s.kind=stored: completions that are generated have none (sampling.stored_ratio=0.0); expected stored_ratio 1, or another kind"),
    # ensembles and judges
    ({"rewards": ALONE, "ensemble": {"form": "worst"}}, "ensemble.form=worst: the ensemble has 1 rewards of role train; expected at least 2"),
    ({"rewards": ALONE, "objective": {**PREFER, "pessimism": 0.5}}, "objective.pessimism=0.5: the ensemble has 1 rewards of role train; expected at least 2"),
    ({"rewards": ALONE, "objective": {**PREFER, "pairs": {"selection": "most_disagreeing"}}}, "objective.pairs.selection=most_disagreeing: the ensemble has 1 rewards of role train; expected at least 2"),
    ({"objective": {**PREFER, "pairs": {"judge": "silver"}}}, "objective.pairs.judge=silver: no such reward with role judge or train; expected one of a, b, gold"),
    ({"rewards": [*ALONE, {"name": "m", "source": "x:y", "role": "monitor"}], "objective": {**PREFER, "pairs": {"judge": "m"}}}, "objective.pairs.judge=m: no such reward with role judge or train; expected one of a"),
    # controllers
    ({"regularizer": entropy(controller={"kind": "proportional", "target_nats": 1.0})}, "regularizer.entropy.controller.kind=proportional: is for KL; expected fixed, dual or band"),
    ({"regularizer": entropy(controller={"kind": "safe"})}, "regularizer.entropy.controller.kind=safe: is for KL; expected fixed, dual or band"),
    ({"regularizer": entropy(coefficient=0.0, controller={"kind": "dual", "target_nats": 1.0})}, "regularizer.entropy.coefficient=0.0: controller.kind=dual starts from it; expected more"),
    ({"regularizer": kl("reward", "k1", controller={"kind": "dual"})}, "regularizer.kl.controller.target_nats=null: kind=dual steers towards it; expected a number of nats"),
    ({"regularizer": entropy(controller={"kind": "dual", "target_nats": 1.0, "target_share_of_start": 0.5})}, "regularizer.entropy.controller.target_share_of_start=0.5: target_nats=1.0 is another target; expected one"),
    ({"regularizer": entropy(controller={"kind": "fixed", "target_share_of_start": 0.5})}, "regularizer.entropy.controller.target_share_of_start=0.5: kind=fixed ignores it; expected dual, or null"),
    ({"regularizer": kl("reward", "k1", controller={"kind": "dual", "target_share_of_start": 0.5})}, "regularizer.kl.controller.target_share_of_start=0.5: the KL starts at 0; expected target_nats"),
    ({"regularizer": kl("reward", "k1", controller={"kind": "safe", "target_nats": 1.0})}, "regularizer.kl.controller.target_nats=1.0: kind=safe ignores it; expected dual, or null"),
    ({"regularizer": kl("reward", "k1", coefficient=0.0, controller={"kind": "safe"})}, "regularizer.kl.coefficient=0.0: controller.kind=safe starts from it; expected more"),
    # entropies over |y|
    *[
        ({"regularizer": entropy(form=form), "objective": objective}, f"regularizer.entropy.form={form}: objective.advantage={objective['advantage']} pays by token, before |y| is known, which pays for length; expected an advantage of whole completions")
        for form in ("sequence_mean_exact", "sequence_mean_naive")
        for objective in ({"advantage": "reinforce_pp"}, {"advantage": "reinforce_pp_baseline"}, {"advantage": "gae", "critic": {}})
    ],
    ({"regularizer": entropy(form="sequence_mean")}, "regularizer.entropy.form='sequence_mean': two forms were meant by it; expected sequence_mean_naive (reward R - (beta/|y|) S, what it was) or sequence_mean_exact ("),
    ({"sampling": {"stored_ratio": 0.5}, "objective": PREFER, "regularizer": kl("loss", "k2", importance_weighted=True)}, "regularizer.kl.importance_weighted=true: no known policy sampled the stored completions (sampling.stored_ratio=0.5), so there is no ratio to weigh by; expected false"),
    ({"regularizer": {"entropy": {"coefficient": 0.1}}}, "regularizer.entropy.coefficient=0.1: form=none ignores it; expected a form, or 0"),
    # regularizers an objective cannot take
    ({"objective": PREFER, "regularizer": kl("reward", "k1")}, "regularizer.kl.placement=reward: objective.kind=preference has no gradient that is linear in the reward"),
    ({"objective": WEIGH, "regularizer": entropy()}, "regularizer.entropy.form=sequence_sum: objective.kind=weighted_likelihood has no gradient that is linear in the reward"),
    ({"objective": {**CONVEX, "dense": {"teacher": "t"}}, "regularizer": kl("reward", "k1")}, "regularizer.kl.placement=reward: objective.kind=logits_convexity has no gradient"),
    ({"objective": CONVEX, "regularizer": kl("loss", "exact")}, "regularizer.kl.estimator=exact: logits_convexity already reads the whole vocabulary"),
    ({"objective": {**CONVEX, "target": "ratio", "form": "mse"}}, "objective.target=ratio: moves one probability of the behavior; expected form=kl, sparse, behavior"),
    ({"objective": {**WEIGH, "rejection_temperatures": [1.0, 2.0]}}, "objective.rejection_temperatures=[1.0, 2.0]: every stage goes further; expected falling numbers"),
    # names
    ({"objective": {"kind": "dpo"}}, "objective.kind=dpo: expected one of 'policy_gradient', 'preference', 'weighted_likelihood', 'logits_convexity', 'custom'"),
    ({"objective": {**PREFER, "loss": "dop"}}, "objective.loss='dop': input should be 'dpo'"),
    ({"objective": {**PREFER, "bata": 1}}, "objective.bata: unknown setting; did you mean beta?"),
    ({"objective": {**PREFER, "clip_low": 0.2}}, "objective.clip_low: unknown setting; expected one of"),
    ({"objective": {**PREFER, "pairs": {"selectoin": "all"}}}, "objective.pairs.selectoin: unknown setting; did you mean selection?"),
    ({"objective": {"advantage": "gae", "critic": {"trunck": "own"}}}, "objective.critic.trunck: unknown setting; did you mean trunk?"),
    ({"objective": {**CONVEX, "dense": {"coefficient": 1}}}, "objective.dense.teacher: missing; expected a value"),
    ({"objective": {"kind": "custom", "source": "no_module"}}, "objective.source='no_module': expected module:name of your own"),
    ({"objective": {"kind": "custom"}}, "objective.source: missing; expected a value"),
    ({"objective": "dpo"}, "objective='dpo': "),
]  # fmt: skip


@pytest.mark.parametrize(("blocks", "expected"), BAD, ids=[expected.split(":")[0] for _, expected in BAD])
def test_a_mistake_is_one_line_that_names_it(blocks: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(expected)) as caught:
        loader.parse(tree(**blocks))
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"advantage": "none"},
        {"advantage": "reinforce_pp"},
        {"advantage": "gae", "critic": {}},
        {"advantage": "value_baseline", "critic": {}},
        {"advantage": "gae", "critic": {}, "entropy_advantage": {}},
    ],
)
def test_these_need_no_group(config: dict[str, Any]) -> None:
    settings = loader.parse(tree(sampling={"samples_per_prompt": 1}, objective=config))
    assert settings.objective.min_samples == settings.sampling.samples_per_prompt == 1
    free = {**config, "entropy_advantage": {"critic": False}}
    with pytest.raises(ConfigError, match=r"samples_per_prompt=1"):
        loader.parse(tree(sampling={"samples_per_prompt": 1}, objective=free))


@pytest.mark.parametrize(
    "config",
    [
        {**PREFER, "loss": "cpo", "target_margin": 0.5, "label_smoothing": 0.1, "pessimism": 0.1},
        {**PREFER, "loss": "simpo", "label_smoothing": 0.1, "exact_length_margin": True},
        {**PREFER, "loss": "simpo_plackett_luce", "pessimism": 0.1, "pairs": {"min_margin": 0.1}},
        {**PREFER, "loss": "dpo_hinge", "target_margin": 0.5},
        {**PREFER, "pairs": {"selection": "most_disagreeing", "stop_settled_ratio": 0.5, "judge": "gold"}},
        {**WEIGH, "weights": "rejection", "rejection_temperatures": [4, 1]},
        {**CONVEX, "target": "ratio", "epochs": 2},
        {"level": "sequence", "correction": "sequence", "advantage": "value_baseline", "critic": {}},
    ],
)
def test_what_the_rules_only_just_allow(config: dict[str, Any]) -> None:
    result = loader.parse(tree(objective=config)).objective.model_dump(exclude_unset=True)
    assert result == {"kind": "policy_gradient", **config}


@pytest.mark.parametrize("loss", ["simpo", "simpo_hinge", "simpo_plackett_luce", "cpo", "orpo"])
def test_these_losses_need_no_reference(loss: str) -> None:
    settings = loader.parse(tree(reference=None, objective={**PREFER, "loss": loss}))
    assert (settings.needed_columns(), settings.reference) == ({}, None)


def prefer(rewards: list[float], pairs: dict[str, Any] | None = None, loss: str = "simpo", **columns: Any) -> Credit:
    """Two completions of each prompt, every log-prob -1."""
    size = len(rewards)
    batch = rollout([[-1.0]] * size, rewards, [row // 2 for row in range(size)], **columns)
    subject = objective(objective={**PREFER, "loss": loss, "pairs": pairs or {}})
    return subject.weigh(batch, Measured(np.full(size, -1.0)))


REASONS = pa.array(["stop", "length", "stop", "stop"])


@pytest.mark.parametrize(
    ("rewards", "pairs", "columns", "dropped"),
    [
        ([1.0, 1.0, 0.0, 2.0], {}, {}, {"tie": 1}),
        ([1.0, 1.4, 0.0, 2.0], {"min_margin": 0.5}, {}, {"tie": 1}),
        ([1.0, 5.0, 0.0, 2.0], {"finished_only": True}, {"finish_reason": REASONS}, {"unfinished": 1}),
        ([1.0, 5.0, 0.0, 2.0], {"judge": "gold"}, {"reward_gold": pa.array([None, 1.0, 0.0, 1.0])}, {"unjudged": 1}),
        ([1.0, 5.0, 0.0, 2.0], {"judge": "gold"}, {"reward_gold": [3.0, 3.0, 0.0, 1.0]}, {"tie": 1}),
        (
            [1.0, 5.0, 0.0, 2.0],
            {"selection": "most_disagreeing"},
            {"reward_a": [0.0, 1.0, 0.0, 1.0], "reward_b": [1.0, 4.0, 3.0, 0.0]},
            {"settled": 1},
        ),
    ],
    ids=["tie", "margin", "unfinished", "unjudged", "judged alike", "settled"],
)
def test_comparisons_that_fail_are_counted(
    rewards: list[float], pairs: dict[str, Any], columns: dict[str, Any], dropped: dict[str, int]
) -> None:
    """The first prompt is left out and said so, the second is trained on: row 3 up, row 2 down."""
    credit = prefer(rewards, pairs, **columns)
    assert credit.counts == {"pairs_dropped_total": dropped}
    assert credit.metrics["pairs"] == 1.0
    # equal log-probs: dL/dS = -+ beta / 2 at |y| = 1, times the rows of the step
    assert credit.advantages == pytest.approx([0.0, 0.0, -0.2, 0.2], abs=1e-12)


@pytest.mark.parametrize("loss", ["simpo", "simpo_plackett_luce", "dpo", "kto", "orpo"])
def test_a_step_without_a_pair_trains_nothing(loss: str) -> None:
    columns = {"reference": [[-1.0]] * 4}
    credit = prefer([1.0, 1.0, 2.0, 2.0], loss=loss, **columns)
    assert credit.counts == {"pairs_dropped_total": {"tie": 2}}
    assert credit.advantages.tolist() == [0.0] * 4
    assert (credit.metrics["pairs"], credit.metrics["preference_loss"]) == (0.0, 0.0)


def test_settled_prompts_end_the_run() -> None:
    """Half of the prompts have one plausible completion left."""
    columns = {"reward_a": [0.0, 1.0, 0.0, 1.0], "reward_b": [1.0, 4.0, 3.0, 0.0]}
    for ratio, finished in ((0.5, True), (0.6, False)):
        pairs = {"selection": "most_disagreeing", "stop_settled_ratio": ratio}
        credit = prefer([1.0, 5.0, 0.0, 2.0], pairs, **columns)
        assert credit.metrics["settled_ratio"] == 0.5
        assert credit.finished is finished


def test_a_ranking_whose_neighbors_are_ties_still_ranks_its_ends() -> None:
    """Rewards 1, .7, .4 and a margin of .5: only the first and the last differ enough, and they are a pair."""
    config = {**PREFER, "loss": "simpo_plackett_luce", "beta": 2.0, "pairs": {"min_margin": 0.5}}
    batch = rollout([[-1.0]] * 3, [1.0, 0.7, 0.4])
    credit = objective(objective=config).weigh(batch, Measured(np.full(3, -1.0)))
    assert credit.metrics["preference_loss"] == pytest.approx(np.log(2), abs=1e-12)
    assert credit.advantages == pytest.approx([3.0, 0.0, -3.0], abs=1e-12)
