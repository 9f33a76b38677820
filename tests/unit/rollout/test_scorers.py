"""A sample is scored or failed with a reason; a failure is never a number."""

import itertools
import json
import math
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from keel import schema
from keel.config.rewards import EnsembleSettings, RewardSettings
from keel.config.workers import ReferenceSettings, ScorerSettings
from keel.learner import tiny
from keel.rollout import reference, scorers
from rollouts import generated, prompts


def batch() -> pa.RecordBatch:
    return generated(prompts([0, 1]))


def reward(**fields: Any) -> RewardSettings:
    return RewardSettings(**{"name": "mine", "source": f"{__name__}:lengths", **fields})


def scored(*rewards: RewardSettings, rows: pa.RecordBatch | None = None) -> tuple[pa.RecordBatch, dict[str, int]]:
    answer, receipt = scorers.RewardScorer(rewards, EnsembleSettings(), ScorerSettings(), "scorer-0").score(
        rows or batch()
    )
    schema.check(answer)
    return answer, dict(receipt.failures)


def lengths(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str], **more: Any
) -> list[float]:
    """Also checks what it is given: TRL's names, and the further columns of the prompt source."""
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer) == 4
    assert not more and all(isinstance(text, str) for text in completions)
    return [float(len(ids)) for ids in completion_ids]


def partly(completions: list[str], **columns: Any) -> list[float | None]:
    return [None, math.nan, math.inf, 0.0]


def broken(completions: list[str], **columns: Any) -> list[float]:
    raise LookupError("no such key")


def one_too_many(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * (len(completions) + 1)


def test_weights_and_names() -> None:
    answer, failures = scored(reward(weight=0.5), reward(name="again", weight=2.0), reward(name="seen", role="monitor"))
    lengths = schema.lengths(answer, "completion_tokens")
    assert answer.column("reward").to_pylist() == pytest.approx((2.5 * lengths).tolist())
    assert answer.column("reward_seen").to_pylist() == lengths.tolist()
    assert failures == {} and answer.column("scorer")[0].as_py() == "mine+again+seen"


def test_checked_values_and_reasons() -> None:
    values, reasons = scorers.checked("r", [1, None, 0.0, -math.inf, True], 5)
    assert values == pytest.approx([1.0, math.nan, 0.0, math.nan, 1.0], nan_ok=True)
    assert reasons == [None, "r_none", None, "r_not_finite", None]
    values, reasons = scorers.checked("r", "http_timeout", 2)
    assert np.isnan(values).all() and reasons == ["r_http_timeout"] * 2
    for wrong in ([], [1.0], [1.0] * 3):
        with pytest.raises(ValueError, match=f"reward r: {len(wrong)} values for 2 completions"):
            scorers.checked("r", wrong, 2)


def test_the_first_reason_stands_and_a_failed_part_is_never_a_zero() -> None:
    """A sample that one of two training rewards failed has no sum at all."""
    parts = [reward(), reward(name="odd", source=f"{__name__}:partly"), reward(name="bad", source=f"{__name__}:broken")]
    answer, failures = scored(*parts[:2])
    lengths = schema.lengths(answer, "completion_tokens").tolist()
    assert answer.column("reward").to_pylist() == [None, None, None, lengths[3]]
    answer, failures = scored(*parts)
    assert answer.column("failure").to_pylist() == ["odd_none", "odd_not_finite", "odd_not_finite", "bad_LookupError"]
    assert failures == {"odd_none": 1, "odd_not_finite": 2, "bad_LookupError": 4}
    assert answer.column("reward_mine").to_pylist() == lengths


def test_none_nan_and_inf_fail_with_their_reason_and_zero_is_a_reward() -> None:
    answer, failures = scored(reward(source=f"{__name__}:partly"))
    assert answer.column("reward").to_pylist() == [None, None, None, 0.0]
    assert answer.column("failure").to_pylist() == ["mine_none", "mine_not_finite", "mine_not_finite", None]
    assert failures == {"mine_none": 1, "mine_not_finite": 2}


def test_a_function_that_raises_fails_its_samples() -> None:
    answer, failures = scored(reward(source=f"{__name__}:broken"))
    assert answer.column("reward").null_count == 4
    assert failures == {"mine_LookupError": 4}


def test_a_failing_monitor_is_counted_and_costs_no_sample() -> None:
    answer, failures = scored(reward(), reward(name="gold", source=f"{__name__}:partly", role="monitor"))
    assert answer.column("reward").null_count == 0
    assert answer.column("failure").null_count == 4
    assert answer.column("reward_gold").to_pylist() == [None, None, None, 0.0]
    assert failures == {"gold_none": 1, "gold_not_finite": 2}


def test_a_wrong_count_says_nothing_about_anyone() -> None:
    with pytest.raises(ValueError, match="5 values for 4 completions"):
        scored(reward(source=f"{__name__}:one_too_many"))


def with_reference(rows: pa.RecordBatch) -> pa.RecordBatch:
    return schema.append(
        rows, schema.build(schema.REFERENCE, {"reference_logprobs": rows.column("completion_logprobs")})
    )


def test_reference_reward_is_the_mean_log_prob() -> None:
    rows = with_reference(batch())
    answer, _ = scored(reward(kind="reference", source=""), rows=rows)
    expected = [float(np.mean(row)) for row in rows.column("reference_logprobs").to_pylist()]
    assert answer.column("reward").to_pylist() == pytest.approx(expected, abs=1e-6)


class Handler(BaseHTTPRequestHandler):
    """Answers by path; /flaky fails once."""

    calls = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).calls += 1
        if self.path == "/slow":
            self.server.patience.wait(60)  # type: ignore[attr-defined]
        if self.path == "/drop":
            return  # and the connection is closed
        if self.path == "/down" or (self.path == "/flaky" and self.calls == 1):
            self.send_error(503)
            return
        rewards = [len(text) for text in body["completions"]]
        if self.path == "/answers":
            rewards = [int(answer) for answer in body["answer"]]
        content = b"{}" if self.path == "/odd" else json.dumps({"rewards": rewards}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    Handler.calls = 0
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.patience = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}"
    http_server.patience.set()  # type: ignore[attr-defined]
    http_server.shutdown()


