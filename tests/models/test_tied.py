"""A weight that is embedding and head: one gradient, the same as autograd's."""

import pytest
import torch

from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from tests.tiny import tiny_model

GROUPS = [TokenGroup([10, 3, 12 + i], [[20 + i, 21, 3], [22, 23 + i]]) for i in range(6)]


def gradients(policy, parts, tied):
    policy.model.zero_grad()
    weight, addresses = policy.head.weight, set()
    for part in parts:
        with policy.tied() if tied else torch.enable_grad():
            logps = policy.response_logps(policy.collate(part))
            (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        addresses.add(weight.grad.data_ptr())
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    return found, addresses


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_autograds(padding, checkpointing):
    model = tiny_model(tie_word_embeddings=True)
    model.get_input_embeddings().padding_idx = padding
    policy = LanguageModel(
        model, pad_token_id=3, precision="fp32", gradient_checkpointing=checkpointing
    )
    model.train()
    parts = [GROUPS[:3], GROUPS[3:]]
    own, _ = gradients(policy, parts, tied=False)
    mine, addresses = gradients(policy, parts, tied=True)
    assert len(addresses) == 1  # added to where it is
    for name, gradient in own.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-5)
    assert not policy.tied.is_active and "forward" not in vars(model.get_input_embeddings())


def test_nothing_is_replaced_where_it_would_not_be_the_same():
    tied, other = tiny_model(tie_word_embeddings=True), tiny_model(tie_word_embeddings=False)
    policies = [LanguageModel(model, pad_token_id=3, precision="fp32") for model in (tied, other)]
    for policy, expected in zip(policies, (True, False)):
        with policy.tied():
            assert policy.tied.is_active == expected
    embedding = tied.get_input_embeddings()
    embedding.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with policies[0].tied():
        assert not policies[0].tied.is_active
    embedding.weight.requires_grad_(False)
    with policies[0].tied():
        assert not policies[0].tied.is_active
