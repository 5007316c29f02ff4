"""Rewards by rules: answers however they are written, formats, lengths, repetition."""

import sys
import threading
from dataclasses import replace

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.rules import RuleConfig, RuleScorer, check_rows, marked_answer, number_in
from rlhf_fast.types import Completion, Prompt
from tests.records import completion


def answering(text, **row):
    return replace(completion(text), prompt=Prompt("p", [], row))


def reward(config, response: Completion) -> float:
    ((score,),) = [group.rewards for group in RuleScorer(config).score([[response]])]
    return score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}, not \boxed{3", None),
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<answer>a</answer> <answer> b\n</answer>", "b"),
        ("48 / 2 = 24\n#### 72\n\nQuestion: 5?", "72"),
        ("72 ####", None),
        ("72", None),
    ],
)
def test_the_last_mark_counts(text, expected):
    assert marked_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it costs $1,234.50.", 1234.5),
        ("5-3=2", 2),
        ("x is -3", -3),
        ("1,2,3", 3),
        ("1e3", 1000),
        ("v2 and B52", None),
        (r"\boxed{7} of 9", 7),
        (r"3 or \boxed{\frac{1}{2}}", None),
        (r"3 or \boxed{7 or 9}", None),
        ("3, or 1/2", 3),
        ("10/2.5/5", None),
        ("1e9999999999999999999", None),
        ("none", None),
    ],
)
def test_numbers_are_found(text, expected):
    assert number_in(text) == expected


@pytest.mark.parametrize(
    ("kind", "right", "text", "expected"),
    [
        ("number", "#### 1,000", "That makes 1000.0 in all", 1.0),
        ("number", 72, "7 or 27", 0.0),
        ("number", 72, "nothing", 0.0),
        ("number", ["3", "4"], "4", 1.0),
        ("exact", "New  York", "<answer>new york</answer>", 1.0),
        ("exact", "York", "New York", 0.0),
    ],
)
def test_answers(kind, right, text, expected):
    config = RuleConfig(kind, column="right")
    assert reward(config, answering(text, right=right)) == expected


def test_a_pattern_finds_the_answer():
    config = RuleConfig("exact", answer=r"answer is \(?([A-D])\b")
    assert reward(config, answering("The answer is (A), no, the answer is B", answer="B")) == 1.0
    assert reward(config, answering("B", answer="B")) == 0.0


@pytest.mark.parametrize(
    ("right", "text", "expected"),
    [
        (r"2\sqrt{3}", r"so \boxed{\sqrt{12}}", 1.0),
        (r"2\sqrt{3}", r"so \boxed{2}", 0.0),
        (r"\frac{1}{2}", "The final answer is 0.5.", 1.0),
        ("1/2", "<answer>0.5</answer>", 1.0),
        ("(1,2)", r"\boxed{(1, 2)}", 1.0),
        ("x^2+1", r"\boxed{1+x^2}", 1.0),
        ("72", "I do not know", 0.0),
        ("Paris", r"\boxed{paris}", 1.0),
    ],
)
def test_mathematics(right, text, expected):
    pytest.importorskip("math_verify")
    assert reward(RuleConfig("math"), answering(text, answer=right)) == expected


def test_mathematics_outside_the_main_thread():
    """The library's alarm cannot be set there, which it would report as a wrong answer."""
    pytest.importorskip("math_verify")
    found = []
    response = answering(r"\boxed{0.5}", answer="1/2")
    run = threading.Thread(target=lambda: found.append(reward(RuleConfig("math"), response)))
    run.start()
    run.join()
    assert found == [1.0]


def test_mathematics_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'rlhf-fast\[math\]'"):
        check_rows(RuleConfig("math"), [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nwell\n</think>\nyes", 1.0),
        ("<think>well</think>", 0.0),
        ("<think>well<think></think>yes", 0.0),
        ("yes", 0.0),
    ],
)
def test_format(text, expected):
    assert reward(RuleConfig("format"), completion(text)) == expected


def test_another_format_must_match_the_whole_response():
    config = RuleConfig("format", pattern=r"Answer: \d+")
    assert reward(config, completion("Answer: 12")) == 1.0
    assert reward(config, completion("Answer: 12, I think")) == 0.0


@pytest.mark.parametrize(("length", "expected"), [(8, 0), (9, -0.5), (10, -1), (30, -1)])
def test_overlong_responses(length, expected):
    config = RuleConfig("overlong", max_tokens=10, buffer_tokens=2)
    assert reward(config, completion("a", num_tokens=length)) == expected
    hard = RuleConfig("overlong", max_tokens=10)
    assert reward(hard, completion("a", num_tokens=length)) == -float(length > 10)


def test_repetition():
    config = RuleConfig("repetition", ngram_words=2)
    assert reward(config, completion("a b a b a")) == -0.5
    assert reward(config, completion("a b c")) == reward(config, completion("a")) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "overlong"}, "kind overlong needs max_tokens, got none"),
        ({"kind": "number", "pattern": "a"}, "kind number takes column, answer, not pattern, got"),
        ({"kind": "format", "max_tokens": 9}, "kind format takes pattern, not max_tokens, got 9"),
        (
            {"kind": "format", "pattern": "("},
            r"rule.pattern must be .* got '\('",
        ),
        ({"kind": "repetition", "ngram_words": 0}, "ngram_words >= 1, got 0 and 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        RuleConfig(**settings)


def test_rows_without_an_answer_are_refused():
    prompts = [Prompt("7", [], {"solution": "so 3"})]
    check_rows(RuleConfig("number", column="solution"), prompts)
    with pytest.raises(UserError, match="prompt '7' has no field 'answer' .* got solution"):
        check_rows(RuleConfig("number"), prompts)
    for answer in ("three", "1/2", r"\frac{1}{2}", "3 or 4"):
        with pytest.raises(UserError, match="must hold one number, got"):
            check_rows(RuleConfig("number"), [Prompt("7", [], {"answer": answer})])