@pytest.mark.parametrize(
    ("path", "reason", "calls"),
    [
        ("/ok", None, 1),
        ("/flaky", None, 2),
        ("/down", "http_5xx", 3),
        ("/odd", "http_malformed", 3),
        ("/drop", "http_unreachable", 3),
        ("/slow", "http_timeout", 3),
    ],
)
def test_http_endpoint(server: str, path: str, reason: str | None, calls: int) -> None:
    seconds = 2.0 if path == "/slow" else 10.0
    answer, failures = scored(reward(kind="http", source=server + path, timeout_seconds=seconds, retries=2))
    assert Handler.calls == calls
    if reason is None:
        assert answer.column("reward").to_pylist() == [len(text) for text in answer.column("completion").to_pylist()]
    else:
        assert answer.column("reward").null_count == 4 and failures == {f"mine_{reason}": 4}


def test_http_endpoint_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but no server listens
        port = free.getsockname()[1]
        answer, failures = scored(reward(kind="http", source=f"http://127.0.0.1:{port}/x", retries=1))
    assert failures == {"mine_http_unreachable": 4}
    assert answer.column("reward").null_count == 4


def test_http_gets_the_further_columns_of_the_prompts(server: str) -> None:
    answer, failures = scored(reward(kind="http", source=server + "/answers"))
    assert failures == {} and answer.column("reward").to_pylist() == [0.0, 0.0, 1.0, 1.0]


