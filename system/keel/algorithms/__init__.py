"""The mathematics: objectives, advantages, regularizers and critics as functions on numpy arrays and torch tensors.

In: log-probs, rewards and masks of a step. Out: a loss with its gradient, and numbers for the metrics.
Nothing here knows of Ray, vLLM, DeepSpeed or files.
Start reading at `registry.py`, which has every objective by its name; `objective.py` is their common frame,
`regularizers.py` has the KL estimators and entropy terms, `types.py` what passes in and out.
"""
