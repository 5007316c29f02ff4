"""Reward models as scorers: the token at which they are read."""

import pytest
import torch

from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from rlhf_fast.rewards import RewardModelScorer
from tests.records import completion
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_reward_model, tiny_tokenizer

WITH_CLOSING = CHAT_TEMPLATE.replace("<end> ", "<end> . ")  # as a new line behind ChatML's end
GROUP = [completion("w21 w22"), completion("w23")]


def rewards(model, tokenizer):
    scorer = RewardModelScorer(RewardModel(model, tokenizer, precision="fp32"))
    return scorer.score([GROUP])[0].rewards


def read_at(model, tokenizer, place):
    """What transformers' own modules give there, of whole conversations."""
    found = []
    for c in GROUP:
        messages = [*c.prompt.messages, {"role": "assistant", "content": c.text}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        found.append(model.score(hidden)[0, place].item())
    return found


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITH_CLOSING])
@torch.no_grad()
def test_a_ready_model_is_read_where_transformers_reads_it(template):
    model, tokenizer = tiny_reward_model().eval(), tiny_tokenizer(template)
    assert rewards(model, tokenizer) == pytest.approx(read_at(model, tokenizer, -1), abs=1e-5)


@torch.no_grad()
def test_a_model_made_here_is_read_at_the_end_token(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model, tokenizer = fresh_reward_model(str(tmp_path)), tiny_tokenizer(WITH_CLOSING)
    torch.nn.init.normal_(model.score.weight)
    assert rewards(model, tokenizer) == pytest.approx(read_at(model, tokenizer, -2), abs=1e-4)
