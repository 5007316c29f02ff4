"""A scalar loss of log-probs through the head in one pass: its gradient is taken in forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_fast.memory import on_huge_pages
from rlhf_fast.ops import autograd, matmul
from rlhf_fast.ops.head import (
    MAX_ROUNDINGS,
    Grads,
    Head,
    Needs,
    Statistics,
    live_rows,
    move_to_front_,
    pick,
    pick_grads,
)
from rlhf_fast.ops.head_frozen import backward_from_gradient, forward_with_gradient
from rlhf_fast.ops.head_inputs import HeadInputs
from rlhf_fast.ops.head_recompute import backward_by_columns, forward_keeping_logits
from rlhf_fast.ops.matmul import add_product, sum_products

FROZEN = Needs(hidden=True, weight=False, bias=False)
Loss = Callable[[Statistics, slice], Tensor]
"""(statistics of the live rows of some units, the units) -> their part of the loss, differentiable
in logps and entropy. A unit is a row, or a sequence or pair that needs to be seen whole. The parts
add up to the loss: any normaliser is fixed before."""


def head_loss(
    rows: HeadInputs,
    loss: Loss,
    outputs: tuple[str, ...],
    budget_bytes: int,
    bounds: list[int] | None = None,
) -> tuple[Tensor, Statistics]:
    """The loss, and the statistics it saw: one per row, without gradient.

    Three products of 2NVD each, of which a frozen hidden or weight saves one: a chunk's logits are
    computed once, the loss turns its log-probs into coefficients, these turn the logits into their
    gradient in place. Rows with coefficient 0 take part in the first product only (on the CPU).
    The gradient is that of the bare loss: a scale that keeps float16 from underflow comes too late.

    Args:
        outputs: the fields of `LogpsOutput` that the loss reads, logps among them.
        budget_bytes: logits to hold at a time, where the weight's gradient is wanted. When all
            fit, it is one product; else it is summed over chunks, in float32 if the budget has room
            or for more than 16 chunks, as a 16-bit sum is rounded after each.
        bounds: where units begin, then the number of live rows; None: every row is a unit. Where
            one is longer than a chunk, the logits that the budget cannot hold are computed a
            second time for the gradient: a fourth product, on these rows.
    """
    args = (rows.labels, rows.row_temperatures, rows.scalars, budget_bytes, rows.logits_dtype)
    total, *values = _HeadLoss.apply(
        rows.hidden, rows.weight, rows.bias, *args, loss, outputs, bounds
    )
    return total, dict(zip(outputs, values))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, *args):
        *args, loss, outputs, bounds = args
        needs = Needs(*ctx.needs_input_grad[:3])
        head = Head.in_dtype_of_hidden(hidden, weight, bias, *args)
        with matmul.fastest(head.hidden):
            chunks = _chunks(head, needs, weight.dtype, bounds)
            if chunks is None:
                num_units = head.num_rows if bounds is None else len(bounds) - 1
                work = head, needs, weight.dtype, loss, outputs
                total, statistics, found = _loss_first(*work, num_units)
            else:
                one_pass = _OnePass(head, needs, weight.dtype, loss, outputs, len(chunks))
                one_pass.run(chunks)
                total, statistics, sums = one_pass.total, one_pass.statistics, one_pass.gradients
                found = (sums.hidden, sums.weight, sums.bias)
        ctx.save_for_backward(
            *(None if g is None else g.to(t.dtype) for g, t in zip(found, (hidden, weight, bias)))
        )
        ctx.consumed = False
        values = [statistics[name] for name in outputs]
        ctx.mark_non_differentiable(*values)
        return total, *values

    @staticmethod
    @autograd.first_order
    def backward(ctx, grad_loss, *_):
        if ctx.consumed:
            raise RuntimeError(
                "linear loss: backward must run once, as it scales the gradient in place, got a "
                "second call; compute the loss again"
            )
        ctx.consumed = True
        found = ctx.saved_tensors
        # Asking a GPU whether the factor is 1 would wait for it; the CPU saves a pass.
        if grad_loss.is_cuda or grad_loss != 1:
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return *found, *(None,) * 8


def _chunks(
    head: Head, needs: Needs, dtype: torch.dtype, bounds: list[int] | None
) -> list[tuple[slice, slice]] | None:
    """(units, their rows) of each chunk; None where the loss of all rows is better taken first.

    That is where a unit is longer than a chunk, or chunks are small; where no gradient is wanted;
    and where units have a frozen head: gradients can be stored per row, and no chunk holds units.
    """
    if not any(needs) or (needs == FROZEN and bounds is not None):
        return None
    longest = 1 if bounds is None else max((b - a for a, b in zip(bounds, bounds[1:])), default=0)
    sum_bytes = 4 * head.weight.numel() if _may_be_rounded(head, needs, dtype) else 0
    size = head.chunk_rows(whole=needs.weight, unit=longest, sum_rows=sum_bytes // head.row_bytes)
    if longest > size or head.takes_columns(size, 2 if needs == FROZEN else 3):
        return None
    if bounds is None:
        return [(rows, rows) for rows in head.chunks(size=size)]
    return _join_units(bounds, size)


def _may_be_rounded(head: Head, needs: Needs, dtype: torch.dtype) -> bool:
    """Whether the budget lacks room for a sum in float32 of the weight's gradient."""
    has_room = 4 * head.weight.numel() <= head.budget_bytes
    return needs.weight and dtype == head.hidden.dtype != torch.float32 and not has_room


