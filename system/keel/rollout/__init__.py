"""From prompts to scored rollouts: data sets, the vLLM generator, reward scorers, the Arrow buffer.

In: prompt rows. Out: record batches that grow to the right from stage to stage, kept durable and in order.
A kind of reward is a function in `scorers.py`; `buffer.py` decides which groups are dropped and which a step takes,
`admission.py` how many may be under way.
Start reading at `prompts.py`, then `generator.py`, `reference.py`, `scorers.py` and `buffer.py`.
"""
