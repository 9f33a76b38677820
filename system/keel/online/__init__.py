"""Online training: the loop that generates, scores, buffers, trains and publishes, and how it recovers.

In: settings of a run. Out: a run directory with checkpoints, metrics and rollouts.
`train.py` starts and ends a run, `controller.py` is the loop of its steps.
Start reading at `train.py`, then `controller.py`; `preflight.py` has what is checked before anything starts.
"""
