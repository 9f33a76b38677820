"""The stages around online training: sft, prefer, reward, label, evaluate; pipelines and sweeps.

In: settings of a stage and a data set. Out: a folder with a model or a Parquet file, and `stage.json`.
They use the learner group, the Arrow rows and the metrics of online training.
Start reading at `offline_loop.py`, the loop that every training stage shares; `pipeline.py` chains stages,
`sweep.py` makes arms x seeds of `keel train`.
"""
