"""Rules between settings, from both sides: what lies at the limit is accepted, the next value is refused."""

import itertools
from typing import Any

import pytest

from keel.config import loader
from keel.config.run import Settings
from keel.errors import ConfigError

TRAIN: dict[str, Any] = {"name": "a", "source": "m:f"}
TWO = [TRAIN, {"name": "b", "source": "m:f"}]
JUDGED = [*TWO, {"name": "gold", "source": "m:f", "role": "judge"}, {"name": "eye", "source": "m:f", "role": "monitor"}]
PREFER: dict[str, Any] = {"kind": "preference"}
CONVEX: dict[str, Any] = {"kind": "logits_convexity"}
WEIGH: dict[str, Any] = {"kind": "weighted_likelihood"}
OWN: dict[str, Any] = {"kind": "custom", "source": "m:C"}
GAE: dict[str, Any] = {"advantage": "gae", "critic": {}}


def parse(**blocks: Any) -> Settings:
    basic = {"policy": {"model": "m"}, "prompts": {"source": "p", "max_tokens": 16}, "rewards": [TRAIN]}
    return loader.parse({**basic, **blocks})


def samples(count: int, **sampling: Any) -> dict[str, Any]:
    return {"samples_per_prompt": count, **sampling}


def kl(**settings: Any) -> dict[str, Any]:
    return {"kl": {"coefficient": 0.1, **settings}}


def entropy(**settings: Any) -> dict[str, Any]:
    return {"entropy": {"form": "sequence_sum", "coefficient": 0.1, **settings}}


def terms(*placements: str, names: str = "uvw") -> dict[str, Any]:
    return {"terms": [{"name": n, "source": "m:f", "placement": p} for n, p in zip(names, placements, strict=False)]}


def controlled(**settings: Any) -> dict[str, Any]:
    return kl(controller={"kind": "dual", "target_nats": 1.0, **settings})


