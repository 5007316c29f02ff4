"""How many CUDA kernels a call launches: loss, gradient and metrics together."""

from __future__ import annotations

import ctypes

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.ops import native

_emulated = pytest.importorskip("rlhf_fast._emulated", reason="built without RLHF_FAST_EMULATE=ON")


def launches(call) -> int:
    counter = ctypes.c_int64.in_dll(ctypes.CDLL(_emulated.__file__), "emulated_launches")
    before = counter.value
    with native.emulated_cuda():
        call()
    return counter.value - before


def batch():
    logps, old_logps, ref_logps = torch.randn(3, 4, 40)
    return logps.requires_grad_(), old_logps, ref_logps, torch.rand(4, 40) < 0.8


LAUNCHES = {
    "policy_loss": 1,
    "gspo": 1,
    "value_loss": 1,
    "preference_loss": 1,
    "token_preference_loss": 1,
    "token_preference_loss of a sorted batch": 3,  # sums of both models, then the loss
    "reward_model_loss": 1,
    "list_loss": 1,
    "gae": 1,
    "group_advantages": 1,
    "whiten": 2,  # nothing can be mapped before all is summed
    "segment_sum": 1,
}


def call_of(name: str):
    logps, old_logps, ref_logps, mask = batch()
    chosen, rejected, *reference = torch.randn(4, 8, requires_grad=True)
    reference = [x.detach() for x in reference]
    offsets = torch.tensor([0, 3, 8])
    policy = dict(mask=mask, ref_logps=ref_logps, params=ops.PolicyLossParams(kl_coef=0.1))
    advantages = torch.randn(4)
    return {
        "policy_loss": lambda: ops.policy_loss(logps, old_logps, advantages, **policy).loss,
        "gspo": lambda: (
            ops.policy_loss(logps, old_logps, advantages, loss_type="gspo", **policy).loss
        ),
        "value_loss": lambda: ops.value_loss(logps, old_logps, mask=mask).loss,
        "preference_loss": lambda: ops.preference_loss(chosen, rejected, *reference).loss,
        "token_preference_loss": lambda: ops.token_preference_loss(logps, ref_logps, mask=mask)[0],
        "token_preference_loss of a sorted batch": lambda: ops.token_preference_loss(
            logps, ref_logps, mask=mask, loss_type="aot"
        )[0],
        "reward_model_loss": lambda: ops.reward_model_loss(chosen, rejected).loss,
        "list_loss": lambda: ops.list_loss(chosen, rejected.detach(), offsets),
        "gae": lambda: ops.gae(old_logps, ref_logps, mask=mask),
        "group_advantages": lambda: ops.group_advantages(reference[0], num_generations=4),
        "whiten": lambda: ops.whiten(old_logps, mask),
        "segment_sum": lambda: ops.segment_sum(old_logps, mask=mask),
    }[name]


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_a_call(name):
    assert launches(call_of(name)) == LAUNCHES[name]


@pytest.mark.parametrize(
    "name",
    ["policy_loss", "value_loss", "preference_loss", "token_preference_loss", "list_loss"],
)
def test_backward_launches_no_kernel_of_ours(name):
    with native.emulated_cuda():
        loss = call_of(name)()
    assert launches(loss.backward) == 0
