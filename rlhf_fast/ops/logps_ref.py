"""What `logps` returns, and what that means in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
DIFFERENTIABLE = ("logps", "entropy", "lse")


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
