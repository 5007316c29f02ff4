"""Every op takes every tensor wherever its elements lie, as it takes a dense one."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.ops import PairData, PolicyLossParams

B, T, V, D = 6, 20, 9, 4
OFFSETS = torch.arange(B + 1) * T


def normal(*shape):
    return torch.randn(*shape)


def pair_data():
    columns = {name: torch.rand(B) for name in ("weights", "margins", "targets")}
    lengths = {f"{side}_lengths": torch.randint(1, 9, (B,)) for side in ("chosen", "rejected")}
    return columns | lengths


def tokens(*names):
    return {name: normal(B, T) for name in names} | {"mask": torch.rand(B, T) < 0.7}


def of_head(*shape):
    rows = {"hidden": normal(*shape, D), "weight": normal(V, D), "bias": normal(V)}
    return rows | {"labels": torch.randint(V, shape)}


POLICY = PolicyLossParams(kl_coef=0.1, entropy_coef=0.1)
CALLS = {  # op -> (call by keywords, its tensors); logits must be dense along the vocabulary
    "logps": (
        lambda labels, temperature: ops.logps(LOGITS, labels, temperature=temperature).logps,
        lambda: {"labels": torch.randint(V, (B,)), "temperature": torch.rand(B) + 0.5},
    ),
    "kl_top_k": (
        lambda **x: ops.kl_top_k(LOGITS, **x),
        lambda: {"teacher_indices": torch.randint(V, (B, 3)), "teacher_logps": -torch.rand(B, 3)},
    ),
    "policy_loss": (
        lambda **x: ops.policy_loss(**x, params=POLICY).loss,
        lambda: tokens(
            "logps", "old_logps", "advantages", "ref_logps", "sampling_logps", "entropy"
        ),
    ),
    "packed_policy_loss": (
        lambda **x: ops.policy_loss(**x, old_logps=None).loss,
        lambda: {"logps": normal(B * T), "advantages": normal(B), "cu_seqlens": OFFSETS},
    ),
    "value_loss": (
        lambda **x: ops.value_loss(**x, clip=0.2).loss,
        lambda: tokens("values", "returns", "old_values"),
    ),
    "gae": (
        lambda **x: ops.gae(**x).advantages,
        lambda: tokens("rewards", "values") | {"bootstrap_values": normal(B)},
    ),
    "macro_gae": (
        lambda **x: ops.macro_gae(**x).advantages,
        lambda: tokens("rewards", "values") | {"starts": torch.rand(B, T) < 0.3},
    ),
    "group_advantages": (
        lambda **x: ops.group_advantages(**x, estimator="opo"),
        lambda: {"rewards": normal(B), "lengths": normal(B), "group_ids": torch.arange(B) % 2},
    ),
    "whiten": (ops.whiten, lambda: tokens("values")),
    "segment_sum": (ops.segment_sum, lambda: tokens("values", "weights")),
    "preference_loss": (
        lambda a, b, c, d, **data: ops.preference_loss(a, b, c, d, data=PairData(**data)).loss,
        lambda: {name: normal(B) for name in "abcd"} | pair_data(),
    ),
    "unpaired_preference_loss": (
        lambda **x: ops.unpaired_preference_loss(**x).loss,
        lambda: {"logps": normal(B), "is_chosen": torch.rand(B) < 0.5, "ref_logps": normal(B)},
    ),
    "token_preference_loss": (
        lambda **x: ops.token_preference_loss(**x).loss,
        lambda: tokens("logps", "ref_logps"),
    ),
    "list_loss": (
        ops.list_loss,
        lambda: {"scores": normal(B), "labels": normal(B), "cu_groups": torch.tensor([0, 2, B])},
    ),
    "reward_regression_loss": (
        lambda **x: ops.reward_regression_loss(**x, loss_type="quantile"),
        lambda: tokens("predictions", "targets") | {"levels": torch.rand(T) / 2 + 0.1},
    ),
    "linear_logps": (
        lambda **x: ops.linear_logps(**x).logps,
        lambda: of_head(B * T) | {"temperature": torch.rand(B * T) + 0.5},
    ),
    "linear_policy_loss": (
        lambda **x: ops.linear_policy_loss(**x).loss,
        lambda: of_head(1, T) | {"old_logps": -torch.rand(1, T), "advantages": normal(1, T)},
    ),
    "linear_preference_loss": (
        lambda **x: ops.linear_preference_loss(**x, loss_type="cpo").loss,
        lambda: of_head(B * T) | {"cu_seqlens": OFFSETS},
    ),
}
LOGITS = normal(B, V)


def run(call, tensors):
    """The result, and the gradients of what gets one."""
    leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
    for constant in ("temperature", "weights"):
        leaves |= {constant: leaves[constant].detach()} if constant in leaves else {}
    result = call(**leaves)
    inputs = [x for x in leaves.values() if x.requires_grad]
    found = [None] * len(inputs)
    if result.requires_grad:
        found = torch.autograd.grad(result.sum(), inputs, allow_unused=True)
    return result.detach(), *(g for g in found if g is not None)


def apart(x):
    """The same values, between others."""
    other = torch.ones_like(x) if x.dtype == torch.bool else x + 1
    return torch.stack((other, x, other), -1)[..., 1]


@pytest.mark.parametrize("op", CALLS)
def test_elements_may_lie_apart(device, op, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(globals(), "LOGITS", LOGITS.to(device))
    call, make = CALLS[op]
    tensors = {name: x.to(device) for name, x in make().items()}
    want = run(call, tensors)
    for name, tensor in tensors.items():
        got = run(call, tensors | {name: apart(tensor)})
        assert len(got) == len(want), name
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)
