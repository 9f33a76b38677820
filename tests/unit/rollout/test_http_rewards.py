"""Servers of rewards that are slow, broken or hostile: one word each, in bounded time and memory."""

import gzip
import json
import math
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.config.rewards import RewardSettings
from keel.errors import ConfigError
from keel.rollout import http_rewards

BODY = {"prompts": ["a", "b"], "completions": ["c", "d\ud800"]}
GOOD = b'{"rewards": [1, -0.5]}'
Serve = Callable[..., str]


def reply(content: bytes, *, status: str = "200 OK", length: int | None = None, more: str = "") -> bytes:
    size = len(content) if length is None else length
    return f"HTTP/1.1 {status}\r\n{more}Content-Length: {size}\r\n\r\n".encode() + content


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """serve(pieces, ...) is the URL of a server that sends these bytes, with a pause between them, to everyone.

    `serve.requests` holds what was asked, `serve.sent_bytes` how much was taken of every answer.
    """
    monkeypatch.setattr(http_rewards, "_FIRST_WAIT_SECONDS", 0.0)
    listeners: list[socket.socket] = []

    def start(*pieces: bytes, pause_seconds: float = 0.0, tls: ssl.SSLContext | None = None) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=answer_all, args=(listener, pieces, pause_seconds, tls), daemon=True).start()
        return f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}/score"

    def answer_all(
        listener: socket.socket, pieces: tuple[bytes, ...], pause: float, tls: ssl.SSLContext | None
    ) -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:  # the test is over
                return
            threading.Thread(target=answer, args=(plain, pieces, pause, tls), daemon=True).start()

    def answer(plain: socket.socket, pieces: tuple[bytes, ...], pause: float, tls: ssl.SSLContext | None) -> None:
        sent = 0
        try:
            connection = tls.wrap_socket(plain, server_side=True) if tls else plain
            asked = b""
            while not asked.endswith(b"}"):
                if not (new := connection.recv(65536)):
                    break
                asked += new
            start.requests.append(asked)  # type: ignore[attr-defined]
            for piece in pieces:
                connection.sendall(piece)
                sent += len(piece)
                time.sleep(pause)
            connection.close()
        except OSError:  # the client left, or would not shake hands
            plain.close()
        start.sent_bytes.append(sent)  # type: ignore[attr-defined]

    start.requests, start.sent_bytes = [], []  # type: ignore[attr-defined]
    yield start
    for listener in listeners:
        listener.close()


def asked(url: str, **fields: object) -> list[float | None] | str:
    reward = RewardSettings(
        **{"name": "mine", "kind": "http", "source": url, "retries": 0, "timeout_seconds": 5, **fields}
    )
    return http_rewards.caller(reward, "rewards.mine.source")(BODY, 2)


def test_a_good_reply_and_what_was_asked(serve: Serve) -> None:
    assert asked(serve(reply(GOOD))) == [1.0, -0.5]
    head, _, content = serve.requests[0].partition(b"\r\n\r\n")  # type: ignore[attr-defined]
    assert head.startswith(b"POST /score HTTP/1.1") and b"accept-encoding: identity" in head.lower()
    assert json.loads(content) == BODY  # also half a surrogate pair arrives


DEEP = b"[" * 200_000 + b"]" * 200_000


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no", b"null", b"3", b"[1, 2]", b'{"reward": [1, 2]}', b'{"rewards": null}', b'{"rewards": "12"}',
        b'{"rewards": [1]}', b'{"rewards": [1, 2, 3]}', b'{"rewards": []}', b'{"rewards": {"0": 1, "1": 2}}',
        b'{"rewards": [1, "2"]}', b'{"rewards": [1, true]}', b'{"rewards": [1, [2]]}', b'{"rewards": [1, {}]}',
        b'{"rewards": [1, 2', b'{"rewards": [1, 2]} more', b"\xff\xfe\xfd", b'{"rewards": [1, "\xc3"]}',
        DEEP, b'{"rewards": ' + DEEP + b"}", b'{"rewards": [1, ' + b"9" * 5000 + b"]}",
    ],
    ids=lambda content: content[:24].decode(errors="replace") or "empty",
)  # fmt: skip
def test_a_malformed_reply_is_one_word(serve: Serve, content: bytes) -> None:
    assert asked(serve(reply(content))) == "http_malformed"


def test_numbers_that_are_none_fail_their_row_alone(serve: Serve) -> None:
    assert asked(serve(reply(b'{"rewards": [NaN, 2]}'))) == [pytest.approx(math.nan, nan_ok=True), 2.0]
    assert asked(serve(reply(b'{"rewards": [-Infinity, 1e400]}'))) == [-math.inf, math.inf]
    huge = b"9" * 400  # an integer that no float64 holds
    assert asked(serve(reply(b'{"rewards": [-%b, null]}' % huge))) == [-math.inf, None]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply(GOOD, status="301 Moved", more="Location: http://127.0.0.1:9/\r\n"), "http_3xx"),
        (reply(GOOD, status="404 Not Found"), "http_4xx"),
        (reply(GOOD, status="500 Down"), "http_5xx"),
        (reply(GOOD, status="700 What"), "http_malformed"),
        (reply(b"", status="204 No Content"), "http_malformed"),
        (reply(GOOD, length=1000), "http_unreachable"),  # and the connection ends
        (b"SSH-2.0-OpenSSH_9\r\n", "http_unreachable"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 2**20, "http_unreachable"),
        (b"", "http_unreachable"),
    ],
    ids=["redirect", "4xx", "5xx", "7xx", "no content", "cut", "no http", "endless header", "closed"],
)
def test_answers_that_are_no_reply(serve: Serve, answer: bytes, reason: str) -> None:
    assert asked(serve(answer)) == reason and reason in http_rewards.REASONS


