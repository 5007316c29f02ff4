"""The user's Python function as a reward: what it is given, and what it may return."""

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import FunctionScorer
from rlhf_fast.rewards.function import check_signature
from rlhf_fast.types import Completion, Prompt

PROMPT = Prompt("7", [{"role": "user", "content": "a"}], {"answer": {"text": "b"}})
GROUP = [Completion(PROMPT, text, [5], [8, 3], True) for text in ("b", "cc")]


def test_what_the_function_does_to_its_arguments_stays_its_own():
    def reward(prompts, completions, answer, **columns):
        for messages, text in zip(prompts, completions):
            messages.append({"role": "assistant", "content": text})
        answer[0].clear()
        assert answer[1] == {"text": "b"}
        return [float(len(messages)) for messages in prompts]

    (group,) = FunctionScorer(reward).score([GROUP])
    assert group.rewards == [2.0, 2.0]
    assert PROMPT.messages == [{"role": "user", "content": "a"}]
    assert PROMPT.metadata == {"answer": {"text": "b"}}


@pytest.mark.parametrize("returned", [{0: 1.0, 1: 2.0}, "12", 1.0, None, [None, 1.0]])
def test_what_is_no_list_of_numbers_is_refused(returned):
    with pytest.raises(UserError, match="must return a list of numbers"):
        FunctionScorer(lambda **_: returned).score([GROUP])


def test_an_error_is_told_with_its_line():
    def reward(completions, **columns):
        return [{}[text] for text in completions]

    line = reward.__code__.co_firstlineno + 1
    with pytest.raises(UserError, match=rf"KeyError on .*'b' \(test_function.py, line {line}\)"):
        FunctionScorer(reward).score([GROUP])


FUNCTIONS = """
def good(prompts, completions, finished, answer): ...
def open(completions, **columns): ...
def exact(prompts, completions, finished): ...
def short(prompts, completions): ...
def other(prompt, **columns): ...
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("good", None),
        ("open", None),
        ("short", r"short\(prompts, completions\) cannot be called: .*end with `\*\*columns`"),
        ("other", "missing a required argument: 'prompt'"),
    ],
)
def test_a_function_is_tried_before_any_work(name, message, tmp_path, monkeypatch):
    (tmp_path / "my_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    if message is None:
        return check_signature(f"my_functions:{name}", [PROMPT])
    with pytest.raises(UserError, match=message):
        check_signature(f"my_functions:{name}", [PROMPT])


def test_a_field_named_as_an_argument_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "my_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    check_signature("my_functions:exact", [Prompt("7", PROMPT.messages, {"completions": []})])
