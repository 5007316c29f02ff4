"""Gradients in bf16 where that loses nothing, their norm, and the optimiser's step over both kinds.

Under autocast the gradient of a linear layer's weight is made by one product, in bf16. Autograd
widens it to the weight's float32, as other micro-batches may add to it; where a step has one only,
the wider numbers are the same ones in twice the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

WIDENED_BYTES = 32 << 20
"""Of float32 gradients made at a time in the optimiser's step."""


class Gradients:
    """The gradients of `parameters`, some of them in bf16 where `expect` finds it exact.

    `forward` runs the model on a few tokens as training does, to see what uses the parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], forward: Callable[[], object]) -> None:
        self.parameters = list(parameters)
        self.forward = forward
        self.factor: Tensor | None = None
        """What the narrow ones are still to be multiplied with."""
        for parameter in self.parameters:  # of a fit that was interrupted
            parameter.grad = None
            if getattr(parameter, "grad_dtype", parameter.dtype) != parameter.dtype:
                parameter.grad_dtype = parameter.dtype

    @functools.cached_property
    def narrow(self) -> list[nn.Parameter]:
        """Parameters whose gradient is one bf16 product in every micro-batch."""
        return used_once(self.parameters, self.forward)

    def expect(self, num_micro_batches: int) -> None:
        """Before the first backward of a step."""
        if num_micro_batches == 1 or "narrow" in vars(self):
            for parameter in self.narrow:
                parameter.grad_dtype = torch.bfloat16 if num_micro_batches == 1 else torch.float32

    def clip(self, max_norm: float) -> Tensor:
        """Scales the gradient down to `max_norm`; returns its norm before.

        Equivalent to `torch.nn.utils.clip_grad_norm_`; narrow ones, which would be rounded, are
        scaled when `step` widens them.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        whole = [p.grad for p in self.parameters if p.grad is not None and p.grad.dtype == p.dtype]
        if len(whole) == len(gradients):
            return nn.utils.clip_grad_norm_(self.parameters, max_norm)
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self.factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if whole:
            torch._foreach_mul_(whole, self.factor)
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser's step; there is no gradient afterwards."""
        waiting = []
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.dtype != parameter.dtype:
                waiting.append((parameter, parameter.grad))
                parameter.grad = None  # the optimiser passes over it
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        while waiting:
            for parameter, gradient in _taken(waiting):
                parameter.grad_dtype = parameter.dtype
                parameter.grad = gradient.to(parameter.dtype)
                if self.factor is not None:
                    parameter.grad.mul_(self.factor)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.factor = None


def _taken(waiting: list[tuple[nn.Parameter, Tensor]]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Takes the last ones off the list, at least one of them."""
    num_bytes = 0
    while waiting and num_bytes < WIDENED_BYTES:
        num_bytes += 4 * waiting[-1][1].numel()
        yield waiting.pop()


def used_once(
    parameters: Sequence[nn.Parameter], forward: Callable[[], object]
) -> list[nn.Parameter]:
    """Those that `forward` uses once only, as the weight of a linear layer that computes in bf16.

    A weight of two products has the sum of two gradients, which bf16 would round.
    """
    if not hasattr(Tensor, "grad_dtype"):  # torch 2.9 and before
        return []
    uses = _Uses(parameters)
    with torch.no_grad(), uses:
        forward()
    return [p for p in parameters if uses.seen[id(p)] == [True]]


class _Uses(TorchFunctionMode):
    """For every tensor that is made of a parameter, whether it is a product in bf16."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.seen: dict[int, list[bool]] = {id(p): [] for p in parameters}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            for place, value in enumerate((*args, *(kwargs or {}).values())):
                if id(value) in self.seen:
                    is_weight = function is F.linear and place == 1
                    self.seen[id(value)].append(is_weight and result.dtype == torch.bfloat16)
        return result
