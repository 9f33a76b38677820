"""Values at the edge: what a reward, a remote scorer or an override may give by mistake."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from keel import schema
from keel.config import loader
from keel.config.rewards import EnsembleSettings, RewardSettings
from keel.config.workers import ScorerSettings
from keel.errors import ConfigError
from keel.observability import metric_table
from keel.rollout import scorers
from rollouts import generated, prompts


def too_large(completions: list[str], **columns: Any) -> list[float]:
    return [1e39, -1e39, 3e38, 1.0]


def scored(*rewards: RewardSettings) -> tuple[Any, dict[str, int]]:
    answer, receipt = scorers.RewardScorer(rewards, EnsembleSettings(), ScorerSettings(), "scorer-0").score(
        generated(prompts([0, 1]))
    )
    schema.check(answer)  # as the buffer will
    return answer, dict(receipt.failures)


def test_a_number_the_column_cannot_hold_fails_its_sample_alone() -> None:
    """Finite in float64, infinite in the float32 column: the buffer would refuse the whole batch."""
    answer, failures = scored(RewardSettings(name="mine", source=f"{__name__}:too_large"))
    assert failures == {"mine_not_finite": 2}
    assert answer.column("reward").to_pylist() == [None, None, pytest.approx(3e38), 1.0]


def test_a_sum_the_column_cannot_hold_fails_its_sample_too() -> None:
    reward = RewardSettings(name="mine", source=f"{__name__}:too_large", weight=10.0)
    answer, _ = scored(reward)
    assert answer.column("reward").to_pylist() == [None, None, None, 10.0]


@pytest.fixture
def answers() -> Iterator[Any]:
    """Serve a JSON value: answers(value) is the URL that always replies with it."""
    servers: list[ThreadingHTTPServer] = []

    def serve(value: Any) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert len(body["prompts"]) == len(body["completions"]) == len(body["answer"]) == 4
                content = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None: ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(
    "reply",
    [[1, 2, 3, 4], {"rewards": None}, {"rewards": 3}, {"rewards": "out of memory"}, {"rewards": ["a", 1, 2, 3]}],
    ids=["list", "null", "number", "text", "words"],
)
def test_a_remote_reply_that_is_no_list_of_numbers_fails_the_samples(answers: Any, reply: Any) -> None:
    reward = RewardSettings(name="mine", kind="http", source=answers(reply), retries=0)
    answer, failures = scored(reward)
    assert failures == {"mine_http_malformed": 4}
    assert answer.column("reward").null_count == 4


def test_a_remote_null_is_one_failed_sample(answers: Any) -> None:
    reward = RewardSettings(name="mine", kind="http", source=answers({"rewards": [0, None, 2, 3.5]}), retries=0)
    answer, failures = scored(reward)
    assert failures == {"mine_none": 1}
    assert answer.column("reward").to_pylist() == [0.0, None, 2.0, 3.5]


@pytest.mark.parametrize("override", ["sampling.stop_token_ids.0.x=1", "sampling.stop_token_ids.first.x=1"])
def test_an_override_into_a_list_of_numbers_is_one_line(tmp_path: Path, override: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "policy: {model: m}\nprompts: {source: p}\nsampling: {stop_token_ids: [1, 2]}\n"
        "rewards: [{name: a, source: 'a:b'}]"
    )
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        loader.load(path, [override])
    assert "\n" not in str(caught.value) and override in str(caught.value)


@pytest.mark.parametrize("name", ["std", "kl_term", "entropy_term"])
def test_a_reward_named_like_a_metric_is_refused(name: str) -> None:
    """The mean of its column reward_<name> would be lost under a number about something else."""
    assert f"reward_{name}" in {metric.name for metric in metric_table.TABLE}
    with pytest.raises(ConfigError, match=name):
        loader.parse(
            {
                "policy": {"model": "m"},
                "prompts": {"source": "p"},
                "rewards": [{"name": name, "source": "a:b"}],
            }
        )
