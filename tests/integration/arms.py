"""Every objective of the configuration, by name: the blocks that differ from the self-test's."""

from typing import Any

KL = {"kl": {"coefficient": 0.02}}
NONE: dict[str, Any] = {"kl": {"coefficient": 0.0}}


def in_loss(estimator: str, **more: Any) -> dict[str, Any]:
    return {"kl": {"coefficient": 0.02, "placement": "loss", "estimator": estimator, **more}}


def entropy(form: str, coefficient: float, kl: float = 0.0) -> dict[str, Any]:
    return {"kl": {"coefficient": kl}, "entropy": {"form": form, "coefficient": coefficient}}


def adapting(kind: str, **more: Any) -> dict[str, Any]:
    return {"kl": {"coefficient": 0.02, "controller": {"kind": kind, **more}}}


PPO = {
    "advantage": "gae",
    "critic": {"trunk": "shared", "coefficient": 0.01},
    "clip_low": 0.2,
    "clip_high": 0.2,
    "epochs": 2,
}
SAFE = {
    "advantage": "value_baseline",
    "normalize_reward": True,
    "critic": {"trunk": "detached", "head": "mlp", "softmin_temperature": 0.3, "loss": "huber", "clipped": "mean"},
}
EAPO = {
    **PPO,
    "entropy_advantage": {"gae_lambda": 0.5, "coefficient": 0.002},
    "critic": {"trunk": "shared", "popart": True, "coefficient": 0.01, "clip": None},
}
DAPO = {"advantage": "grpo", "clip_low": 0.2, "clip_high": 0.28, "reduction": "token_mean", "epochs": 2}

Arm = dict[str, Any]


def policy_gradient(regularizer: dict[str, Any] = KL, **objective: Any) -> Arm:
    return {"objective": objective, "regularizer": regularizer}


def preference(loss: str, regularizer: dict[str, Any] = NONE, **more: Any) -> Arm:
    return {"objective": {"kind": "preference", "loss": loss, **more}, "regularizer": regularizer}


def likelihood(weights: str, **more: Any) -> Arm:
    return {"objective": {"kind": "weighted_likelihood", "weights": weights, **more}, "regularizer": NONE}


def convex(form: str, regularizer: dict[str, Any] = KL, **more: Any) -> Arm:
    return {"objective": {"kind": "logits_convexity", "form": form, **more}, "regularizer": regularizer}


# the reference of these tests is the start model: anchored there, a policy moves only as far as A / eta says
ARMS: dict[str, Arm] = {
    "none": policy_gradient(NONE),
    "kl": policy_gradient(),
    "entropy_sequence_sum": policy_gradient(entropy("sequence_sum", 0.002)),
    "entropy_sequence_mean_exact": policy_gradient(entropy("sequence_mean_exact", 0.01)),
    "entropy_sequence_mean_naive": policy_gradient(entropy("sequence_mean_naive", 0.01)),
    "entropy_token": policy_gradient(entropy("token_bonus", 0.002)),
    "entropy_clamped": policy_gradient(
        {
            "kl": {"coefficient": 0.0},
            "entropy": {
                "form": "token_bonus",
                "coefficient": 0.002,
                "top_share": 0.6,
                "controller": {"kind": "band", "low_nats": 0.5, "high_nats": 2.0, "rate": 0.001},
            },
        }
    ),
    "entropy_and_kl": policy_gradient(entropy("sequence_sum", 0.002, kl=0.01)),
    "kl_k2": policy_gradient(in_loss("k2")),
    "kl_k3": policy_gradient(in_loss("k3")),
    "kl_k3_weighted": policy_gradient(in_loss("k3", importance_weighted=True)),
    "kl_weighted": policy_gradient({"kl": {"coefficient": 0.02, "importance_weighted": True}}),
    "kl_k3_k2": policy_gradient(in_loss("k3_k2")),
    "kl_exact": policy_gradient(in_loss("exact", token_share=0.5)),
    "kl_target": policy_gradient(adapting("dual", target_nats=5.0)),
    "kl_ziegler": policy_gradient(adapting("proportional", target_nats=5.0)),
    "kl_cov": policy_gradient(NONE, epochs=2, covariance={"form": "kl_cov", "share": 0.1}),
    "clip_cov": policy_gradient(covariance={"form": "clip_cov", "share": 0.1, "low": 0.0}),
    "chi_squared": policy_gradient({"chi_squared": {"coefficient": 0.02}}),
    "answer_entropy": policy_gradient({"answer_entropy": {"coefficient": 0.1}}),
    "reinforce": policy_gradient(advantage="none", whiten="population"),
    "reinforce_pp": policy_gradient(advantage="reinforce_pp"),
    "reinforce_pp_baseline": policy_gradient(advantage="reinforce_pp_baseline"),
    "grpo": policy_gradient(in_loss("k3"), advantage="grpo", reduction="sequence_mean", clip_low=0.2, clip_high=0.28),
    "dr_grpo": policy_gradient(advantage="dr_grpo", reduction="constant"),
    "gspo": policy_gradient(level="sequence_mean", correction="sequence", clip_low=0.15, clip_high=0.2, epochs=2),
    "dapo": {**policy_gradient(NONE, **DAPO), "shaping": {"overlong_buffer_tokens": 2}},
    "lco_mse": convex("mse"),
    "lco_log_cosh": convex("log_cosh", epochs=2),
    "lco_kl": convex("kl", epochs=2),
    "lco_ratio": convex("kl", target="ratio"),
    "lco_reference": convex("kl", NONE, anchor="reference", temperature=0.2),
    "dpo": preference("dpo"),
    "cdpo": preference("dpo", label_smoothing=0.1, pairs={"selection": "all"}),
    "dpo_hinge": preference("dpo_hinge"),
    "chi_po": preference("chi_po"),
    "rpo": preference("dpo", likelihood_coefficient=0.0005),
    "ipo_sum": preference("ipo_sum", beta=0.02),
    "ipo_average": preference("ipo_average"),
    "simpo": preference("simpo", beta=2.0, target_margin=1.0),
    "simpo_exact": preference("simpo", in_loss("k2"), beta=2.0, exact_length_margin=True),
    "simpo_hinge": preference("simpo_hinge", beta=2.0),
    "simpo_plackett_luce": preference("simpo_plackett_luce", beta=2.0, epochs=2),
    "dpo_plackett_luce": preference("dpo_plackett_luce"),
    "cpo": preference("cpo", likelihood_coefficient=0.1, likelihood="average"),
    "orpo": preference("orpo", likelihood_coefficient=0.1, likelihood="average", beta=0.5),
    "kto": preference("kto"),
    "optidice_kl": likelihood("kl", temperature=0.2),
    "optidice_chi2": likelihood("chi2", temperature=0.2),
    "optidice_soft_chi2": likelihood("soft_chi2", temperature=0.2),
    "best_of_n": likelihood("best_of_n"),
    "rejection": likelihood("rejection", rejection_temperatures=[0.5, 0.2], stage_steps=5),
}
CRITIC_ARMS: dict[str, Arm] = {
    "ppo": policy_gradient(**PPO),
    "safe": policy_gradient({"kl": {**in_loss("k2")["kl"], "controller": {"kind": "safe"}}}, **SAFE),
    "eapo": policy_gradient(**EAPO),
    "ppo_own_trunk": policy_gradient(**{**PPO, "critic": {"trunk": "own"}}),
}
