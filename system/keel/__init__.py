"""Keel trains language models from reward and shows over-optimization while it happens.

 rollout/prompts.py         prompt columns                   pure function of (run seed, ticket)
    |
 rollout/generator.py       + tokens, logprobs, versions     pool of vLLM actors
    |
 rollout/reference.py       + reference_logprobs             frozen policy
    |
 rollout/scorers.py         + rewards                        rules, reward models, HTTP; monitors
    |
 rollout/buffer.py          ordered, bounded, durable Arrow  one actor: admit / add / drop / take / advance
    |
 learner/policy_learner.py  packing -> algorithms/ -> step   group of DeepSpeed ranks
    |
 learner/weights.py         publish(version) ----------->    generators.load_weights <- the only arrow that points back
                                                             (on its way: cluster/weight_transport.py)

A record batch grows to the right from stage to stage; `online/controller.py` composes the stages, `online/train.py`
starts them. A ticket is the number of a prompt group: its place in the order of admission.
"""

__version__ = "0.2.0"