def test_reward_model_scores_equal_one_by_one_calls(tmp_path: Path) -> None:
    """Padding and batching do not change a score; logit 0, no activation; an end token behind what ended."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    folder = tiny.write(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    classifier = LlamaConfig(
        vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, initializer_range=0.2, **sizes
    )
    LlamaForSequenceClassification(classifier).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    rows = generated(prompts(range(10)))  # more than one batch, and not the last one full
    answer, _ = scored(reward(kind="model", source=str(tmp_path / "rm")), rows=rows)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    ends = {"stop": tokenizer.eos_token, "length": ""}
    columns = (answer.column(name).to_pylist() for name in ("prompt", "completion", "finish_reason"))
    texts = [words + completion + ends[reason] for words, completion, reason in zip(*columns, strict=True)]
    assert set(answer.column("finish_reason").to_pylist()) == set(ends)
    with torch.inference_mode():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item() for text in texts]
    assert answer.column("reward").to_pylist() == pytest.approx(expected, abs=1e-5)
    assert len({len(tokenizer(text)["input_ids"]) for text in texts}) > 1 and np.std(expected) > 0.01
    assert "reward_mine_std" not in answer.schema.names  # one model has no spread


MEMBERS = np.array([[1.0, 3.0, 10.0, 20.0], [102.0, 100.0, 100.0, 110.0]])


@pytest.mark.parametrize(
    ("ensemble", "expected"),
    [
        ({}, [51.5, 51.5, 55.0, 65.0]),
        ({"form": "sum"}, [103.0, 103.0, 110.0, 130.0]),
        ({"form": "worst"}, [1.0, 3.0, 10.0, 20.0]),
        ({"form": "lower_bound", "coefficient": 0.5}, [26.25, 27.25, 32.5, 42.5]),
        ({"form": "variance", "coefficient": 0.1}, [51.5 - 255.025, 51.5 - 235.225, 55 - 202.5, 65 - 202.5]),
        # centered per prompt the members are [-1, 1, -5, 5] and [1, -1, -5, 5]
        ({"form": "worst", "center": True}, [50.5, 50.5, 55.0, 65.0]),
        ({"form": "lower_bound", "center": True}, [50.5, 50.5, 55.0, 65.0]),
    ],
)
def test_the_reward_of_a_folder_with_members(ensemble: dict[str, Any], expected: list[float]) -> None:
    settings = reward(kind="model", source="m", ensemble={"form": "mean", "center": False, **ensemble})
    assert scorers.of_members(settings, MEMBERS, np.array([0, 0, 1, 1])).tolist() == pytest.approx(expected)
    assert scorers.spread_names(settings, 2) == ["mine_mean", "mine_std", "mine_worst"]
    assert scorers.spread_names(settings, 1) == []


def test_columns_beside_the_reward_say_what_the_members_say() -> None:
    result = scorers._spread(reward(kind="model", source="m"), np.array([[1.0, 5.0, np.nan], [3.0, -1.0, 2.0]]))
    expected = {"mean": [2.0, 2.0, None], "std": [1.0, 3.0, None], "worst": [1.0, -1.0, None]}
    assert {name: column.to_pylist() for name, column in result.items()} == {
        f"reward_mine_{what}": values for what, values in expected.items()
    }


def test_a_text_no_member_can_read_has_no_reward() -> None:
    result = scorers.of_members(reward(kind="model", source="m"), np.array([[1.0, np.nan], [3.0, np.nan]]), np.zeros(2))
    assert result == pytest.approx([2.0, np.nan], nan_ok=True)


def test_a_text_that_is_too_long_leaves_its_siblings_what_they_are() -> None:
    settings = reward(kind="model", source="m", ensemble={"form": "lower_bound", "center": True})
    members = np.array([[10.0, 11.0, 12.0], [112.0, 110.0, 111.0]])
    whole = scorers.of_members(settings, members, np.zeros(3))
    with_another = scorers.of_members(settings, np.concatenate([members, np.full((2, 1), np.nan)], axis=1), np.zeros(4))
    assert with_another[:3] == pytest.approx(whole)


def test_reference_log_probs_equal_whole_logits_at_the_same_temperature(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.write(tmp_path / "m")
    rows = batch()
    scorer = reference.ReferenceScorer(str(folder), ReferenceSettings(dtype="float32", threads=1), 0.7, "reference-0")
    answer, receipt = scorer.score(rows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for row in answer.to_pylist():
        expected = plain_logprobs(model, row["prompt_tokens"], row["completion_tokens"], 0.7)
        assert row["reference_logprobs"] == pytest.approx(expected, abs=1e-5)
    assert receipt.tokens == schema.lengths(rows, "completion_tokens").sum()


def plain_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """Log-probs of a completion by transformers alone, one row and no packing."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)].tolist()


