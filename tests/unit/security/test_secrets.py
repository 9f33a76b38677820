"""A secret is named in the configuration and read from the environment; nothing that is written holds it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel.cli import main
from keel.config import loader
from keel.config.rewards import EnsembleSettings
from keel.config.run import Settings
from keel.config.workers import ScorerSettings
from keel.errors import ConfigError
from keel.online import preflight
from keel.rollout import http_rewards, scorers
from rollouts import generated, prompts

pytestmark = pytest.mark.usefixtures("restored_process")  # the command line has its process for itself

SECRET = "sk-live-4f9a"
TEMPLATE = "Bearer ${REWARD_TOKEN}"


def tree(**reward: Any) -> dict[str, Any]:
    own = {"name": "mine", "kind": "http", "source": "https://host/x", "headers": {"Authorization": TEMPLATE}}
    return {"policy": {"model": "m"}, "prompts": {"source": "p"}, "rewards": [{**own, **reward}]}


def write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        loader.load(path, overrides)
    error = caught.value
    assert error.__context__ is None or error.__suppress_context__  # a traceback shows no more than the line
    return str(error)


class Handler(BaseHTTPRequestHandler):
    """Says who asked in its error, as a careless server does."""

    asked_by: list[str | None] = []  # noqa: RUF012 of one server alone

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked_by.append(self.headers["Authorization"])
        content = f"who is {self.headers['Authorization']}?".encode()
        self.send_response(401, "Not " + str(self.headers["Authorization"]))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(http_rewards, "_FIRST_WAIT_SECONDS", 0.0)
    Handler.asked_by.clear()
    own = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=own.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{own.server_port}"
    own.shutdown()
    own.server_close()


def test_the_server_gets_the_secret_and_nobody_else(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("DEBUG")
    monkeypatch.setenv("REWARD_TOKEN", f"{SECRET}\n")  # as a file of secrets gives it
    path = write(tmp_path, tree(source=server))
    settings = loader.load(path)
    preflight.check_reward_source(settings.rewards[0], "rewards.mine.source")
    monkeypatch.setattr("sys.argv", ["keel", "train", str(path), "--dry-run"])
    with pytest.raises(SystemExit, match="0"):
        main.main()
    scorer = scorers.RewardScorer(settings.rewards, EnsembleSettings(), ScorerSettings(), "scorer-0")
    answer, receipt = scorer.score(generated(prompts([0])))
    assert Handler.asked_by == [f"Bearer {SECRET}"] * 3
    assert dict(receipt.failures) == {"mine_http_4xx": 2}
    shown = capfd.readouterr()
    assert TEMPLATE in shown.out and TEMPLATE in loader.dump(settings) and TEMPLATE in repr(settings)
    written = [shown.out, shown.err, caplog.text, loader.dump(settings), loader.digest(settings), repr(settings)]
    written += [str(settings), settings.model_dump_json(), str(answer.to_pydict()), repr(receipt), str(vars(scorer))]
    assert "asyncio" in caplog.text and not any(SECRET in text for text in written)


def test_the_digest_is_that_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for value in ("one", "two"):
        monkeypatch.setenv("REWARD_TOKEN", value)
        digests.add(loader.digest(loader.parse(tree())))
    assert len(digests) == 1


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    own = loader.parse(tree()).rewards[0]
    for needs_it in (
        lambda: preflight.check_reward_source(own, "rewards.mine.source"),
        lambda: scorers.RewardScorer([own], EnsembleSettings(), ScorerSettings(), "scorer-0"),
    ):
        with pytest.raises(ConfigError, match=r"^rewards\.mine\.headers: \$\{REWARD_TOKEN\} is not set; expected"):
            needs_it()


@pytest.mark.parametrize("value", ["", " ", f"{SECRET}\r\nX-Other: 1", f"{SECRET}\u00e9", f"{SECRET}\x1b[1m"])
def test_a_value_that_no_header_can_hold_is_not_shown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(ConfigError, match=r"\$\{REWARD_TOKEN\} is empty or holds characters") as caught:
        http_rewards.headers(loader.parse(tree()).rewards[0], "rewards.mine.source")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "reward",
    [
        {"headers": {"Authorization": f"Bearer {SECRET}"}},
        {"headers": {"Authorization": SECRET}},
        {"headers": {"Authorization": f"{SECRET} ${{REWARD_TOKEN}}"}},
        {"headers": {"Authorization": f"${{REWARD_TOKEN}}{SECRET}"}},
        {"headers": {"Authorization": "$REWARD_TOKEN" + SECRET}},
        {"headers": {"Authorization": [SECRET]}},
        {"headers": {"Authorization": {"Bearer": SECRET}}},
        {"headers": {f"Bearer {SECRET}": None}},
        {"headers": {f"Bearer {SECRET}": TEMPLATE}},
        {"headers": f"Authorization: {SECRET}"},
        {"headers": [SECRET]},
        {"headers": {"Authorization": SECRET}, "kind": "rule", "source": "a:b"},
        {"header": {"Authorization": SECRET}},
        {"source": f"https://user:{SECRET}@host/x"},
        {"source": f"https://{SECRET}@host/x"},
        {"source": f"https://user:{SECRET}@host/x", "kind": "reference"},
        {"source": f"https://user:{SECRET}@host/x", "kind": "rule"},
        {"source": [f"https://user:{SECRET}@host/x"]},
        {"source": f"https://user:{SECRET}@host/x", "name": "Bad Name"},
    ],
    ids=str,
)  # fmt: skip
def test_a_secret_in_the_file_is_refused_and_not_shown(tmp_path: Path, reward: dict[str, Any]) -> None:
    path = write(tmp_path, tree(**reward))
    line = refused(path)
    assert SECRET not in line and line.startswith("rewards.0.")
    judge = {**tree(**reward)["rewards"][0], "role": "judge"}
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as label:
        loader.parse_as(Settings, tree() | {"rewards": [tree()["rewards"][0], judge]})
    assert SECRET not in str(label.value)


@pytest.mark.parametrize(
    "override",
    [
        f"rewards.mine.headers.Authorization=Bearer {SECRET}",
        f"rewards.mine.headers.Authorization=[{SECRET}",
        f"rewards.other.headers.Authorization={SECRET}",
        f"rewards.mine.headers.Authorization.x={SECRET}",
        f"rewards.mine.headers={SECRET}",
        f"rewards.mine.headers.Authorization:{SECRET}",
        f"rewards.other.source=https://user:{SECRET}@host",
        f"rewards.mine.source=https://user:{SECRET}@host",
    ],
)
def test_a_secret_in_an_override_is_refused_and_not_shown(tmp_path: Path, override: str) -> None:
    assert SECRET not in refused(write(tmp_path, tree()), override)


def test_a_file_that_is_no_yaml_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f'rewards:\n  - headers: {{Authorization: "Bearer {SECRET}"\nprompts: {{}}\n')
    line = refused(path)
    assert SECRET not in line and "not YAML" in line and "line 3" in line


def test_an_override_may_name_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "value")
    settings = loader.load(write(tmp_path, tree()), ["rewards.mine.headers.X-Key=${OTHER}"])
    monkeypatch.setenv("REWARD_TOKEN", "token")
    assert http_rewards.headers(settings.rewards[0], "s") == {"Authorization": "Bearer token", "X-Key": "value"}
    assert json.loads(settings.model_dump_json())["rewards"][0]["headers"]["X-Key"] == "${OTHER}"
