"""Rewards of a server: one bounded POST, then a list of numbers, or one word for the reason of the failure.

The server may be slow, hostile or a third party's: an attempt ends at its deadline whatever the server does, redirects
are not followed, certificates are checked, and no more than `max_response_bytes` of a reply are kept.
"""

import asyncio
import json
import logging
import os
import re
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from keel.config.rewards import ENVIRONMENT, RewardSettings
from keel.errors import ConfigError
from keel.rollout import reward_functions

_FIRST_WAIT_SECONDS = 0.25
_LONGEST_WAIT_SECONDS = 15.0
REASONS: tuple[str, ...] = (
    "http_timeout",
    "http_unreachable",
    "http_malformed",
    "http_too_large",
    "http_1xx",
    "http_3xx",
)
REASONS += ("http_4xx", "http_5xx")
"""All reasons; they become metric labels."""


for _client in ("httpx", "httpcore"):  # they log what a server says of the request, which may be its headers
    logging.getLogger(_client).setLevel(logging.WARNING)


class _Unusable(Exception):
    """A reply without usable rewards; the argument is one of REASONS."""


def caller(reward: RewardSettings, setting: str) -> Callable[[Mapping[str, Any], int], list[float | None] | str]:
    """A function from the body of a request and the number of its rows to their rewards, or to one of REASONS.

    POST {"prompts": [...], "completions": [...], further columns} -> {"rewards": [number or null, ...]}, with further
    attempts after growing waits. Raises ConfigError for a URL, certificate file or variable that is not there.
    """
    tls = check(reward, setting)

    def call(body: Mapping[str, Any], rows: int) -> list[float | None] | str:
        content = json.dumps(body).encode()
        loop = asyncio.new_event_loop()  # asyncio.run would wait at the end for a name look-up that never returns
        try:
            return loop.run_until_complete(_attempts(reward, setting, tls, content, rows))
        finally:
            loop.close()

    return call


def check(reward: RewardSettings, setting: str) -> ssl.SSLContext:
    """Check URL, headers and certificates before a request; returns the TLS context. Raises ConfigError."""
    if not reward.source.startswith(("http://", "https://")):
        raise ConfigError(f"{setting}={reward.source}: expected a URL that starts with http:// or https://")
    try:
        if not httpx.URL(reward.source).host:
            raise httpx.InvalidURL("it names no host")
    except httpx.InvalidURL as error:
        raise ConfigError(f"{setting}={reward.source}: {error}; expected a URL") from None
    headers(reward, setting)
    if reward.ca_file is None:
        return httpx.create_ssl_context()
    try:
        return ssl.create_default_context(cafile=reward.ca_file)
    except OSError as error:  # a file that holds no certificate is an SSLError, which is one
        name = setting.rpartition(".")[0] + ".ca_file"
        raise ConfigError(f"{name}={reward.ca_file}: {error.strerror or error}; expected certificates in PEM") from None


def headers(reward: RewardSettings, setting: str) -> dict[str, str]:
    """The request's headers with every ${NAME} replaced from this process's environment.

    Raises ConfigError, which names the variable and never its value, where it is not set or cannot be in a header.
    """
    place = setting.rpartition(".")[0] + ".headers"

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"{place}: ${{{match[1]}}} is not set; expected this variable in the environment")
        text = os.environ[match[1]].strip()
        if not (text and text.isascii() and text.isprintable()):
            problem = "is empty or holds characters that no header may; expected ASCII"
            raise ConfigError(f"{place}: ${{{match[1]}}} {problem}")
        return text

    return {name: ENVIRONMENT.sub(value, template) for name, template in reward.headers.items()}


def wait_seconds(attempt: int) -> float:
    """The pause before an attempt, counted from 1 for the first further one: doubled every time, up to a cap."""
    return min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0 ** min(attempt - 1, 30))


async def _attempts(
    reward: RewardSettings, setting: str, tls: ssl.SSLContext, content: bytes, rows: int
) -> list[float | None] | str:
    reason = ""
    sent = {**headers(reward, setting), "Content-Type": "application/json", "Accept-Encoding": "identity"}
    for attempt in range(reward.retries + 1):
        await asyncio.sleep(wait_seconds(attempt) if attempt else 0)
        try:
            async with asyncio.timeout(reward.timeout_seconds):
                return rewards_of(await _post(reward, sent, tls, content), rows)
        except _Unusable as error:
            reason = str(error)
        except (TimeoutError, httpx.TimeoutException):
            reason = "http_timeout"
        except httpx.HTTPError:
            reason = "http_unreachable"
    return reason


async def _post(reward: RewardSettings, sent: Mapping[str, str], tls: ssl.SSLContext, content: bytes) -> bytes:
    """The body of a good reply, at most `max_response_bytes`. The caller's deadline is the only one."""
    async with (
        httpx.AsyncClient(verify=tls, timeout=None, follow_redirects=False) as client,
        client.stream("POST", reward.source, content=content, headers=sent) as answer,
    ):
        if not answer.is_success:
            word = f"http_{answer.status_code // 100}xx"
            raise _Unusable(word if word in REASONS else "http_malformed")
        body = bytearray()
        async for chunk in answer.aiter_raw():  # as it came: a compressed reply, not asked for, may be a bomb
            body += chunk
            if len(body) > reward.max_response_bytes:
                raise _Unusable("http_too_large")
        return bytes(body)


def rewards_of(content: bytes, rows: int) -> list[float | None]:
    """One number or None a row; a number beyond float64 is infinite, so that its row fails alone."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits; brackets without end
        raise _Unusable("http_malformed") from None
    values = tree.get("rewards") if isinstance(tree, dict) else None
    if not isinstance(values, list) or len(values) != rows:  # which belongs to which row is unknown
        raise _Unusable("http_malformed")
    if any(type(value) not in (int, float, type(None)) for value in values):
        raise _Unusable("http_malformed")
    return reward_functions.numbers(values)
