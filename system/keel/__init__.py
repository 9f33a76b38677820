"""Keel trains language models from reward and shows over-optimization while it happens.

 prompts.py      prompt columns                   pure function of (run seed, ticket)
    |
 generate.py     + tokens, logprobs, versions     pool of vLLM actors
    |
 score.py        + reference_logprobs, rewards    frozen policy; rules, reward models, HTTP; monitors
    |
 buffer.py       ordered, bounded, durable Arrow  one actor: admit / add / drop / take / advance
    |
 learn.py        batch.py -> algorithms/ -> DeepSpeed step      learner group of ranks
    |
 weights.py      publish(version) ------------->  generators.load      <- the only arrow that points back

A record batch grows to the right from stage to stage; `controller.py` composes the stages, `train.py` starts them.
"""

__version__ = "0.2.0"
