"""Log-probabilities of labels from logits, with statistics of the same distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops import autograd, native
from rlhf_fast.ops.logps_inputs import check_inputs, overlaps_itself
from rlhf_fast.ops.logps_kernels import INTERNAL
from rlhf_fast.ops.logps_ref import DIFFERENTIABLE, OUTPUTS, LogpsOutput
from rlhf_fast.ops.truncation import thresholds


@native.takes_tensors
def logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    top_k: int | None = None,
    top_p: float | None = None,
    outputs: tuple[str, ...] = ("logps",),
    inplace_backward: bool = False,
) -> LogpsOutput:
    """Log-probability of each label under softmax(logits), in one read of the logits.

    Equivalent to `torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]`,
    without the intermediate: nothing of the logits' size is allocated in forward, and in backward
    only the gradient, or nothing with `inplace_backward`. Accumulates in float32.

    Args:
        logits: (..., V), float32, float16 or bfloat16; rows may be strided (`logits[:, :-1]`).
        labels: (...) int32 or int64, or (..., K) for up to 512 labels of every row; each row is
            judged by its own label, nothing is shifted.
        temperature: divides the logits; one number, or a tensor (...) with one for each row.
        softcap: replaces z by `softcap * tanh(z / softcap)`, before the temperature.
        logit_scale: multiplies the logits, before the softcap.
        ignore_index: rows with this label get log-prob 0 and pass no gradient for it.
        top_k: renormalises over the k largest logits of each row, and others equal to the least.
        top_p: then over the fewest of the largest that together reach this probability. A label
            outside gets log-prob -inf and passes no gradient. Costs a sort of every row.
        outputs: the fields of `LogpsOutput` to compute. logps, entropy and lse pass gradients.
        inplace_backward: writes the gradient over the logits, which are then lost; whoever still
            needs them, and a second backward, gets an error.

    Raises:
        ValueError: for shapes, dtypes or settings that do not fit, and on the CPU for labels
            outside the vocabulary. On CUDA such labels count as ignored; with RLHF_FAST_DEBUG=1
            they raise there too.
    """
    row_temperatures = check_inputs(logits, labels, temperature, softcap, logit_scale, outputs)
    row_thresholds = None
    if top_k is not None or top_p is not None:
        native.check(
            "mean_logit" not in outputs,
            "logps",
            "mean_logit must not be asked of a truncated distribution, whose logits are -inf",
            tuple(outputs),
            "leave it out, or top_k and top_p",
        )
        row_thresholds = thresholds(
            logits,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            top_k=top_k,
            top_p=top_p,
        )
    settings = (
        row_temperatures,
        1.0 if row_temperatures is not None else float(temperature),
        float(softcap or 0.0),
        float(logit_scale),
        ignore_index,
    )
    if inplace_backward:
        native.check(
            not overlaps_itself(logits),
            "logps",
            "logits must not overlap themselves when backward overwrites them",
            f"strides {logits.stride()}",
            "leave inplace_backward off",
        )
    labels = labels.contiguous()
    if autograd.wants_gradient(logits):
        options = (row_thresholds, tuple(outputs), inplace_backward)
        results = _Logps.apply(logits, labels, *settings, *options)
    else:
        results = torch.ops.rlhf_fast.logps_forward(
            logits, labels, *settings, list(outputs), row_thresholds=row_thresholds
        )
    return LogpsOutput(**dict(zip(outputs, results)))


@native.takes_tensors
def logps_with_grad_(
    logits: Tensor,
    labels: Tensor,
    grad_logps: Tensor,
    *,
    grad_entropy: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logps",),
) -> LogpsOutput:
    """Log-probs, and the gradient of `(grad_logps * logps).sum()` written over the logits.

    Equivalent to `logps` followed by its backward, for losses whose weight of each label is known
    before its log-prob: cross-entropy, or the head of a frozen vocabulary. The logits are read
    once and written once; nothing of their size is allocated. Not differentiable itself.

    Args:
        grad_logps: float32, shaped like the labels.
        grad_entropy: (...) float32: adds the gradient of `(grad_entropy * entropy).sum()`.

    The other arguments are those of `logps`, which also raises the same errors.
    """
    row_temperatures = check_inputs(logits, labels, temperature, softcap, logit_scale, outputs)
    for name, given, shape in (
        ("grad_logps", grad_logps, labels.shape),
        ("grad_entropy", grad_entropy, logits.shape[:-1]),
    ):
        native.check(
            given is None or (given.shape == shape and given.device == logits.device),
            "logps_with_grad_",
            f"{name} must have shape {tuple(shape)} on {logits.device}",
            given if given is None else f"{tuple(given.shape)} on {given.device}",
            "reshape or move it",
        )
    native.check(
        not overlaps_itself(logits) and not autograd.wants_gradient(logits),
        "logps_with_grad_",
        "logits must be constants that do not overlap themselves",
        f"requires_grad={logits.requires_grad}, strides {logits.stride()}",
        "detach them, or use logps",
    )
    results = torch.ops.rlhf_fast.logps_with_grad_(
        logits,
        labels.contiguous(),
        row_temperatures,
        1.0 if row_temperatures is not None else float(temperature),
        float(softcap or 0.0),
        float(logit_scale),
        ignore_index,
        list(outputs),
        grad_logps,
        grad_entropy,
        None,
    )
    return LogpsOutput(**{name: t for name, t in zip(OUTPUTS, results) if name in outputs})


class _Logps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, *args):
        *settings, row_thresholds, outputs, inplace_backward = args
        names = (*outputs, *INTERNAL)
        results = torch.ops.rlhf_fast.logps_forward(
            logits, labels, *settings, list(names), row_thresholds=row_thresholds
        )
        named = dict(zip(names, results))
        saved = (named.get(name) for name in (*INTERNAL, "entropy"))
        ctx.save_for_backward(logits, labels, settings[0], row_thresholds, *saved)
        ctx.settings = settings[1:]
        ctx.outputs = outputs
        ctx.inplace_backward = inplace_backward
        ctx.overwritten = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(named[n] for n in outputs if n not in DIFFERENTIABLE))
        return tuple(results[: len(outputs)])

    @staticmethod
    @autograd.first_order
    def backward(ctx, *grads):
        if ctx.overwritten:
            raise RuntimeError(
                "logps: backward must run once when it overwrites the logits, got a second call; "
                "leave inplace_backward off"
            )
        logits, labels, row_temperatures, row_thresholds, *saved = ctx.saved_tensors
        upstream = dict(zip(ctx.outputs, grads))
        grads = (upstream.get(name) for name in DIFFERENTIABLE)
        args = (row_temperatures, *ctx.settings, *saved, *grads)
        options = {"row_thresholds": row_thresholds}
        if ctx.inplace_backward:
            ctx.overwritten = True
            torch.ops.rlhf_fast.logps_backward_(logits, labels, *args, **options)
            grad_logits = logits.detach()
        else:
            grad_logits = torch.ops.rlhf_fast.logps_backward(logits, labels, *args, **options)
        return grad_logits, *(None,) * 9