def test_a_redirect_is_not_followed(serve: Serve) -> None:
    other = serve(reply(GOOD))
    assert asked(serve(reply(b"", status="307 Go", more=f"Location: {other}\r\n"))) == "http_3xx"
    assert len(serve.requests) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["header", "body"])
def test_the_deadline_is_of_the_whole_attempt(serve: Serve, place: str) -> None:
    """A byte every 50 ms: no single read takes long, the reply would take more than 10 s."""
    whole = reply(GOOD + b" " * 200)
    start = 0 if place == "header" else whole.index(b"\r\n\r\n") + 4
    pieces = [whole[:start], *(whole[place : place + 1] for place in range(start, len(whole)))]
    began = time.monotonic()
    assert asked(serve(*pieces, pause_seconds=0.05), timeout_seconds=0.4, retries=1) == "http_timeout"
    assert 0.8 <= time.monotonic() - began < 8
    assert len(serve.requests) == 2  # type: ignore[attr-defined]


def test_a_server_that_takes_nothing_runs_into_the_deadline(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        began = time.monotonic()
        assert asked(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_seconds=0.3) == "http_timeout"
        assert time.monotonic() - began < 8


def test_the_deadline_holds_while_a_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def look_up(*arguments: object, **options: object) -> list[object]:
        released.wait(10)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    began = time.monotonic()
    assert asked("http://rewards.invalid/", timeout_seconds=0.3) == "http_timeout"
    assert time.monotonic() - began < 8
    released.set()


@pytest.mark.parametrize("declared", [True, False])
def test_no_more_of_a_reply_than_allowed_is_read(serve: Serve, declared: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 100000000\r\n\r\n" if declared else b"\r\n")
    pieces = [head, *[b" " * 2**16] * 1000]
    assert asked(serve(*pieces), max_response_bytes=2**18) == "http_too_large"
    deadline = time.monotonic() + 5
    while not serve.sent_bytes and time.monotonic() < deadline:  # type: ignore[attr-defined]
        time.sleep(0.01)
    assert serve.sent_bytes[0] < 2**24  # type: ignore[attr-defined]  the sockets' own buffers hold a few MiB
    assert asked(serve(reply(GOOD)), max_response_bytes=len(GOOD)) == [1.0, -0.5]
    assert asked(serve(reply(GOOD)), max_response_bytes=len(GOOD) - 1) == "http_too_large"


def test_a_compressed_reply_is_not_unpacked(serve: Serve) -> None:
    bomb = gzip.compress(b'{"rewards": [1, 2' + b" " * 2**26 + b"]}")
    assert len(bomb) < 2**17
    assert asked(serve(reply(bomb, more="Content-Encoding: gzip\r\n"))) == "http_malformed"


def test_pauses_double_up_to_a_cap() -> None:
    assert [http_rewards.wait_seconds(attempt) for attempt in range(1, 9)] == [0.25, 0.5, 1, 2, 4, 8, 15, 15]
    assert http_rewards.wait_seconds(10**6) == 15


def test_a_further_attempt_waits_and_may_succeed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_rewards, "_FIRST_WAIT_SECONDS", 0.2)
    began = time.monotonic()
    assert asked(serve(reply(b"{}")), retries=2) == "http_malformed"
    assert time.monotonic() - began >= 0.2 + 0.4 and len(serve.requests) == 3  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate of 127.0.0.1, and a server's context with it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "own.pem"]
        + ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "own.pem", folder / "key.pem")
    return folder / "own.pem", context


def test_a_certificate_is_checked(serve: Serve, certificate: tuple[Path, ssl.SSLContext]) -> None:
    path, context = certificate
    url = serve(reply(GOOD), tls=context)
    assert asked(url) == "http_unreachable" and serve.requests == []  # type: ignore[attr-defined]
    assert asked(url, ca_file=str(path)) == [1.0, -0.5]
    assert asked(url.replace("127.0.0.1", "localhost"), ca_file=str(path)) == "http_unreachable"  # another name


def test_the_deadline_holds_under_tls(serve: Serve, certificate: tuple[Path, ssl.SSLContext]) -> None:
    path, context = certificate
    url = serve(*[bytes([byte]) for byte in reply(GOOD + b" " * 200)], pause_seconds=0.05, tls=context)
    began = time.monotonic()
    assert asked(url, ca_file=str(path), timeout_seconds=0.4) == "http_timeout"
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    "source", ["ftp://host/x", "rewards", "http://", "http://[::1", "http://host:port/", "http://a b\x00"]
)
def test_a_source_that_is_no_url_is_one_line(source: str) -> None:
    with pytest.raises(ConfigError, match=r"^rewards\.mine\.source=") as caught:
        asked(source)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [None, b"", b"no certificate", b"\xff\x00"])
def test_a_ca_file_that_is_none_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^rewards\.mine\.ca_file=.*expected certificates in PEM"):
        asked("https://127.0.0.1:1", ca_file=str(tmp_path / "ca.pem"))


@settings(deadline=None)
@given(content=st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rewards", "x"]), inner, max_size=2),
    max_leaves=6,
).map(lambda tree: json.dumps(tree).encode()))  # fmt: skip
def test_any_reply_is_rewards_or_malformed(content: bytes) -> None:
    try:
        values = http_rewards.rewards_of(content, 2)
    except http_rewards._Unusable as error:
        assert str(error) == "http_malformed"
    else:
        assert len(values) == 2 and all(value is None or isinstance(value, float) for value in values)