def test_relevance_is_the_mean_log_prob_given_the_prompt_minus_given_another_one(tmp_path: Path) -> None:
    """Three others: ticket 3 takes number 0, 1 number 1, 2 number 2; 4 would take 1, which is its own, hence 2."""
    from transformers import AutoModelForCausalLM

    folder = tiny.write(tmp_path / "m")
    prompts_of = {1: [5, 6, 7], 2: [8, 9], 3: [5, 6, 7, 10], 4: [11, 12]}
    others = ([8, 9], [11, 12], [5, 6, 7, 10, 11])
    rows = of_prompts([prompts_of[ticket] for ticket in (3, 1, 1, 2, 4)], tickets=[3, 1, 1, 2, 4])
    scorer = reference.ReferenceScorer(
        str(folder), ReferenceSettings(dtype="float32", threads=1), 0.7, "reference-0", list(others)
    )
    answer, _ = scorer.score(rows)
    alone, _ = scorer.score(schema.concat([rows.slice(3, 1)]))
    assert alone.column("relevance_nats")[0].as_py() == pytest.approx(
        answer.column("relevance_nats")[3].as_py(), abs=1e-6
    )
    schema.check(answer)
    assert set(answer.schema.names) - set(rows.schema.names) == set(scorer.adds.names)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    number_of = {3: 0, 1: 1, 2: 2, 4: 2}
    for row in answer.to_pylist():
        expected = plain_logprobs(model, row["prompt_tokens"], row["completion_tokens"], 0.7)
        other = plain_logprobs(model, others[number_of[row["ticket"]]], row["completion_tokens"], 0.7)
        assert row["reference_logprobs"] == pytest.approx(expected, abs=1e-5)
        assert row["relevance_nats"] == pytest.approx(np.mean(expected) - np.mean(other), abs=1e-5)
    assert np.ptp(answer.column("relevance_nats").to_numpy()) > 1
    measured, failures = scored(
        reward(source=f"{__name__}:zeros"),
        reward(name="tie", kind="reference", source="relevance", role="monitor"),
        rows=answer,
    )
    assert measured.column("reward_tie").to_pylist() == answer.column("relevance_nats").to_pylist() and not failures


def test_contrast_prompts_are_different_ones_spaced_over_the_source() -> None:
    rows = pa.record_batch({"prompt_tokens": pa.array([[n // 2, 1] for n in range(100)], schema.TOKENS)})
    chosen = reference.contrast_prompts(rows)
    assert len(chosen) == 16 and chosen[0] == [0, 1] and chosen[-1] == [49, 1]
    assert {late[0] - early[0] for early, late in itertools.pairwise(chosen)} <= {3, 4}
    assert reference.contrast_prompts(rows.slice(0, 4)) == [[0, 1], [1, 1]]


def test_where_all_prompts_are_one_there_is_no_relevance(tmp_path: Path) -> None:
    """A null, never a 0: nothing was compared."""
    folder = tiny.write(tmp_path / "m")
    scorer = reference.ReferenceScorer(str(folder), ReferenceSettings(threads=1), 1.0, "reference-0", [[5, 6]])
    answer, _ = scorer.score(of_prompts([[5, 6]] * 2, tickets=[1, 2]))
    schema.check(answer)
    assert answer.column("relevance_nats").to_pylist() == [None, None]
    monitor = reward(name="tie", kind="reference", source="relevance", role="monitor")
    _, failures = scored(reward(source=f"{__name__}:zeros"), monitor, rows=answer)
    assert failures == {"tie_none": 2}


def of_prompts(tokens: list[list[int]], tickets: list[int]) -> pa.RecordBatch:
    """Generated rows with these prompts and tickets."""
    rows = schema.concat([generated(prompts(list(range(len(tokens))))).slice(0, len(tokens))])
    for name, column in (("prompt_tokens", pa.array(tokens, schema.TOKENS)), ("ticket", pa.array(tickets, pa.int64()))):
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), column)
    return rows


def zeros(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def reads_the_reference(
    completions: list[str], reference_logprobs: list[list[float]], relevance_nats: list[float | None], **columns: Any
) -> list[float | None]:
    assert "completion_logprobs" not in columns
    return [nats[0] + 10 * (tie or 0) for nats, tie in zip(reference_logprobs, relevance_nats, strict=True)]


def test_a_function_that_names_a_measurement_of_the_reference_is_given_it() -> None:
    rows = with_reference(batch())
    rows = schema.append(rows, schema.build(schema.RELEVANCE, {"relevance_nats": [0.5, None, -1.0, 2.0]}))
    answer, _ = scored(reward(source=f"{__name__}:reads_the_reference"), rows=rows)
    firsts = [row[0] for row in rows.column("reference_logprobs").to_pylist()]
    expected = [first + 10 * tie for first, tie in zip(firsts, [0.5, 0, -1.0, 2.0], strict=True)]
    assert answer.column("reward").to_pylist() == pytest.approx(expected, abs=1e-5)
