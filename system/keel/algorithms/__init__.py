"""The mathematics: objectives, advantages, regularizers and critics as functions on numpy arrays and torch tensors.

In: log-probs, rewards and masks of a step. Out: a loss with its gradient, and numbers for the metrics.
Nothing here knows of Ray, vLLM, DeepSpeed or files.
Start reading at `registry.py`, which has every objective by its name; `objective.py` is their common frame,
`regularizers.py` has the KL estimators of the loss and the entropy terms (the KL in the reward is `Objective.penalty`,
the names that settings may have are in config/regularizer.py), `types.py` what passes in and out.
"""