DUAL = {"kind": "dual", "target_nats": 1.0}
Blocks = dict[str, Any]
LIMITS: dict[str, tuple[list[Blocks], list[Blocks], str]] = {
    # accepted, refused, what the refusal says
    "groups of one": (
        [{"sampling": samples(2)}, {"sampling": samples(1), "objective": GAE}, {"sampling": samples(1), "objective": {"advantage": "m:f"}}, {"sampling": samples(1), "objective": OWN | {"options": {}}} | {"sampling": samples(2)}],
        [{"sampling": samples(1)}, {"sampling": samples(1), "objective": OWN}, {"sampling": samples(1), "objective": {"advantage": "m:f", "entropy_advantage": {"critic": False}}}],
        "compares samples of one prompt; expected at least 2",
    ),
    "chi-squared and stored completions": (
        [{"regularizer": {"chi_squared": {"coefficient": 0.1}}, "objective": OWN | {"options": {}}}, {"regularizer": {"chi_squared": {}}, "objective": OWN, "sampling": {"stored_ratio": 0.5}}],
        [{"regularizer": {"chi_squared": {"coefficient": 0.1}}, "objective": OWN, "sampling": {"stored_ratio": 0.5}}],
        "a divergence on the policy's samples alone, and sampling.stored_ratio=0.5; expected coefficient 0",
    ),
    "chi-squared where no term of the reward has a gradient": (
        [{"regularizer": {"chi_squared": {"coefficient": 0.1}}}, {"regularizer": {"chi_squared": {}}, "objective": PREFER}],
        [{"regularizer": {"chi_squared": {"coefficient": 0.1}}, "objective": PREFER}],
        "regularizer.chi_squared.coefficient=0.1: objective.kind=preference has no gradient that is linear in the reward",
    ),
    "chi-squared without a reference": (
        [{"regularizer": {"chi_squared": {}}, "reference": None}],
        [{"regularizer": {"chi_squared": {"coefficient": 0.1}}, "reference": None}],
        "regularizer.chi_squared.coefficient=0.1 needs column reference_logprobs but reference is null",
    ),
    "a term named as a regularizer": (
        [{"regularizer": {"terms": [{"name": "chi", "source": "m:f"}]}}],
        [{"regularizer": {"terms": [{"name": name, "source": "m:f"}]}} for name in ("chi_squared", "kl_cov")],
        "is that of regularizer.chi_squared; expected another name|is that of objective.covariance; expected another name",
    ),
    "covariance by token": (
        [{"objective": {"covariance": {"form": "clip_cov"}}}],
        [{"objective": {"covariance": {"form": "clip_cov"}, "level": "sequence", "correction": "none"}}],
        "level=sequence: covariance differs from token to token; expected token",
    ),
    "a KL to the sampler where it is the policy": (
        [{"objective": {"covariance": {"form": "kl_cov"}, "epochs": 2}}, {"objective": {"covariance": {"form": "kl_cov"}}, "buffer": {"max_staleness": 1}}, {"objective": {"covariance": {"form": "clip_cov"}}}],
        [{"objective": {"covariance": {"form": "kl_cov"}}}],
        "with objective.epochs=1 and buffer.max_staleness=0 the policy is what sampled",
    ),
    "band of covariances": (
        [{"objective": {"covariance": {"form": "clip_cov", "low": 4.9}}}],
        [{"objective": {"covariance": {"form": "clip_cov", "low": 5.0}}}],
        "low=5.0: not below high=5.0; expected less",
    ),
    "refills": (
        [{"sampling": samples(2), "buffer": {"dynamic_sampling_refills": 1}}, {"sampling": samples(1), "objective": GAE, "buffer": {"dynamic_sampling_refills": 0}}],
        [{"sampling": samples(1), "objective": GAE, "buffer": {"dynamic_sampling_refills": 1}}],
        "samples_per_prompt=1: buffer.dynamic_sampling_refills replaces every group of one",
    ),
    "batch in a step": (
        [{"buffer": {"groups_per_step": 4, "groups_per_batch": 4}}, {"buffer": {"groups_per_step": 4, "groups_per_batch": 12, "max_staleness": 2}}],
        [{"buffer": {"groups_per_step": 4, "groups_per_batch": 5}}, {"buffer": {"groups_per_step": 4, "groups_per_batch": 13, "max_staleness": 2}}],
        r"is never admitted; expected at most that",
    ),
    "a row a rank": (
        [{"buffer": {"groups_per_step": 3}, "sampling": samples(2), "learners": {"count": 6}}],
        [{"buffer": {"groups_per_step": 3}, "sampling": samples(2), "learners": {"count": 7}}],
        "learners.count=7: a step has 6 rows; expected at most 6",
    ),
    "a row in a micro-batch": (
        [{"sampling": {"max_tokens": 20}, "learners": {"tokens_per_batch": 36}}],
        [{"sampling": {"max_tokens": 20}, "learners": {"tokens_per_batch": 35}}, {"sampling": {"max_tokens": 21}, "learners": {"tokens_per_batch": 36}}],
        "learners.tokens_per_batch=3[56]: one row may have prompts.max_tokens",
    ),
    "overlong buffer": (
        [{"sampling": {"max_tokens": 20}, "shaping": {"overlong_buffer_tokens": 20}}],
        [{"sampling": {"max_tokens": 20}, "shaping": {"overlong_buffer_tokens": 21}}],
        "shaping.overlong_buffer_tokens=21: longer than",
    ),
    "who trains": (
        [{"rewards": [TRAIN, {"name": "b", "source": "m:f", "role": "monitor"}]}],
        [{"rewards": [{**TRAIN, "role": "monitor"}]}, {"rewards": [{**TRAIN, "role": "judge"}]}],
        "none has role train",
    ),
    "names of rewards": ([{"rewards": TWO}], [{"rewards": [*TWO, TRAIN]}], "rewards: name 'a' is used twice"),
    "names of terms": (
        [{"regularizer": terms("reward", "loss")}],
        [{"regularizer": terms("reward", "loss", names="uu")}, {"regularizer": terms("loss", "loss", "loss", names="uvv")}],
        r"terms: name '[uv]' is used twice",
    ),
    "evaluation judge": (
        [{"rewards": JUDGED, "evaluation": {"judge": name}} for name in ("a", "gold", "eye")],
        [{"rewards": JUDGED, "evaluation": {"judge": "none"}}],
        "evaluation.judge=none: no such reward; expected one of a, b, gold, eye",
    ),
    "judge of pairs": (
        [{"rewards": JUDGED, "objective": {**PREFER, "pairs": {"judge": name}}} for name in ("a", "gold")],
        [{"rewards": JUDGED, "objective": {**PREFER, "pairs": {"judge": name}}} for name in ("eye", "none")],
        "no such reward with role judge or train; expected one of a, b, gold",
    ),
    "members": (
        [{"rewards": TWO, "ensemble": {"form": form}} for form in ("mean", "worst", "lower_bound", "sum")] + [{"rewards": [TRAIN], "ensemble": {"form": "sum"}}, {"rewards": TWO, "objective": {**PREFER, "pairs": {"selection": "most_disagreeing"}}}],
        [{"rewards": [TRAIN, JUDGED[2]], "ensemble": {"form": form}} for form in ("mean", "worst", "lower_bound")] + [{"objective": {**PREFER, "pairs": {"selection": "most_disagreeing"}}}, {"objective": {**PREFER, "pessimism": 0.1}}],
        "the ensemble has 1 rewards of role train; expected at least 2",
    ),
    "spread of two samples": (
        [{"rewards": TWO, "sampling": samples(3), "ensemble": {"form": form}} for form in ("lower_bound", "variance")] + [{"rewards": TWO, "sampling": samples(2), "ensemble": {"form": "lower_bound", "center": False}}, {"rewards": TWO, "sampling": samples(2), "ensemble": {"form": "worst"}}, {"rewards": TWO, "sampling": samples(3), "objective": {**PREFER, "pessimism": 0.1}}],
        [{"rewards": TWO, "sampling": samples(2), "ensemble": {"form": form}} for form in ("lower_bound", "variance")] + [{"rewards": TWO, "sampling": samples(2), "objective": {**PREFER, "pessimism": 0.1}}],
        "deviate alike on two samples, so their spread says nothing; expected at least 3",
    ),
    "stored completions": (
        [{"sampling": samples(4, stored_ratio=ratio), "objective": objective} for ratio, objective in itertools.product((0.5, 1.0), (PREFER, WEIGH))] + [{"sampling": samples(4, stored_ratio=0.0, temperature=0.5)}],
        [{"sampling": samples(4, stored_ratio=0.1), "objective": objective} for objective in (GAE, CONVEX)],
        "needs samples of the policy; expected preference or weighted_likelihood",
    ),
    "temperature of stored completions": (
        [{"sampling": samples(4, stored_ratio=0.5, temperature=1.0), "objective": PREFER}, {"sampling": samples(4, temperature=0.5), "objective": PREFER}],
        [{"sampling": samples(4, stored_ratio=0.1, temperature=t), "objective": PREFER} for t in (0.99, 1.01)],
        "stored completions are scored at 1; expected 1",
    ),
    "stored rewards": (
        [{"sampling": samples(4, stored_ratio=1.0), "objective": PREFER, "rewards": [{"name": "s", "kind": "stored"}]}, {"rewards": [TRAIN, {"name": "s", "kind": "stored", "role": "monitor"}]}],
        [{"sampling": samples(4, stored_ratio=0.9), "objective": PREFER, "rewards": [{"name": "s", "kind": "stored"}]}],
        "completions that are generated have none",
    ),
    "reference rewards": (
        [{"rewards": [{"name": "r", "kind": "reference"}]}, {"reference": None}],
        [{"reference": None, "rewards": [TRAIN, {"name": "r", "kind": "reference", "role": "monitor"}]}],
        "rewards.r: kind=reference but reference is null",
    ),
    "linear in the reward": (
        [{"objective": objective, "regularizer": kl()} for objective in (GAE, CONVEX, OWN)] + [{"objective": objective, "regularizer": terms("loss")} for objective in (PREFER, WEIGH)] + [{"objective": objective, "regularizer": kl(placement="loss", estimator="k2")} for objective in (PREFER, WEIGH, CONVEX | {"dense": {"teacher": "t"}})],
        [{"objective": objective, "regularizer": regularizer} for objective, regularizer in itertools.product((PREFER, WEIGH, CONVEX | {"dense": {"teacher": "t"}}), (kl(), entropy(), terms("loss", "reward")))],
        "has no gradient that is linear in the reward",
    ),
    "after the baseline": (
        [{"regularizer": kl(order="after_baseline"), "objective": objective} for objective in ({"advantage": "rloo"}, CONVEX, {"advantage": "value_baseline", "critic": {}})] + [{"regularizer": {"kl": {"order": "after_baseline"}}, "objective": GAE}],
        [{"regularizer": kl(order="after_baseline"), "objective": objective} for objective in (GAE, {"advantage": "reinforce_pp"}, {"advantage": "reinforce_pp_baseline"}, OWN)],
        "order=after_baseline: the KL is part of the reward before",
    ),
    "a copy of the head": (
        [{"objective": {**CONVEX, "epochs": 2}, "learners": {"zero_stage": 2}}, {"objective": {**CONVEX, "epochs": 1}, "learners": {"zero_stage": 3}}, {"objective": {**CONVEX, "epochs": 2, "anchor": "reference"}, "learners": {"zero_stage": 3}}],
        [{"objective": {**CONVEX, "epochs": 2}, "learners": {"zero_stage": 3}}],
        "learners.zero_stage=3: objective.anchor=behavior with epochs > 1",
    ),
    "controller of a KL": (
        [{"regularizer": controlled()}, {"regularizer": kl(controller={"kind": "safe"})}, {"regularizer": controlled(minimum=2.0, maximum=2.0)}],
        [{"regularizer": kl(coefficient=0.0, controller=DUAL)}, {"regularizer": kl(controller={"kind": "dual"})}, {"regularizer": kl(controller={"kind": "fixed", "target_nats": 1.0})}, {"regularizer": controlled(minimum=2.1, maximum=2.0)}],
        "starts from it|steers towards it|ignores it|above maximum",
    ),
    "controller of an entropy": (
        [{"regularizer": entropy(controller=DUAL)}, {"regularizer": entropy(controller={"kind": "fixed"}, coefficient=0.0)}],
        [{"regularizer": entropy(controller=DUAL, coefficient=0.0)}, {"regularizer": entropy(controller={"kind": "proportional", "target_nats": 1.0})}, {"regularizer": entropy(form="none")}],
        "starts from it|is for KL|form=none ignores it",
    ),
    "share of the tokens": (
        [{"regularizer": kl(placement="loss", estimator="exact", token_share=0.5)}, {"regularizer": kl(token_share=1.0)}],
        [{"regularizer": kl(token_share=0.99)}, {"regularizer": kl(placement="loss", estimator="exact", importance_weighted=True)}],
        "uses all; expected exact|no sampled action",
    ),
    "gpus": (
        [{"scorers": {"gpus": gpus}} for gpus in (0, 0.25, 1, 1.0, 2, 8)],
        [{"scorers": {"gpus": gpus}} for gpus in (1.5, 2.25)],
        "Ray shares no more than one",
    ),
    "custom resources": (
        [{"scorers": {"resources": {"x": amount}}} for amount in (0.5, 1, 3)],
        [{"scorers": {"resources": {"x": amount}}} for amount in (0, -1, 1.5)] + [{"scorers": {"resources": {name: 1}}} for name in ("CPU", "GPU", "memory", "node:1", "bundle_x", "")],
        "expected a share above 0|Ray's own",
    ),
    "tensor parallel": (
        [{"generators": {"tensor_parallel": 2, "gpus": 1}}, {"generators": {"tensor_parallel": 1, "gpus": 0.5}}],
        [{"generators": {"tensor_parallel": 2, "gpus": gpus}} for gpus in (0, 0.5, 2)],
        "and vLLM.*; expected gpus=1",
    ),
    "iterations": (
        [{"reference": {"ref_policy": "previous", "iteration_steps": 1}}, {"reference": {"ref_policy": "initial"}}],
        [{"reference": {"ref_policy": "previous"}}, {"reference": {"ref_policy": "initial", "iteration_steps": 1}}],
        "expected a number of steps with previous, null with initial",
    ),
    "falling temperatures": (
        [{"objective": {**WEIGH, "rejection_temperatures": etas}} for etas in ([1.0], [2.0, 1.0], [3.0, 2.0, 0.1])],
        [{"objective": {**WEIGH, "rejection_temperatures": etas}} for etas in ([1.0, 1.0], [3.0, 1.0, 2.0], [1.0, 2.0])],
        "expected falling numbers",
    ),
    "where a source belongs": (
        [{"rewards": [TRAIN, {"name": "h", "kind": "http", "source": "http://x", "headers": {"A-1": "Bearer ${T}"}}]}],
        [{"rewards": [{"name": "h", "kind": kind, "source": ""}]} for kind in ("rule", "model", "http")] + [{"rewards": [{**TRAIN, "source": source}]} for source in ("m", "m:f:g")] + [{"rewards": [TRAIN, {"name": "s", "kind": "stored", "source": "x"}]}],
        "expects|expected module:function",
    ),
    "headers": (
        [{"rewards": [{"name": "h", "kind": "http", "source": "http://x", "headers": {"A": "${T}"}}]}],
        [{"rewards": [{**TRAIN, "headers": {"A": "${T}"}}]}, {"rewards": [{"name": "h", "kind": "http", "source": "http://x", "headers": {"A": "secret"}}]}, {"rewards": [{"name": "h", "kind": "http", "source": "http://x", "headers": {"A b": "${T}"}}]}, {"rewards": [{"name": "h", "kind": "http", "source": "http://u:p@x"}]}],
        "sends none|written out|other characters|user:password",
    ),
}  # fmt: skip
ACCEPTED = [(name, number) for name, (fine, _, _) in LIMITS.items() for number in range(len(fine))]
REFUSED = [(name, number) for name, (_, bad, _) in LIMITS.items() for number in range(len(bad))]


