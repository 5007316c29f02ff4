"""Log-probabilities of labels from logits, with statistics of the same distribution."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import native
from rlhf_fast.ops.truncation import thresholds

MAX_LABELS_PER_ROW = 512
DIFFERENTIABLE = ("logps", "entropy", "lse")


class LogpsOutput(NamedTuple):
    """What `logps` returns; None where an output was not asked for."""

    logps: Tensor | None = None
    """Log-probability of each label, shaped like the labels; 0 where the label is ignored."""
    entropy: Tensor | None = None
    """Entropy of each row in nats."""
    lse: Tensor | None = None
    """log(sum(exp(z))) of each row."""
    sum_p2: Tensor | None = None
    """Sum of squared probabilities of each row (its inverse: the effective number of choices)."""
    mean_logit: Tensor | None = None
    """Mean of z over the vocabulary, for each row."""
    is_top1: Tensor | None = None
    """Whether each label is the most probable entry; among equals the first counts. bool."""


OUTPUTS = LogpsOutput._fields
INTERNAL = ("reference", "log_sum")  # lse in two parts, kept for backward
KERNEL_ORDER = ("lse", "logps", "entropy", "sum_p2", "mean_logit", "is_top1")


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
        labels: (...) int32 or int64, or (..., K) for up to 512 labels of every row.
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
    row_temperatures = _check(logits, labels, temperature, softcap, logit_scale, outputs)
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
            not _overlaps(logits),
            "logps",
            "logits must not overlap themselves when backward overwrites them",
            f"strides {logits.stride()}",
            "leave inplace_backward off",
        )
    labels = labels.contiguous()
    if logits.requires_grad and torch.is_grad_enabled():
        options = (row_thresholds, tuple(outputs), inplace_backward)
        results = _Logps.apply(logits, labels, *settings, *options)
    else:
        results = torch.ops.rlhf_fast.logps_forward(
            logits, labels, *settings, list(outputs), row_thresholds=row_thresholds
        )
    return LogpsOutput(**dict(zip(outputs, results)))


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
    row_temperatures = _check(logits, labels, temperature, softcap, logit_scale, outputs)
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
        not _overlaps(logits) and not (logits.requires_grad and torch.is_grad_enabled()),
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
    )
    return LogpsOutput(**{name: t for name, t in zip(OUTPUTS, results) if name in outputs})


def logps_ref(
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
    """What `logps` computes, in plain PyTorch: float64 logits are computed in float64."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    z = logits.to(dtype) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).expand(logits.shape[:-1])[..., None]
    z = z / temperature
    if top_k is not None:
        kth = z.topk(min(top_k, z.shape[-1]), dim=-1).values[..., -1:]
        z = z.masked_fill(z < kth, -torch.inf)
    if top_p is not None:
        ordered = z.sort(dim=-1, descending=True).values
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # what the larger ones have together
        least = ordered.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
        z = z.masked_fill(z < least, -torch.inf)
    log_probs = torch.log_softmax(z, dim=-1)
    probs = log_probs.exp()

    many = labels.dim() == logits.dim()
    index = (labels if many else labels[..., None]).long()
    ignored = index == ignore_index
    chosen = log_probs.gather(-1, index.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)
    is_top1 = logits.argmax(-1, keepdim=True) == index
    everything = LogpsOutput(
        logps=chosen if many else chosen[..., 0],
        entropy=-(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1),
        lse=torch.logsumexp(z, dim=-1),
        sum_p2=probs.square().sum(-1),
        mean_logit=z.mean(-1),
        is_top1=is_top1 if many else is_top1[..., 0],
    )
    return LogpsOutput(**{name: getattr(everything, name) for name in outputs})


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
    @torch.autograd.function.once_differentiable
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


# ---- the ops that torch's dispatcher knows -------------------------------------------------------

