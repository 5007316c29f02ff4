"""JSON over HTTP: the client of OpenAI-compatible servers, for judges and for generation."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from rlhf_fast.errors import UserError

_RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
Item, Answer = TypeVar("Item"), TypeVar("Answer")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _Stays(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key to another server, and a POST becomes a GET."""

    def redirect_request(self, *request) -> None:
        return None


class Endpoint:
    """A server's base address, e.g. `http://127.0.0.1:8000/v1`.

    `api_key_env` names the environment variable that holds the key, so that no key is ever written
    to a configuration. Failed connections, time-outs and overload are tried again, `retries` times
    with growing pauses, or after the pause that the server asks for; whatever else it answers is an
    error that quotes it.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 3,
        concurrency: int = 32,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"a server's address must start with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        self.headers = {"Content-Type": "application/json"}
        if api_key_env:
            if not os.environ.get(api_key_env):
                raise UserError(f"{url}: the environment variable {api_key_env} must hold the key")
            self.headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self.timeout_s = timeout_s
        self.retries = retries
        self.concurrency = concurrency
        self._is_over = threading.Event()
        self.sleep = sleep or self._is_over.wait
        # A proxy of the environment cannot reach this machine's own loopback.
        proxies = {} if parts.hostname in _LOOPBACK else None
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _Stays)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The server's JSON answer to one request."""
        url = f"{self.url}/{path.lstrip('/')}"
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            pause = 2.0**attempt
            request = urllib.request.Request(url, data, self.headers, method="POST")
            try:
                with self.opener.open(request, timeout=self.timeout_s) as answer:
                    return _json(answer.read(), url)
            except urllib.error.HTTPError as error:
                text = _text(error)
                problem = f"answered {error.code}: {text[:300] or error.reason}"
                if error.code not in _RETRIED_STATUSES:
                    raise UserError(f"{url} {problem}") from error
                pause = max(pause, min(_asked_pause(error), self.timeout_s))
            except (OSError, http.client.HTTPException) as error:  # it may also stop half-way
                problem = f"cannot be reached: {getattr(error, 'reason', None) or error}"
            if self._is_over.is_set():
                break
            if attempt < self.retries:
                self.sleep(pause)
        raise UserError(
            f"{url} {problem} (tried {attempt + 1} times); start the server or correct its "
            f"address, then continue with `rlhf-fast resume RUN`"
        )

    def post_all(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers in the order of the requests, `concurrency` at a time."""
        return self.map(lambda body: self.post(path, body), bodies)

    def map(self, ask: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
        """`ask(item)` of each, in order, `concurrency` at a time."""
        try:
            with ThreadPoolExecutor(self.concurrency) as pool:
                try:
                    return list(pool.map(ask, items))
                finally:  # after an error or Ctrl-C nobody waits to ask again
                    self._is_over.set()
        finally:
            self._is_over.clear()


def _asked_pause(error: urllib.error.HTTPError) -> float:
    """The header Retry-After in seconds: a number, or a date (RFC 9110, section 10.2.3)."""
    value = error.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0


def _text(error: urllib.error.HTTPError) -> str:
    """What the server says about its error, if it says it to the end."""
    try:
        return error.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return ""


def _json(data: bytes, url: str) -> dict[str, Any]:
    try:
        value = json.loads(data or b"{}")
    except ValueError as error:
        raise UserError(f"{url} answered no JSON: {data[:200]!r}") from error
    if not isinstance(value, dict):
        raise UserError(f"{url} must answer a JSON object, got {type(value).__name__}")
    return value