@pytest.mark.parametrize(("name", "number"), ACCEPTED)
def test_what_lies_at_the_limit_is_accepted(name: str, number: int) -> None:
    settings = parse(**LIMITS[name][0][number])
    assert loader.parse(settings.model_dump(mode="json", exclude_unset=True)) == settings


@pytest.mark.parametrize(("name", "number"), REFUSED)
def test_the_next_value_is_refused(name: str, number: int) -> None:
    with pytest.raises(ConfigError, match=LIMITS[name][2]):
        parse(**LIMITS[name][1][number])


def test_every_limit_has_two_sides() -> None:
    assert all(fine and bad for fine, bad, _ in LIMITS.values())


# ---- what follows from settings


@pytest.mark.parametrize(("groups", "generators", "expected"), [(6, 1, 6), (6, 2, 3), (7, 2, 4), (7, 3, 3), (2, 5, 1)])
def test_a_steps_groups_are_divided_among_generators_rounded_up(groups: int, generators: int, expected: int) -> None:
    settings = parse(buffer={"groups_per_step": groups}, generators={"count": generators})
    assert settings.groups_per_batch == settings.groups_per_batch_of(generators) == expected
    fixed = parse(buffer={"groups_per_step": groups, "groups_per_batch": 2}, generators={"count": generators})
    assert fixed.groups_per_batch == 2


