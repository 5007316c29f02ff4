"""The judge against a stub server: verdicts in both orders, ratings, answers without either."""

from dataclasses import replace

import pytest

from rlhf_fast.endpoint import Endpoint
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.judge import JudgeConfig, LLMJudge, principles_of
from rlhf_fast.rewards.pairwise import PairwiseScorer
from rlhf_fast.types import Prompt
from tests.loopback import serve
from tests.records import completion


def choices(*texts):
    return 200, {"choices": [{"message": {"content": text}} for text in texts]}


def judge(url, **options):
    config = JudgeConfig(url=url, model="m", **options)
    return LLMJudge(config, seed=5, endpoint=Endpoint(url, retries=0))


def between(text, start, end):
    return text.split(start)[1].split(end)[0].strip()


def likes_the_longer(path, body):
    question = body["messages"][0]["content"]
    first = between(question, "[Response A]", "[Response B]")
    second = between(question, "[Response B]", "Which response")
    if len(first) == len(second):
        return choices("[[C]]")
    return choices("[[A]]" if len(first) > len(second) else "A is short. [[B]]")


def test_the_judge_ranks_in_both_orders():
    group = [completion("aa"), completion("a"), completion("aaa")]
    with serve(likes_the_longer) as url:
        (scored,) = PairwiseScorer(judge(url)).score([group])
    assert scored.rewards == [0.5, 0.0, 1.0]


def test_a_judge_that_always_says_a_says_nothing():
    group = [completion("aa"), completion("a")]
    with serve(lambda path, body: choices("[[A]]")) as url:
        (scored,) = PairwiseScorer(judge(url)).score([group])
    assert scored.rewards == [0.5, 0.5]


def test_the_request_says_what_the_configuration_says():
    seen = []

    def answer(path, body):
        seen.append((path, body))
        return choices("[[C]]", "[[A]]", "[[B]]", "[[A]]")

    pair = (completion("one"), completion("two"))
    with serve(answer) as url:
        config = {"samples": 4, "reasons": True, "criteria": "Shorter is better."}
        assert judge(url, **config).compare([pair]) == [0.625]
    ((path, body),) = seen
    question = body["messages"][0]["content"]
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["seed"] == 5
    assert (body["n"], body["temperature"]) == (4, 1.0)
    assert question.startswith("Shorter is better.") and "user: x" in question
    assert "Explain your reasons first" in question


def test_ratings():
    def rate(path, body):
        response = between(body["messages"][0]["content"], "[Response]", "Rate the response")
        return choices(f"I think [[3]], no, [[{len(response)}]]")

    groups = [[completion("a" * 10), completion("a")], [completion("aaaa")]]
    with serve(rate) as url:
        scored = judge(url, mode="rate").score(groups)
    assert [g.rewards for g in scored] == [[10.0, 1.0], [4.0]]


def is_shorter_than(path, body):
    """Satisfied by responses with fewer letters than the principle's number."""
    question = body["messages"][0]["content"]
    response = between(question, "[Response]", "[Principle]")
    limit = int(between(question, "[Principle]", "Does the response"))
    return choices("Perhaps [[NO]], but [[YES]]" if len(response) < limit else "[[NO]]")


def test_principles_are_asked_for_one_by_one():
    groups = [[completion("aa"), completion("aaaaa")], [completion("a" * 9)]]
    own = Prompt("q", [], {"rubric": ["10", "11"]})
    groups[1] = [replace(groups[1][0], prompt=own)]
    with serve(is_shorter_than) as url:
        options = {"principles": ("4", "8"), "principles_column": "rubric"}
        scored = judge(url, mode="entail", **options).score(groups)
    assert scored[0].components == {"principle_1": [1.0, 0.0], "principle_2": [1.0, 1.0]}
    assert [group.rewards for group in scored] == [[1.0, 0.5], [0.5]]  # 9 < 10, 11


@pytest.mark.parametrize("mode", ["compare", "rate"])
def test_comparisons_and_ratings_show_the_principles(mode):
    seen = []

    def answer(path, body):
        seen.append(body["messages"][0]["content"])
        return choices("[[A]] [[5]]")

    pair = (completion("one"), completion("two"))
    with serve(answer) as url:
        asked = judge(
            url, mode=mode, criteria="Be fair.", principles=("It is short.", "It is kind.")
        )
        asked.compare([pair]) if mode == "compare" else asked.score([[pair[0]]])
    assert seen[0].startswith("Be fair.\n\nPrinciples:\n- It is short.\n- It is kind.\n\n")


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        ({}, {}, "entail needs judge.principles, .* got none for prompt 'q'"),
        ({"principles_column": "rubric"}, {"rubric": "kind"}, "must be a list of sentences, got"),
        ({"principles_column": "rubric"}, {}, "entail needs judge.principles"),
    ],
)
def test_principles_that_are_missing(settings, row, message):
    config = JudgeConfig(url="http://127.0.0.1:1/v1", mode="entail", **settings)
    with pytest.raises(UserError, match=message):
        principles_of(Prompt("q", [], row), config)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (choices("I cannot decide."), "gave no verdict .* got 'I cannot decide.'"),
        (choices(None), "gave no verdict"),
        ((200, {"error": "x"}), "the answer lacks 'choices'"),
        (choices([{"type": "text"}]), "content of an answer must be text, got .*'type': 'text'"),
        (choices(), "judge.samples 1 asks for as many answers, got 0"),
        (choices("[[A]]", "[[B]]"), "judge.samples 1 asks for as many answers, got 2"),
    ],
)
def test_no_verdict_is_an_error(answer, message):
    with serve(lambda path, body: answer) as url:
        with pytest.raises(UserError, match=message):
            judge(url).compare([(completion("one"), completion("two"))])


def test_an_answer_without_a_verdict_is_asked_for_again():
    """One such answer among thousands must not end the run, whose resumption would meet it too."""
    asked = []

    def answer(path, body):
        asked.append(body)
        decided = "two" in body["messages"][0]["content"] or len(asked) > 3
        return choices("[[A]]" if decided else "Both are fine.")

    pairs = [(completion("one"), completion(text)) for text in ("one", "two")]
    with serve(answer) as url:
        assert judge(url).compare(pairs) == [1.0, 1.0]
    again = [body for body in asked if "two" not in body["messages"][0]["content"]]
    assert len(asked) == 4 and [body["seed"] for body in again] == [5, 6, 7]
    assert [body["temperature"] for body in again] == [0.0, 1.0, 1.0]


def test_bad_options():
    with pytest.raises(UserError, match="judge.samples must be >= 1, got 0"):
        JudgeConfig(samples=0)
