"""Comparisons to rewards: position bias cancels, round robin by hand, the knock-out's rounds."""

import math
from dataclasses import replace

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.models.pairwise import pair_prompt
from rlhf_fast.rewards import ComposedScorer, FunctionScorer, Part, ShapedScorer, ShapingConfig
from rlhf_fast.rewards.pair_model import PairModel
from rlhf_fast.rewards.pairwise import PairwiseScorer, compare_both_orders
from rlhf_fast.rewards.scorer import WINS, is_relative, score_against
from tests.records import completion
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer


class ByStrength:
    """Prefers the text with the larger number; the first place gets a bonus."""

    def __init__(self, bonus=0.0):
        self.bonus = bonus
        self.meetings = []

    def compare(self, meetings):
        self.meetings += meetings
        strengths = [(float(a.text), float(b.text)) for a, b in meetings]
        return [1 / (1 + math.exp(b - a - self.bonus)) for a, b in strengths]


def group(*strengths):
    return [completion(str(s)) for s in strengths]


def test_both_orders_cancel_a_preference_for_the_first_place():
    biased = ByStrength(bonus=3.0)
    (even,) = compare_both_orders(biased, [tuple(group(1, 1))])
    assert even == pytest.approx(0.5) and biased.compare([tuple(group(1, 1))])[0] > 0.9


def test_many_meetings_are_compared_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr("rlhf_fast.rewards.pairwise.MEETINGS", 4)
    (whole,) = PairwiseScorer(ByStrength()).score([group(0, 3, 1, 2)])
    monkeypatch.undo()
    assert whole == PairwiseScorer(ByStrength()).score([group(0, 3, 1, 2)])[0]


def test_round_robin_is_the_mean_winning_probability():
    (scored,) = PairwiseScorer(ByStrength()).score([group(0, 2, 1)])
    s = [1 / (1 + math.exp(-d)) for d in (1, 2)]
    assert scored.rewards == pytest.approx(
        [(2 - s[0] - s[1]) / 2, (s[1] + s[0]) / 2, (s[0] + 1 - s[0]) / 2]
    )


def test_against_others_a_reward_is_the_mean_winning_probability():
    scorer = PairwiseScorer(ByStrength())
    (scored,) = scorer.score_against([group(0, 2)], [group(1, 1, 0)])
    s = [1 / (1 + math.exp(-d)) for d in (1, 2)]
    expected = [(2 * (1 - s[0]) + 0.5) / 3, (2 * s[0] + s[1]) / 3]
    assert scored.rewards == scored.components[WINS] == pytest.approx(expected)
    assert [c.text for c in scored.completions] == ["0", "2"]
    assert {c.source for c in scored.completions} == {"policy"}


def test_what_holds_a_comparing_part_is_relative_too():
    pairwise = PairwiseScorer(ByStrength())
    number = FunctionScorer(lambda completions, **_: [float(text) for text in completions])
    parts = {"pairwise": Part(pairwise), "number": Part(number, 10.0)}
    composed = ComposedScorer(parts)
    shaped = ShapedScorer(composed, ShapingConfig(length_penalty=0.5))
    assert all(map(is_relative, (pairwise, composed, shaped)))
    assert not is_relative(number) and not is_relative(ComposedScorer({"n": Part(number)}))
    (scored,) = score_against(shaped, [group(0, 2)], [group(1, 2)])
    assert scored.components[WINS] == [0.0, 0.75] and len(scored.rewards) == 2
    raw, penalty = scored.components["raw"], 0.5 * len(scored.completions[0].token_ids)
    assert scored.rewards == pytest.approx([reward - penalty for reward in raw])


def test_round_robin_of_a_single_response_is_even():
    assert PairwiseScorer(ByStrength()).score([group(3)])[0].rewards == [0.5]


@pytest.mark.parametrize(
    ("strengths", "rewards"),
    [
        ((1, 2, 3, 4), [0, 1, 0, 2]),  # 2 beats 1, 4 beats 3, then 4 beats 2
        ((5, 1, 2), [2, 0, 1]),  # 2 has a bye
        ((1, 2, 3, 4, 5), [0, 1, 0, 2, 3]),  # 5 has two byes and wins the last
        ((7,), [0]),
        ((1, 1), [1, 0]),
    ],
)
def test_tournament_counts_rounds(strengths, rewards):
    (scored,) = PairwiseScorer(ByStrength(), "tournament").score([group(*strengths)])
    assert scored.rewards == rewards


def test_tournament_finds_the_best_with_few_comparisons():
    comparer = ByStrength()
    groups = [group(3, 1, 4, 1.5, 9, 2, 6, 5), group(2, 7)]
    scored = PairwiseScorer(comparer, "tournament").score(groups)
    assert [g.completions[g.rewards.index(max(g.rewards))].text for g in scored] == ["9", "7"]
    assert len(comparer.meetings) == 2 * (7 + 1)


def test_pair_prompt_names_turns_by_position():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
    ]
    (question,) = pair_prompt(messages, "one", "two")
    assert question["content"] == (
        "[CONTEXT] \n\n\n<turn> user\n S\nQ1\n\n<turn> assistant\n A1\n\n<turn> user\n Q2\n\n\n "
        "[RESPONSE A] one [RESPONSE B] two \n"
    )


def letter_tokenizer():
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["A", "B"])
    return tokenizer


def test_the_pair_model_compares_the_letters():
    tokenizer = letter_tokenizer()
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    chat = ChatFormat(tokenizer)
    language_model = LanguageModel(model, pad_token_id=3, precision="fp32")
    pair = (completion("w21 w22"), completion("w23"))
    (probability,) = PairModel(language_model, chat).compare([pair])
    ids = chat.prompt_ids(pair_prompt(pair[0].prompt.messages, "w21 w22", "w23"))
    logits = model(torch.tensor([ids])).logits[0, -1]
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "AB")
    assert probability == pytest.approx(torch.softmax(logits[[a, b]], 0)[0].item(), abs=1e-5)
    language_model.score_groups = lambda groups: [[float("nan"), -1.0]] * len(groups)
    with pytest.raises(UserError, match=r"pairwise_model gave \[nan, -1.0\] on prompt 'p'"):
        PairModel(language_model, chat).compare([pair])


def test_a_model_without_the_letters_is_refused():
    chat = ChatFormat(tiny_tokenizer(CHAT_TEMPLATE))
    with pytest.raises(UserError, match="needs 'A' as one token"):
        PairModel(LanguageModel(tiny_model(), pad_token_id=3), chat)


def test_opponents_are_those_of_another_source():
    comparer = ByStrength()
    sources = ["policy", "policy", "mixture"]
    players = [replace(c, source=s) for c, s in zip(group(3, 0, 1), sources)]
    alone = [replace(c, source="policy") for c in group(3, 5)]
    scored, lonely = PairwiseScorer(comparer, "opponents").score([players, alone])
    wins = [1 / (1 + math.exp(-d)) for d in (2, -1)]
    assert scored.rewards == pytest.approx([*wins, 1 - sum(wins) / 2])
    assert lonely.rewards == [0.5, 0.5] and len(comparer.meetings) == 4