def test_tokens_directory_and_training_rewards() -> None:
    settings = parse(sampling={"max_tokens": 7}, run={"name": "n", "directory": "d/{name}/{name}"}, rewards=JUDGED)
    assert (settings.max_model_tokens, settings.run_directory) == (23, "d/n/n")
    assert [reward.name for reward in settings.train_rewards] == ["a", "b"]


@pytest.mark.parametrize(
    ("blocks", "readers"),
    [
        ({}, []),
        ({"regularizer": kl()}, ["regularizer.kl.coefficient=0.1"]),
        ({"objective": PREFER}, ["objective.loss=dpo"]),
        ({"objective": {**PREFER, "loss": "simpo"}}, []),
        ({"objective": CONVEX}, []),
        ({"objective": {**CONVEX, "anchor": "reference"}}, ["objective.anchor=reference"]),
        ({"objective": {**CONVEX, "dense": {"teacher": "t"}}}, ["objective.dense"]),
        (
            {"objective": PREFER, "regularizer": kl(placement="loss", estimator="k2")},
            ["regularizer.kl.coefficient=0.1", "objective.loss=dpo"],
        ),
    ],
)
def test_who_reads_the_reference(blocks: dict[str, Any], readers: list[str]) -> None:
    settings = parse(**blocks)
    assert settings.reference_readers() == readers
    assert settings.needed_columns() == ({"reference_logprobs": readers[0]} if readers else {})
    assert settings.written_columns() == {"reference_logprobs"}
    if readers:
        with pytest.raises(ConfigError, match=f"^{readers[0]} needs column reference_logprobs but reference is null"):
            parse(**blocks, reference=None)
    else:
        assert parse(**blocks, reference=None).written_columns() == set()


