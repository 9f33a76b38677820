"""The model that trains: networks, packing of rows, DeepSpeed engine, ZeRO shards, weights.

In: an Arrow record batch with tokens, log-probs and rewards. Out: a policy step, its metrics, published weights.
The only package that imports deepspeed. Also what every command asks of a model folder: files, text, end tokens.
Start reading at `policy_learner.py` (one step), then `packing.py`, `networks.py` and `engine.py`.
"""
