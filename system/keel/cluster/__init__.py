"""Processes: Ray actors and their pools, placement groups, the learner group, jobs and Kubernetes manifests.

In: settings and classes that know nothing of Ray. Out: the same interfaces, served by actors on other nodes.
The only package that imports ray. `pool.py` says why and when a generator or scorer is replaced.
Start reading at `actors.py`, which makes every role; then `pool.py` and `learner_group.py`.
"""