_INPUTS = (
    "Tensor labels, Tensor? row_temperatures, float temperature, float softcap, "
    "float logit_scale, int ignore_index"
)
_GRADS = (
    "Tensor reference, Tensor log_sum, Tensor? entropy, "
    "Tensor? grad_logps, Tensor? grad_entropy, Tensor? grad_lse"
)
_OPTIONS = "*, Tensor? row_thresholds=None"
native.LIBRARY.define(
    f"logps_forward(Tensor logits, {_INPUTS}, str[] outputs, {_OPTIONS}) -> Tensor[]"
)
native.LIBRARY.define(f"logps_backward(Tensor logits, {_INPUTS}, {_GRADS}, {_OPTIONS}) -> Tensor")
native.LIBRARY.define(f"logps_backward_(Tensor(a!) logits, {_INPUTS}, {_GRADS}, {_OPTIONS}) -> ()")
native.LIBRARY.define(
    # Functionalisation takes no list from an op that mutates: all outputs, some of them empty.
    f"logps_with_grad_(Tensor(a!) logits, {_INPUTS}, str[] outputs, Tensor? grad_logps, "
    f"Tensor? grad_entropy) -> ({', '.join(['Tensor'] * len((*OUTPUTS, *INTERNAL)))})"
)


def _empty_outputs(logits: Tensor, labels: Tensor, outputs: list[str]) -> dict[str, Tensor]:
    shapes = {"logps": labels.shape, "is_top1": labels.shape}
    return {
        name: logits.new_empty(
            shapes.get(name, logits.shape[:-1]),
            dtype=torch.bool if name == "is_top1" else torch.float32,
        )
        for name in outputs
    }


def _inputs(
    logits,
    labels,
    row_temperatures,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    row_thresholds,
):
    return (
        native.rows(logits),
        labels.data_ptr(),
        labels.dtype == torch.int32,
        labels.shape[-1] if labels.dim() == logits.dim() else 1,
        ignore_index,
        logit_scale,
        softcap,
        temperature,
        native.address(row_temperatures),
        native.address(row_thresholds),
    )


def _forward(logits, labels, *args, row_thresholds=None):
    *settings, outputs = args
    results = _empty_outputs(logits, labels, outputs)
    if labels.numel() == 0:
        return list(results.values())
    if logits.is_cuda and native.debug():
        _check_values(logits, labels, settings[0], settings[-1])
    named = _empty_outputs(logits, labels, list(INTERNAL)) | results
    module, *where = native.target(logits)
    module.logps_forward(
        *where,
        *_inputs(logits, labels, *settings, row_thresholds),
        *(native.address(named.get(name)) for name in (*INTERNAL, *KERNEL_ORDER)),
    )
    return list(results.values())


def _backward_into(
    grad_logits: Tensor, logits: Tensor, labels: Tensor, *args, row_thresholds=None
) -> None:
    if labels.numel() == 0:
        grad_logits.zero_()
        return
    settings = args[:5]
    # Upstream gradients are as small as the labels; an expanded one (from a sum) gets its storage.
    kept = [None if t is None else t.float().contiguous() for t in args[5:]]
    module, *where = native.target(logits)
    module.logps_backward(
        *where,
        *_inputs(logits, labels, *settings, row_thresholds),
        *map(native.address, kept),
        native.rows(grad_logits),
    )


def _backward(logits, labels, *args, **options):
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward_into(grad_logits, logits, labels, *args, **options)
    return grad_logits


def _backward_(logits, labels, *args, **options):
    _backward_into(logits, logits, labels, *args, **options)
    torch.autograd.graph.increment_version(logits)


def _with_absent(logits: Tensor, results: dict[str, Tensor]) -> tuple[Tensor, ...]:
    names = (*OUTPUTS, *INTERNAL)
    return tuple(results[n] if n in results else logits.new_empty(0) for n in names)


def _with_grad_(logits, labels, *args):
    *settings, outputs, grad_logps, grad_entropy = args
    results = _empty_outputs(logits, labels, outputs)
    everything = _with_absent(logits, results)
    if labels.numel() == 0:
        return everything
    if logits.is_cuda and native.debug():
        _check_values(logits, labels, settings[0], settings[-1])
    needed = (*INTERNAL, *(() if grad_entropy is None else ("entropy",)))
    named = _empty_outputs(logits, labels, list(needed)) | results
    kept = [None if t is None else t.float().contiguous() for t in (grad_logps, grad_entropy, None)]
    module, *where = native.target(logits)
    module.logps_with_grad(
        *where,
        *_inputs(logits, labels, *settings, None),
        *(native.address(named.get(name)) for name in (*INTERNAL, *KERNEL_ORDER)),
        *map(native.address, kept),
    )
    torch.autograd.graph.increment_version(logits)
    return everything


native.implement("logps_forward", _forward)
native.implement("logps_backward", _backward)
native.implement("logps_backward_", _backward_)
native.implement("logps_with_grad_", _with_grad_)