def _loss_first(
    head: Head,
    needs: Needs,
    dtype: torch.dtype,
    loss: Loss,
    outputs: tuple[str, ...],
    num_units: int,
) -> tuple[Tensor, Statistics, Sequence[Tensor | None]]:
    """The loss of all rows, then its gradient: from kept or recomputed logits, or stored ones."""
    is_frozen, gradients = needs == FROZEN, (None, None, None)
    if is_frozen:
        statistics, kept = forward_with_gradient(head, outputs)
    else:
        statistics, kept = forward_keeping_logits(head, outputs, any(needs))
    seen, units = {name: statistics[name] for name in outputs}, slice(0, num_units)
    if not any(needs):
        return loss(seen, units), statistics, gradients
    total, grads = _differentiate(loss, seen, units)
    if is_frozen:
        gradients = backward_from_gradient(head, statistics, grads, kept), None, None
    else:
        gradients = backward_by_columns(head, statistics, grads, needs, dtype, kept)
    return total, statistics, gradients


def _differentiate(loss: Loss, seen: Statistics, units: slice) -> tuple[Tensor, Grads]:
    """The loss of some units, and its gradients with respect to logps, entropy, lse."""
    seen = {name: value.clone() for name, value in seen.items()}
    leaves = {n: seen[n].requires_grad_() for n in ("logps", "entropy") if n in seen}
    with torch.enable_grad():
        value = loss(seen, units)
    if not value.requires_grad:
        return value, [None, None, None]
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    named = dict(zip(leaves, found))
    return value.detach(), [named.get("logps"), named.get("entropy"), None]


class _OnePass:
    """The loop over chunks, and what it gathers."""

    def __init__(
        self,
        head: Head,
        needs: Needs,
        dtype: torch.dtype,
        loss: Loss,
        outputs: tuple[str, ...],
        num_chunks: int,
    ) -> None:
        self.head, self.loss, self.outputs = head, loss, outputs
        self.gradients = HeadGradients(head, needs, dtype, num_chunks)
        self.total = head.hidden.new_zeros((), dtype=torch.float32)
        self.statistics = head.select(slice(0, 0)).statistics(head.buffer(0), outputs)
        self.statistics = {
            name: torch.zeros(head.num_rows, dtype=t.dtype, device=t.device)
            for name, t in self.statistics.items()
        }

    def run(self, chunks: list[tuple[slice, slice]]) -> None:
        longest = max((rows.stop - rows.start for _, rows in chunks), default=0)
        buffer = self.head.buffer(longest)
        for units, rows in chunks:
            logits = buffer[: rows.stop - rows.start]
            self._forward(rows, logits)
            seen = {name: self.statistics[name][rows] for name in self.outputs}
            part, grads = _differentiate(self.loss, seen, units)
            self.total += part
            self._backward(rows, logits, grads)

    def _forward(self, rows: slice, logits: Tensor) -> None:
        part = self.head.select(rows)
        for name, value in part.statistics(part.logits(logits), self.outputs).items():
            self.statistics[name][rows] = value

    def _backward(self, rows: slice, logits: Tensor, grads: Grads) -> None:
        where: slice | Tensor = rows
        if (live := live_rows(grads, logits)) is not None:
            if len(live) == 0:
                return
            order = move_to_front_(logits, live)
            logits, where = logits[: len(order)], order + rows.start
            grads = pick_grads(grads, order)
        self.head.select(where).differentiate_(logits, pick(self.statistics, where), grads)
        self.gradients.add(logits, where)


class HeadGradients:
    """Gradients of hidden, weight and bias, summed over chunks of rows; None where not needed."""

    def __init__(self, head: Head, needs: Needs, dtype: torch.dtype, num_products: int) -> None:
        """`num_products`: how many the weight's gradient, of `dtype`, is the sum of."""
        self.head, self.single = head, num_products <= 1
        self.weight_for_hidden = head.weight_for_hidden() if needs.hidden else None
        self.hidden = torch.zeros_like(head.hidden) if needs.hidden else None
        is_rounded = num_products <= MAX_ROUNDINGS and _may_be_rounded(head, needs, dtype)
        dtype = dtype if self.single or is_rounded else torch.float32
        self.weight = None
        if needs.weight:
            self.weight = on_huge_pages(torch.empty_like(head.weight, dtype=dtype)).zero_()
        self.bias = head.labels.new_zeros(head.vocab_size, dtype=torch.float32)
        self.bias = self.bias if needs.bias else None

    def add(self, dlogits: Tensor, rows: slice | Tensor) -> None:
        hidden, dlogits = self.head.hidden[rows], self.head.as_operand(dlogits)
        if self.hidden is not None:
            self.hidden[rows] = dlogits @ self.weight_for_hidden
        if self.weight is not None and self.single:
            sum_products(self.weight, [(dlogits.t(), hidden)])
        elif self.weight is not None:
            add_product(self.weight, dlogits.t(), hidden)
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=torch.float32)


def _join_units(bounds: list[int], size: int) -> list[tuple[slice, slice]]:
    """(units, their rows): neighbours joined as long as they fit into a chunk."""
    groups: list[tuple[slice, slice]] = []
    for unit, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if groups and stop - groups[-1][1].start <= size:
            units, rows = groups[-1]
            groups[-1] = slice(units.start, unit + 1), slice(rows.start, stop)
        else:
            groups.append((slice(unit, unit + 1), slice(start, stop)))
    return groups
