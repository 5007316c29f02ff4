"""The bridge itself: dtypes, and when the dispatcher is called."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from rlhf_fast import ops
from rlhf_fast.ops import native


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(device, dtype):
    x, y = torch.randn(2, 4, 6, device=device, dtype=torch.float32)
    weight, labels = x.new_ones(9, 6).cumsum(0) / 9, x.new_ones(4, 6).long()

    def losses():
        hidden = torch.stack((x, y), 2).repeat(1, 1, 3)
        yield ops.policy_loss(x, y, x, normalizer=3.0).loss
        yield ops.value_loss(x, y, normalizer=3.0).loss
        desensitised = ops.PreferenceParams(ld_alpha=0.3)
        yield ops.token_preference_loss(x, y, mask=x > 0, params=desensitised).loss
        yield ops.linear_policy_loss(hidden, weight, labels, y, x, normalizer=3.0).loss
        yield ops.kl(x, y).sum()

    want = list(losses())
    torch.set_default_dtype(dtype)
    try:
        got = list(losses())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, want))


def test_plain_tensors_alone_pass_the_dispatcher_by():
    x = torch.randn(2, 3)
    assert native.is_plain(x) and native.is_plain(torch.nn.Parameter(x))
    seen = []
    torch.func.vmap(lambda row: seen.append(native.is_plain(row)) or row)(x)
    with FakeTensorMode() as mode:
        seen.append(native.is_plain(mode.from_tensor(x)))
        assert ops.gae(mode.from_tensor(x)).returns.shape == (2, 3)
    assert seen == [False, False]
