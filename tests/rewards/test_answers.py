"""A judge's answers outlive whatever ends a run: no question is asked, or paid, twice."""

import json
import multiprocessing
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.endpoint import Endpoint
from rlhf_fast.errors import UserError
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.workflow import resume, run_online
from rlhf_fast.rewards.answers import Answers
from rlhf_fast.rewards.judge import JudgeConfig, LLMJudge
from tests.loopback import serve
from tests.online.helpers import rows_without_times
from tests.records import completion

PAIRS = [(completion("one"), completion("x" * i)) for i in range(8)]


class Server:
    """Prefers the text with the lesser sum of characters; `fail(n)` may end its n-th answer."""

    def __init__(self, fail=lambda n: None):
        self.fail = fail
        self.asked = []
        self.lock = threading.Lock()

    def __call__(self, path, body):
        question = body["messages"][0]["content"]
        with self.lock:
            self.asked.append(question)
            failure = self.fail(len(self.asked))
        first, second = question.split("[Response A]")[1].split("[Response B]")
        sums = sum(map(ord, first)), sum(map(ord, second.split("Which response")[0]))
        verdict = "[[A]]" if sums[0] < sums[1] else "[[B]]"
        return failure or (200, {"choices": [{"message": {"content": verdict}}]})


def judge(url, path, **options):
    config = JudgeConfig(url=url, model="m", concurrency=2, **options)
    return LLMJudge(config, endpoint=Endpoint(url, retries=0, concurrency=2), answers=path)


def test_what_was_answered_before_an_error_is_not_asked_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    server = Server(lambda n: (402, {"error": "no credit"}) if n > 5 else None)
    with serve(server) as url:
        with pytest.raises(UserError, match="no credit"):
            judge(url, path).compare(PAIRS)
        answered = set(server.asked[:5])
        server.fail = lambda n: None
        server.asked.clear()
        result = judge(url, path).compare(PAIRS)
        assert len(server.asked) == 3 and not answered & set(server.asked)
        for options in ({}, {"max_tokens": 1024}):
            assert judge(url, path, **options).compare(PAIRS) == result
        assert len(server.asked) == 3
        assert judge(url, None).compare(PAIRS) == result and len(server.asked) == 11
        judge(url, path, criteria="Another question.").compare(PAIRS)
        assert len(server.asked) == 19
    assert all(json.loads(line)["answers"] for line in path.read_text().splitlines())


def test_alike_questions_are_one(tmp_path):
    server = Server()
    with serve(server) as url:
        assert judge(url, None).compare([PAIRS[3], PAIRS[4], PAIRS[3]]) == [1.0, 1.0, 1.0]
    assert len(server.asked) == 2


def test_an_answer_without_a_verdict_is_not_kept(tmp_path):
    silent = 200, {"choices": [{"message": {"content": "I cannot decide."}}]}
    server = Server(lambda n: silent)
    with serve(server) as url:
        with pytest.raises(UserError, match="gave no verdict"):
            judge(url, tmp_path / "answers.jsonl").compare(PAIRS[:1])
        server.fail = lambda n: None
        judge(url, tmp_path / "answers.jsonl").compare(PAIRS[:1])
    assert len(server.asked) == 4


def compare(url, path):
    judge(url, path).compare(PAIRS)


def test_answers_before_a_kill_are_kept(tmp_path):
    path, context = tmp_path / "answers.jsonl", multiprocessing.get_context("forkserver")
    server = Server()
    with serve(server) as url:
        process = context.Process(target=compare, args=(url, path))
        server.fail = lambda n: process.kill() if n == 5 else None
        process.start()
        process.join(170)
        assert process.exitcode == -signal.SIGKILL
        kept = len(Answers(path).values)
        assert kept >= 3  # two requests are under way at a time
        server.asked.clear()
        judge(url, path).compare(PAIRS)
    assert len(server.asked) == len(PAIRS) - kept


def test_a_broken_line_counts_for_nothing(tmp_path):
    path = tmp_path / "answers.jsonl"
    Answers(path).add({"a": 1}, 0.5, ["[[C]]"])
    path.write_bytes(b'{"request": "abc", "val\n' + path.read_bytes() + b'{"request": "de\xff')
    Answers(path).add({"a": 2}, 1.0, ["[[A]]"])
    answers = Answers(path)
    assert [answers.get({"a": i}) for i in range(3)] == [None, 0.5, 1.0]
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="must hold a judge's answers, got .*prompt"):
        Answers(path)


@contextmanager
def judged(config, server):
    with serve(server) as url:
        yield replace(config, reward=RewardConfig(judge=JudgeConfig(url=url, model="m")))


def test_a_resumed_run_asks_what_is_missing(config, tmp_path):
    config, whole, server = replace(config, num_iterations=1), Server(), Server()
    with judged(config, whole) as undisturbed:
        run_online(replace(undisturbed, output_dir=str(tmp_path / "whole")))
    last = len(whole.asked) - 5
    server.fail = lambda n: (402, {"error": "no credit"}) if n > last else None
    with judged(config, server) as disturbed:
        with pytest.raises(UserError, match="no credit"):
            run_online(disturbed)
        before = set(server.asked[:last])
        server.fail = lambda n: None
        server.asked.clear()
        resume(Path(config.output_dir))
    assert sorted([*before, *server.asked]) == sorted(whole.asked)
    assert rows_without_times(Path(config.output_dir)) == rows_without_times(tmp_path / "whole")
