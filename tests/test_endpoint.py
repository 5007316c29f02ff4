"""The HTTP client against a server on this machine: order, retries, errors that quote."""

import threading
import time
from email.utils import formatdate

import pytest

from rlhf_fast.endpoint import Endpoint
from rlhf_fast.errors import UserError
from tests.loopback import serve


def no_sleep(seconds):
    pass


def test_answers_keep_the_order_of_the_requests():
    with serve(lambda path, body: (200, {"path": path, "twice": 2 * body["x"]})) as url:
        answers = Endpoint(url, concurrency=4).post_all("double", [{"x": i} for i in range(20)])
    assert [a["twice"] for a in answers] == list(range(0, 40, 2))
    assert {a["path"] for a in answers} == {"/v1/double"}


def test_overload_is_tried_again():
    calls, lock, pauses = [], threading.Lock(), []

    def answer(path, body):
        with lock:
            calls.append(path)
        return (503, {"error": "busy"}) if len(calls) < 3 else (200, {"ok": True})

    with serve(answer) as url:
        assert Endpoint(url, retries=3, sleep=pauses.append).post("x", {}) == {"ok": True}
    assert len(calls) == 3 and pauses == [1.0, 2.0]


@pytest.mark.parametrize(
    ("asked", "pause"),
    [("30", 30.0), ("9999", 600.0), ("0", 1.0), ("soon", 1.0), (30, 30.0), (-30, 1.0)],
)
def test_a_rate_limit_says_how_long_to_wait(asked, pause):
    """In seconds or, as a number here, as the date that is so many seconds from now."""
    if isinstance(asked, int):
        asked = formatdate(time.time() + asked, usegmt=True)
    calls, pauses = [], []

    def answer(path, body):
        calls.append(path)
        return (200, {}) if len(calls) > 1 else (429, {"error": "slow"}, {"Retry-After": asked})

    with serve(answer) as url:
        Endpoint(url, sleep=pauses.append).post("x", {})
    assert pauses == [pytest.approx(pause, abs=2.0)]


def test_after_an_error_nobody_waits_to_ask_again():
    """Ctrl-C, too, would last as long as the longest pause that some server asked for."""

    def answer(path, body):
        if body["x"] == 0:
            return 402, {"error": "no credit"}
        return 429, {"error": "slow"}, {"Retry-After": "600"}

    with serve(answer) as url:
        endpoint, begin = Endpoint(url, concurrency=4), time.monotonic()
        with pytest.raises(UserError, match="no credit"):
            endpoint.post_all("x", [{"x": i} for i in range(8)])
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("answer", "message", "count"),
    [
        ((400, {"error": "no such model: m"}), "answered 400: .*no such model: m", 1),
        ((500, {"error": "dead"}), r"answered 500: .*dead.*tried 3 times", 3),
        ((200, b"<html>"), "answered no JSON: b'<html>'", 1),
        ((200, [1]), "must answer a JSON object, got list", 1),
    ],
)
def test_errors_quote_the_server(answer, message, count):
    calls = []
    with serve(lambda path, body: calls.append(path) or answer) as url:
        with pytest.raises(UserError, match=message):
            Endpoint(url, retries=2, sleep=no_sleep).post("x", {})
    assert len(calls) == count


def test_an_answer_that_breaks_off_is_asked_for_again():
    """As from a server that is killed while it writes, or behind a proxy that times out."""
    calls = []

    def answer(path, body):
        calls.append(path)
        headers = {"Content-Length": "1000"} if len(calls) < 3 else {}
        return (503 if len(calls) == 2 else 200), {"ok": True}, headers

    with serve(answer) as url:
        assert Endpoint(url, retries=2, sleep=no_sleep).post("x", {}) == {"ok": True}
    assert len(calls) == 3


def test_nobody_listens():
    with serve(lambda path, body: (200, {})) as url:
        pass
    with pytest.raises(UserError, match="cannot be reached.*tried 2 times.*start the server"):
        Endpoint(url, retries=1, sleep=no_sleep).post("x", {})


def test_the_key_comes_from_the_named_variable(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "abc")
    with serve(lambda path, body: (200, {"seen": body["_authorization"]})) as url:
        assert Endpoint(url, api_key_env="SOME_KEY").post("x", {}) == {"seen": "Bearer abc"}
        with pytest.raises(UserError, match="environment variable OTHER_KEY must hold the key"):
            Endpoint(url, api_key_env="OTHER_KEY")


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(lambda path, body: (200, {"ok": True})) as url:
        assert Endpoint(url, retries=0).post("x", {}) == {"ok": True}
    with pytest.raises(UserError, match="cannot be reached"):  # here it is asked
        Endpoint("http://somewhere.invalid/v1", retries=0).post("x", {})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nobody_is_sent_elsewhere_with_the_key(monkeypatch, status):
    monkeypatch.setenv("SOME_KEY", "abc")
    seen = []
    with serve(lambda path, body: seen.append(path) or (200, {})) as elsewhere:
        answer = (status, {}, {"Location": f"{elsewhere}/x"})
        with serve(lambda path, body: answer) as url:
            with pytest.raises(UserError, match=f"answered {status}"):
                Endpoint(url, api_key_env="SOME_KEY").post("x", {})
    assert not seen


def test_a_bad_address():
    with pytest.raises(UserError, match="must start with http:// or https://, got 'localhost:80'"):
        Endpoint("localhost:80")
