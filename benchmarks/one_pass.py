"""The least that a loss of tokens can cost: one pass over its arrays, alone and inside autograd.

A call of some 100 us begins with whatever the call before has left in the caches, of data and of
code. So the pass runs in turn with the contestants: memory's steady rate would be out of reach.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_COMBINE = {2: torch.sub, 3: torch.addcmul}
"""By the number of arrays read: one of torch's own loops over them."""


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arrays):
        ctx.save_for_backward(_COMBINE[len(arrays)](*arrays))
        return arrays[0].new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


def limits(first: Tensor, *rest: Tensor) -> dict[str, Callable[[], object]]:
    """Contestants that read two or three arrays and write one like them: a gradient of the first.

    The first of them is a floor for any implementation; the second one, forward and backward, for
    whatever torch's autograd calls in Python.
    """
    plain, written = first.clone(), torch.empty_like(first)
    leaf = first.clone().requires_grad_()

    def in_autograd():
        leaf.grad = None
        _Pass.apply(leaf, *rest).backward()

    return {
        "one pass alone": lambda: _COMBINE[1 + len(rest)](plain, *rest, out=written),
        "one pass in autograd": in_autograd,
    }
