"""From prompts to scored rollouts: data sets, the vLLM generator, reward scorers, the Arrow buffer.

In: prompt rows. Out: record batches that grow to the right from stage to stage, kept durable and in order.
A reward kind is a class in `scorers.py`; the order in which groups are dropped or taken is in `buffer.py`.
Start reading at `prompts.py`, then `generator.py`, `scorers.py` and `buffer.py`.
"""