@pytest.mark.parametrize(
    ("regularizer", "in_reward", "in_loss", "exact", "named"),
    [
        ({}, False, False, False, []),
        (kl(), True, False, False, ["kl.placement=reward"]),
        (kl(placement="loss", estimator="k2"), False, True, False, []),
        (kl(placement="loss", estimator="exact"), False, True, True, []),
        (kl(placement="loss", estimator="exact", coefficient=0.0), False, False, False, []),
        ({"kl": {"coefficient": 0.0}}, False, False, False, []),
        (kl() | entropy() | terms("loss", "reward"), True, False, False, ["kl.placement=reward", "entropy.form=sequence_sum", "terms.v.placement=reward"]),
    ],
)  # fmt: skip
def test_where_a_kl_lives(regularizer: Any, in_reward: bool, in_loss: bool, exact: bool, named: list[str]) -> None:
    parsed = parse(regularizer=regularizer).regularizer
    assert (parsed.kl.in_reward, parsed.kl.in_loss, parsed.kl.exact) == (in_reward, in_loss, exact)
    assert parsed.reward_terms() == named


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
@pytest.mark.parametrize("form", ["sequence_sum", "sequence_mean_naive", "sequence_mean_exact", "token_bonus"])
def test_where_an_entropy_lives(form: str, coefficient: float) -> None:
    parsed = parse(regularizer=entropy(form=form, coefficient=coefficient)).regularizer.entropy
    assert parsed.in_loss == (coefficient > 0 and form == "token_bonus")
    assert parsed.in_reward == (coefficient > 0 and form != "token_bonus")


