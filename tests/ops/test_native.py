"""The bridge itself: dtypes, when the dispatcher is called, and what is no tensor."""

from __future__ import annotations

import inspect

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


def tensor_arguments():
    """(op, argument, whether it must be given) of all that take a tensor."""
    for name in ops.__all__:
        if inspect.isfunction(op := getattr(ops, name)) and not name.endswith("_ref"):
            for parameter in inspect.signature(op).parameters.values():
                if "Tensor" in str(parameter.annotation).split(" | "):
                    yield pytest.param(op, parameter.name, id=f"{name}-{parameter.name}")


@pytest.mark.parametrize(("op", "argument"), tensor_arguments())
@pytest.mark.parametrize("kind", ["numpy.ndarray", "list"])
def test_an_argument_that_is_no_tensor_is_named(op, argument, kind):
    array = torch.zeros(2, 2).numpy()
    parameters = inspect.signature(op).parameters.values()
    given = {p.name: torch.zeros(2, 2) for p in parameters if p.default is p.empty}
    given[argument] = array.tolist() if kind == "list" else array
    with pytest.raises(TypeError, match=f"^{op.__name__}: {argument} must be a tensor.*{kind}; "):
        op(**given)


def test_a_field_that_is_no_tensor_is_named_too():
    x = torch.zeros(2)
    with pytest.raises(TypeError, match=r"data\.weights must be a tensor, got list"):
        ops.preference_loss(x, x, x, x, data=ops.PairData(weights=[1.0, 1.0]))
    with pytest.raises(ValueError, match="must have shape"):  # tensors have errors of their own
        ops.preference_loss(x, x[:1], x, x)
