"""Log-probabilities of labels from hidden states: `logps` without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.ops import autograd, linear_logps_node, matmul, native
from rlhf_fast.ops.head import Head, Needs
from rlhf_fast.ops.head_frozen import backward_from_gradient, forward_with_gradient
from rlhf_fast.ops.head_inputs import HeadSettings, outside_of_node, prepare
from rlhf_fast.ops.head_recompute import backward_by_columns, forward_keeping_logits
from rlhf_fast.ops.logps_kernels import INTERNAL
from rlhf_fast.ops.logps_ref import DIFFERENTIABLE, LogpsOutput, logps_ref


@native.takes_tensors
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    outputs: tuple[str, ...] = ("logps",),
    logits_budget_bytes: int = 256 << 20,
    logits_dtype: torch.dtype | None = None,
) -> LogpsOutput:
    """Log-probability of each label under softmax(hidden @ weight.T + bias), chunk by chunk.

    Equivalent to `logps(F.linear(hidden, weight, bias), labels, ...)`, with 0 in every output of a
    row that is masked or ignored: such rows cost nothing. Products run in the autocast dtype, else
    in that of `hidden`; everything else accumulates in float32.

    With N live rows, a product over all of them costs 2NVD operations. Forward takes one. Backward
    takes one for `hidden` and one for `weight`, as each needs a gradient, and one more for rows
    beyond the logits budget, whose logits are computed again. With a frozen weight and bias forward
    takes two and backward none, whatever the budget.

    Args:
        hidden: (..., D), float32, float16 or bfloat16.
        weight: (V, D), also a DTensor: it is gathered, its gradient summed over the ranks.
        labels: (...) int32 or int64; each row is judged by its own, nothing is shifted.
        bias: (V,).
        temperature: divides the logits; one number, or a tensor (...) with one for each row.
        softcap: replaces z by `softcap * tanh(z / softcap)`, before the temperature.
        logit_scale: multiplies the logits, before the softcap.
        ignore_index: label of rows that do not count.
        mask: (...) bool; False where a row does not count.
        outputs: the fields of `LogpsOutput` to compute. logps, entropy and lse pass gradients.
        logits_budget_bytes: logits to keep for backward; 0 keeps none.
        logits_dtype: torch.float32 keeps the logits of 16-bit inputs from being rounded to 16 bits.
            They take twice the memory; on a CPU their product also takes twice the time.

    Raises:
        ValueError: for shapes, dtypes or settings that do not fit, and on the CPU for labels
            outside the vocabulary. On CUDA such labels count as ignored; with RLHF_FAST_DEBUG=1
            they raise there too.
    """
    settings = HeadSettings(temperature, softcap, logit_scale, ignore_index, logits_dtype)
    if torch.compiler.is_compiling():
        head = outside_of_node(hidden, weight, bias)
        tensors = *head, labels, mask, settings.row_temperatures()
        numbers = [*settings.numbers(), float(logits_budget_bytes)]
        return LogpsOutput(**dict(zip(outputs, linear_logps_node.call(tensors, numbers, outputs))))
    rows = prepare("linear_logps", hidden, weight, labels, bias, mask, settings, outputs)
    results = _LinearLogps.apply(
        rows.hidden,
        rows.weight,
        rows.bias,
        rows.labels,
        rows.row_temperatures,
        rows.scalars,
        logits_budget_bytes,
        rows.logits_dtype,
        tuple(outputs),
    )
    return LogpsOutput(**{name: rows.scatter(out) for name, out in zip(outputs, results)})


def linear_logps_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    logits_budget_bytes: int = 0,
    logits_dtype: torch.dtype | None = None,
    **settings,
) -> LogpsOutput:
    """What `linear_logps` computes, in plain PyTorch, with all logits."""
    live = labels != ignore_index
    if mask is not None:
        live = live & mask
    labels = labels.masked_fill(~live, ignore_index)
    if logits_dtype is not None and hidden.dtype != torch.float64:
        hidden, weight = hidden.to(logits_dtype), weight.to(logits_dtype)
        bias = None if bias is None else bias.to(logits_dtype)
    logits = F.linear(hidden, weight, bias)
    everything = logps_ref(logits, labels, ignore_index=ignore_index, **settings)
    return LogpsOutput(*(None if t is None else t.masked_fill(~live, 0) for t in everything))


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, *args):
        *args, outputs = args
        needs = Needs(*ctx.needs_input_grad[:3])
        head = Head.in_dtype_of_hidden(hidden, weight, bias, *args)
        ctx.is_frozen = needs.hidden and not (needs.weight or needs.bias)
        with matmul.fastest(head.hidden):
            if ctx.is_frozen:
                statistics, kept = forward_with_gradient(head, outputs)
            else:
                statistics, kept = forward_keeping_logits(head, outputs, any(needs))
        ctx.needs, ctx.outputs = needs, outputs
        ctx.settings = (head.scalars, head.budget_bytes, head.logits_dtype)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.overwritten = False
        saved = [statistics.get(name) for name in (*INTERNAL, "entropy")]
        ctx.save_for_backward(
            head.hidden, head.weight, head.bias, head.labels, head.row_temperatures, *saved, kept
        )
        ctx.set_materialize_grads(False)
        constant = [statistics[name] for name in outputs if name not in DIFFERENTIABLE]
        ctx.mark_non_differentiable(*constant)
        return tuple(statistics[name] for name in outputs)

    @staticmethod
    @autograd.first_order
    def backward(ctx, *grads):
        if ctx.overwritten:
            raise RuntimeError(
                "linear_logps: backward must run once when it overwrites kept logits, got a second "
                "call; set logits_budget_bytes=0"
            )
        *tensors, reference, log_sum, entropy, kept = ctx.saved_tensors
        head = Head(*tensors, *ctx.settings)
        statistics = {"reference": reference, "log_sum": log_sum}
        if entropy is not None:
            statistics["entropy"] = entropy
        upstream = dict(zip(ctx.outputs, grads))
        grads = [upstream.get(name) for name in DIFFERENTIABLE]
        with matmul.fastest(head.hidden):
            if ctx.is_frozen:
                d_hidden = backward_from_gradient(head, statistics, grads, kept)
                found = (d_hidden, None, None)
            else:
                ctx.overwritten = kept.shape[0] > 0
                dtype = ctx.dtypes[1]
                found = backward_by_columns(head, statistics, grads, ctx.needs, dtype, kept)
        found = (None if g is None else g.to(dtype) for g, dtype in zip(found, ctx.dtypes))
        return *found, *(None,) * 6