@torch.library.register_fake("rlhf_fast::logps_forward", lib=native.LIBRARY)
def _(logits, labels, *args, **options):
    return list(_empty_outputs(logits, labels, args[-1]).values())


@torch.library.register_fake("rlhf_fast::logps_backward", lib=native.LIBRARY)
def _(logits, labels, *args, **options):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.register_fake("rlhf_fast::logps_backward_", lib=native.LIBRARY)
def _(logits, labels, *args, **options):
    return None


@torch.library.register_fake("rlhf_fast::logps_with_grad_", lib=native.LIBRARY)
def _(logits, labels, *args):
    return _with_absent(logits, _empty_outputs(logits, labels, args[-3]))


# ---- checks --------------------------------------------------------------------------------------


def _overlaps(logits: Tensor) -> bool:
    rows = zip(logits.shape[:-1], logits.stride()[:-1])
    return any(n > 1 and stride < logits.shape[-1] for n, stride in rows)


def _check(logits, labels, temperature, softcap, logit_scale, outputs) -> Tensor | None:
    """Refuses what does not fit; returns temperatures as one float32 per row, if they vary."""
    op, shape = "logps", tuple(logits.shape)
    native.check_rows(op, "logits", logits)
    native.check(
        labels.dtype in (torch.int32, torch.int64),
        op,
        "labels must be int32 or int64",
        labels.dtype,
        "convert them with labels.long()",
    )
    many = labels.dim() == logits.dim()
    native.check(
        labels.shape[: logits.dim() - 1] == logits.shape[:-1] and labels.dim() <= logits.dim(),
        op,
        f"labels must have shape {shape[:-1]} or {(*shape[:-1], 'K')} for logits {shape}",
        tuple(labels.shape),
        "shift or reshape the labels to match",
    )
    native.check(
        not many or 1 <= labels.shape[-1] <= MAX_LABELS_PER_ROW,
        op,
        f"there must be 1 to {MAX_LABELS_PER_ROW} labels per row",
        tuple(labels.shape),
        "split them over several calls",
    )
    native.check(
        labels.device == logits.device,
        op,
        f"labels must be on the logits' device {logits.device}",
        labels.device,
        "move them",
    )
    check_settings(op, softcap, logit_scale, outputs)
    return temperature_per_row(op, temperature, logits.shape[:-1], logits.device)


def check_settings(op, softcap, logit_scale, outputs) -> None:
    native.check(
        len(outputs) > 0 and len(set(outputs)) == len(outputs) and set(outputs) <= set(OUTPUTS),
        op,
        f"outputs must name some of {OUTPUTS}, each once",
        tuple(outputs),
        "see LogpsOutput",
    )
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        native.check(
            value is None or (value > 0 and math.isfinite(value)),
            op,
            f"{name} must be positive and finite",
            value,
            "leave it out to switch it off",
        )


def temperature_per_row(op, temperature, shape, device) -> Tensor | None:
    """Temperatures as one float32 per row; None for a number, which holds for all."""
    if not isinstance(temperature, Tensor):
        native.check(
            temperature > 0 and math.isfinite(temperature),
            op,
            "temperature must be positive and finite",
            temperature,
            "greedy decoding has no log-probs; use the temperature that the trainer assumes",
        )
        return None
    native.check(
        not temperature.requires_grad and temperature.device == device,
        op,
        f"temperatures must be constants on {device}",
        f"requires_grad={temperature.requires_grad} on {temperature.device}",
        "detach or move them",
    )
    try:
        expanded = temperature.expand(shape)
    except RuntimeError:
        expanded = None
    native.check(
        expanded is not None,
        op,
        f"temperatures must be one number or have shape {tuple(shape)}",
        tuple(temperature.shape),
        "give one value per row",
    )
    return expanded.float().contiguous()


def _check_values(logits, labels, row_temperatures, ignore_index) -> None:
    good = (labels == ignore_index) | ((labels >= 0) & (labels < logits.shape[-1]))
    native.check(
        bool(good.all()),
        "logps",
        f"labels must lie in [0, {logits.shape[-1]}) or be {ignore_index} (ignored)",
        labels[~good][:4].tolist(),
        "check that labels and logits come from the same tokenizer and model",
    )
    native.check(
        row_temperatures is None or bool((row_temperatures > 0).all()),
        "logps",
        "temperatures must be positive",
        "one that is not",
        "use the temperature that the trainer assumes",
    )
