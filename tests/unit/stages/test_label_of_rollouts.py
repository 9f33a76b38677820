"""`keel label` of runs: what scored their rollouts is computed again, so none of it may stay on them."""

from pathlib import Path

import pyarrow as pa

from keel import files, schema
from keel.stages import label
from rollouts import generated, prompts, referenced, scored


def test_rollouts_lose_all_that_scorers_and_the_reference_add(tmp_path: Path) -> None:
    rows = referenced(generated(prompts(range(2), 2), logprobs=[[-0.5]] * 4), [[-0.7]] * 4)
    near = schema.append(rows, pa.record_batch({"relevance_nats": pa.array([0.5, 0.4, 0.3, None], pa.float32())}))
    files.write(tmp_path / "rollouts" / "step-000001.arrow", schema.to_bytes(scored(near, [1.0, 2.0, 3.0, 4.0])))
    batch = label._rollouts([str(tmp_path)])
    added = {"reward", "relevance_nats", "reference_logprobs", "failure"}
    assert batch.num_rows == 4 and not added & set(batch.schema.names)
    again = schema.append(batch, near.select(["relevance_nats"]))  # as the reference worker does
    assert again.column("relevance_nats").to_pylist()[-1] is None