@pytest.mark.parametrize(
    ("config", "by_token", "min_samples"),
    [
        ({"advantage": "rloo"}, False, 2),
        ({"advantage": "none"}, False, 1),
        ({"advantage": "reinforce_pp"}, True, 1),
        ({"advantage": "reinforce_pp_baseline"}, True, 2),
        (GAE, True, 1),
        ({"advantage": "value_baseline", "critic": {}}, False, 1),
        ({"advantage": "m:f"}, False, 1),
        ({"advantage": "none", "entropy_advantage": {"critic": False}}, False, 2),
        ({**GAE, "entropy_advantage": {}}, True, 1),
        ({"advantage": "rloo", "critic": {}, "entropy_advantage": {}}, False, 2),
    ],
)
def test_what_an_advantage_compares(config: dict[str, Any], by_token: bool, min_samples: int) -> None:
    parsed = parse(objective=config).objective
    assert (parsed.by_token, parsed.min_samples) == (by_token, min_samples)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config", "expected"), [(PREFER, 2), (CONVEX, 2), (OWN, 2), (WEIGH, 2), ({**WEIGH, "weights": "uniform"}, 1)]
)
def test_how_many_samples_other_objectives_compare(config: dict[str, Any], expected: int) -> None:
    assert parse(objective=config).objective.min_samples == expected


@pytest.mark.parametrize(
    ("address", "environment", "joined"),
    [
        (None, None, None),
        (None, "", None),
        (None, "head:1", "head:1"),
        ("other:1", "head:1", "other:1"),
        ("other:1", None, "other:1"),
        ("local", "head:1", None),
        (None, "local", None),
    ],
)
def test_the_cluster_that_is_joined(
    monkeypatch: pytest.MonkeyPatch, address: str | None, environment: str | None, joined: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert parse(cluster={"address": address}).cluster.address_to_join == joined
