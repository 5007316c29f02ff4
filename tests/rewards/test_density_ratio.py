"""Density ratios against plain log-softmax."""

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.rewards.density_ratio import DensityRatioScorer
from tests.records import completion
from tests.tiny import tiny_model, tiny_tokenizer


def wrapped(model):
    return LanguageModel(model, pad_token_id=3, precision="fp32")


def logp(model, prompt, response):
    logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    targets = torch.tensor(response)[:, None]
    return logps[len(prompt) - 1 : -1].gather(1, targets).sum().item()


@pytest.mark.parametrize("criteria", [None, "w40 w41"])
def test_the_ratio_is_the_models(criteria):
    strong, weak = tiny_model(seed=1), tiny_model(seed=2)
    chat = ChatFormat(tiny_tokenizer())
    scorer = DensityRatioScorer(
        wrapped(strong), wrapped(weak), chat, chat, criteria=criteria, scale=0.5
    )
    group = [completion("w21 w22"), completion("w23", finished=False), completion("")]
    (scored,) = scorer.score([group])
    messages = group[0].prompt.messages
    system = [{"role": "system", "content": criteria}] if criteria else []
    prompts = chat.prompt_ids([*system, *messages]), chat.prompt_ids(messages)
    responses = [[21, 22, 3], [23], [3]]
    expected = [0.5 * (logp(strong, prompts[0], r) - logp(weak, prompts[1], r)) for r in responses]
    assert scored.rewards == pytest.approx(expected, abs=1e-4)


def test_a_model_alone_rewards_what_it_finds_likely():
    model, chat = tiny_model(seed=1), ChatFormat(tiny_tokenizer())
    scorer = DensityRatioScorer(wrapped(model), None, chat, None)
    (scored,) = scorer.score([[completion("w21 w22"), completion("w23", finished=False)]])
    prompt = chat.prompt_ids(completion("").prompt.messages)
    expected = [logp(model, prompt, r) for r in ([21, 22, 3], [23])]
    assert scored.rewards == pytest.approx(expected, abs=1e-4)


def test_criteria_join_the_system_message_that_is_there():
    chat = ChatFormat(tiny_tokenizer())
    models = wrapped(tiny_model()), wrapped(tiny_model())
    scorer = DensityRatioScorer(*models, chat, chat, criteria="w40")
    user = {"role": "user", "content": "w30"}
    steered = scorer._steered([{"role": "system", "content": "w20"}, user])
    assert steered == [{"role": "system", "content": "w20\n\nw40"}, user]


def test_equal_models_give_zero():
    chat = ChatFormat(tiny_tokenizer())
    scorer = DensityRatioScorer(wrapped(tiny_model()), wrapped(tiny_model()), chat, chat)
    (scored,) = scorer.score([[completion("w21"), completion("w22 w23")]])
    assert scored.rewards == pytest.approx([0, 0], abs=1e-5)


def test_a_broken_model_is_no_reward():
    broken = wrapped(tiny_model())
    broken.score_groups = lambda groups: [[float("nan")] * len(g.responses) for g in groups]
    chat = ChatFormat(tiny_tokenizer())
    scorer = DensityRatioScorer(broken, wrapped(tiny_model()), chat, chat)
    with pytest.raises(UserError, match=r"strong_model and weak_model gave \[nan\] on prompt 'p'"):
        scorer.score([[completion("w21")]])
