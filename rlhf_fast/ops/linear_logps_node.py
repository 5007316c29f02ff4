"""`linear_logps` in compiled code: two nodes of the graph, forward and backward.

Which rows are live is known only from the data. So what forward keeps for backward has the size
that it had if all were live, and backward picks the live ones again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.ops import autograd, matmul, native
from rlhf_fast.ops.head import Head, Needs
from rlhf_fast.ops.head_frozen import backward_from_gradient, forward_with_gradient
from rlhf_fast.ops.head_inputs import HeadInputs, HeadSettings, prepare
from rlhf_fast.ops.head_recompute import backward_by_columns, forward_keeping_logits
from rlhf_fast.ops.logps_kernels import INTERNAL
from rlhf_fast.ops.logps_ref import DIFFERENTIABLE

FROZEN = Needs(hidden=True, weight=False, bias=False)
_SAVED = (*INTERNAL, "entropy")


def call(tensors: Sequence[Tensor | None], numbers: list[float], outputs: tuple[str, ...]):
    """The outputs. `tensors`: hidden, weight, bias, labels, mask, temperature per row.

    `numbers`: those of `HeadSettings`, then the budget in bytes.
    """
    needs = [autograd.wants_gradient(t) for t in tensors[:3]]
    if any(needs):
        return _LinearLogpsNode.apply(numbers, outputs, *tensors)
    found = torch.ops.rlhf_fast.linear_logps_node(*tensors, needs, numbers, list(outputs))
    return tuple(found[: len(outputs)])


class _LinearLogpsNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, numbers, outputs, *tensors):
        needs = list(ctx.needs_input_grad[2:5])
        names = (*outputs, *(n for n in _SAVED if n not in outputs))
        found = torch.ops.rlhf_fast.linear_logps_node(*tensors, needs, numbers, list(names))
        named = dict(zip(names, found))
        ctx.save_for_backward(*tensors, *(named[n] for n in _SAVED), found[-1])
        ctx.numbers, ctx.outputs, ctx.needs = numbers, outputs, needs
        ctx.mark_non_differentiable(*(named[n] for n in outputs if n not in DIFFERENTIABLE))
        return tuple(found[: len(outputs)])

    @staticmethod
    @autograd.first_order
    def backward(ctx, *grads):
        upstream = dict(zip(ctx.outputs, grads))
        grads = [upstream.get(name) for name in DIFFERENTIABLE]
        args = *ctx.saved_tensors, *grads, ctx.needs, ctx.numbers
        found = torch.ops.rlhf_fast.linear_logps_node_backward(*args)
        gradients = (g if need else None for g, need in zip(found, ctx.needs))
        return None, None, *gradients, *(None,) * 3


# ---- the ops that torch's dispatcher knows -------------------------------------------------------

_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? mask, Tensor? rows"
native.LIBRARY.define(
    f"linear_logps_node({_TENSORS}, bool[] needs, float[] numbers, str[] outputs) -> Tensor[]"
)
native.LIBRARY.define(
    f"linear_logps_node_backward({_TENSORS}, Tensor reference, Tensor log_sum, Tensor entropy, "
    "Tensor(a!) kept, Tensor? grad_logps, Tensor? grad_entropy, Tensor? grad_lse, bool[] needs, "
    "float[] numbers) -> (Tensor, Tensor, Tensor)"
)


def _head(hidden, weight, bias, labels, mask, temperatures, numbers) -> tuple[HeadInputs, Head]:
    *numbers, budget_bytes = numbers
    settings = HeadSettings.from_numbers(numbers, temperatures)
    rows = prepare("linear_logps", hidden, weight, labels, bias, mask, settings)
    args = rows.labels, rows.row_temperatures, rows.scalars, int(budget_bytes), rows.logits_dtype
    return rows, Head.in_dtype_of_hidden(rows.hidden, rows.weight, rows.bias, *args)


def _kept_shape(hidden, weight, labels, needs, numbers) -> tuple[tuple[int, int], torch.dtype]:
    """Gradients per row of a frozen head, or logits."""
    count, (vocab_size, width) = labels.numel(), weight.shape
    if Needs(*needs) == FROZEN:
        return (count, width), hidden.dtype
    dtype = torch.float32 if numbers[-2] else hidden.dtype
    affordable = int(numbers[-1]) // (vocab_size * dtype.itemsize)
    return (min(affordable, count) if any(needs) else 0, vocab_size), dtype


def _forward(hidden, weight, bias, labels, mask, temperatures, needs, numbers, outputs):
    rows, head = _head(hidden, weight, bias, labels, mask, temperatures, numbers)
    (room, _), _ = _kept_shape(hidden, weight, labels, needs, numbers)
    with torch.no_grad(), matmul.fastest(head.hidden):
        names = tuple(name for name in outputs if name not in INTERNAL)
        if Needs(*needs) == FROZEN:
            statistics, gradient = forward_with_gradient(head, names)
            kept = gradient.new_zeros(room, gradient.shape[1])
            kept[: head.num_rows] = gradient
        else:
            statistics, kept = forward_keeping_logits(head, names, any(needs), room)
    return [*(rows.scatter(statistics[name]).clone() for name in outputs), kept]


def _backward(
    hidden, weight, bias, labels, mask, temperatures, reference, log_sum, entropy, kept, *rest
):
    *grads, needs, numbers = rest
    rows, head = _head(hidden, weight, bias, labels, mask, temperatures, numbers)
    statistics = dict(zip(_SAVED, map(rows.gather, (reference, log_sum, entropy))))
    grads = [None if g is None else rows.gather(g).contiguous() for g in grads]
    wanted, gradients = Needs(*needs), [None, None, None]
    with torch.no_grad(), matmul.fastest(head.hidden):
        if wanted == FROZEN:
            kept = kept[: head.num_rows]
            gradients[0] = backward_from_gradient(head, statistics, grads, kept)
        else:
            kept = kept[: head.num_kept]
            args = statistics, grads, wanted, weight.dtype, kept
            gradients = list(backward_by_columns(head, *args))
    if wanted.hidden:
        gradients[0] = rows.scatter_rows(gradients[0]).view(hidden.shape)
    empty = _empty_gradients(hidden, weight, bias, needs, numbers)
    return tuple(e if g is None else g.to(e.dtype) for g, e in zip(gradients, empty))


def _empty_outputs(hidden, weight, bias, labels, mask, temperatures, needs, numbers, outputs):
    shape, dtype = _kept_shape(hidden, weight, labels, needs, numbers)
    kinds = (torch.bool if name == "is_top1" else torch.float32 for name in outputs)
    found = [labels.new_empty(labels.shape, dtype=kind) for kind in kinds]
    return [*found, hidden.new_empty(shape, dtype=dtype)]


def _empty_gradients(hidden, weight, bias, *rest):
    """Of inputs that need none: tensors without elements."""
    pairs = zip((hidden, weight, bias), rest[-2])
    return tuple(torch.empty_like(t) if need else hidden.new_empty(0) for t, need in pairs)


for name, function, fake in (
    ("linear_logps_node", _forward, _empty_outputs),
    ("linear_logps_node_backward", _backward, _empty_gradients),
):
    native.implement(name, function)
    torch.library.register_fake(f"rlhf_fast::{name}", lib=native.LIBRARY)(fake)
