"""`policy_loss` in plain PyTorch: what each loss means, differentiated by autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.ops import sequences
from rlhf_fast.ops.aggregation import aggregate_ref
from rlhf_fast.ops.policy_params import LOSS_TYPES, PolicyLossParams


def policy_loss_ref(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss_type: str = "ppo",
    params: PolicyLossParams = PolicyLossParams(),  # noqa: B008, frozen
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the metrics by name; in float64 if logps are."""
    dtype = torch.promote_types(logps.dtype, torch.float32)
    counts = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    width = logps.shape[-1]
    if cu_seqlens is not None:
        index, inside = sequences.padded(logps, cu_seqlens)
        counts = counts[index] & inside

    def rows(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if x.dim() == 1 and x.shape != logps.shape:  # one per sequence
            return x.to(dtype)[:, None].expand(counts.shape)
        x = x if cu_seqlens is None else x[index]
        return x.to(dtype).masked_fill(~counts, 0.0)

    lp, ref, advantage = rows(logps), rows(ref_logps), rows(advantages).detach()
    old = lp.detach() if old_logps is None else rows(old_logps)
    length = counts.sum(1, keepdim=True).clamp(min=1)
    loss, aggregation = LOSS_TYPES[loss_type]
    log_is = metrics = None
    metrics = {}
    if sampling_logps is not None:
        mismatch = (old.detach() - rows(sampling_logps)).nan_to_num(0.0, 0.0, 0.0)
        log_is, kept = _sampling(params, mismatch.masked_fill(~counts, 0.0), length)
        metrics["sampling_weight"] = log_is.exp() * kept
        metrics["sampling_kl"] = -mismatch
    difference = lp - old
    x = _log_ratio(loss, params, difference, advantage, counts, length, metrics, log_is)
    if loss == "vespo" and log_is is not None:
        smallest = math.log(1e-8)
        extra = torch.where(kept, log_is.clamp(smallest, 20.0), smallest)
        x = x + extra.masked_fill(~counts, 0.0).sum(1, keepdim=True)
    bound = min(params.log_ratio_bound, 80.0)
    x = x.clamp(-bound, bound).expand_as(lp)
    token_loss = _token_loss(loss, params, x, lp, advantage, metrics)
    if sampling_logps is not None and loss != "vespo":
        token_loss = token_loss * metrics["sampling_weight"]
    if ref is not None:
        ratio_of_token = (lp - old).detach().clamp(-bound, bound).exp()
        kl, metrics["ref_kl"] = _kl(params, lp, ref, x.exp(), ratio_of_token)
        token_loss = token_loss + params.kl_coef * kl
    if entropy is not None:
        metrics["entropy"] = rows(entropy)
        token_loss = token_loss - params.entropy_coef * metrics["entropy"]
    d = difference.detach()
    metrics |= {"old_kl_k1": -d, "old_kl_k2": d.square() / 2}
    metrics["old_kl_k3"] = torch.expm1(d.clamp(-bound, bound)) - d.clamp(-bound, bound)
    metrics["ratio"] = x.exp()

    def mean(v: Tensor) -> Tensor:
        return v.detach().masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)

    metrics = {name: mean(v) for name, v in metrics.items()}
    metrics["num_tokens"] = counts.sum()
    aggregation = params.aggregation or aggregation
    max_length = params.max_length or width
    total = aggregate_ref(token_loss, counts, aggregation, max_length, normalizer)
    return total, metrics


def _sampling(params, mismatch, length):
    """Logarithm of the ratio between trainer and sampler, and where it is kept."""
    product = mismatch.sum(1, keepdim=True)
    value = product.expand_as(mismatch) if params.sampling_level == "sequence" else mismatch
    gate = product / length if params.sampling_level == "sequence-gate" else value
    low = math.log(params.sampling_low) if params.sampling_low else -math.inf
    high = math.log(params.sampling_high)
    kept = ((gate >= low) & (gate <= high)).expand_as(value)
    if params.sampling_correction == "truncate":
        return value.clamp(low, high), torch.ones_like(kept)
    return value, kept


def _log_ratio(loss, params, difference, advantage, counts, length, metrics, log_is):
    if loss == "gmpo":
        low, high = -params.epsilon_low, params.epsilon_high
        negative = advantage < 0
        difference = torch.where(negative, difference.clamp(min=low), difference.clamp(max=high))
    level = params.ratio_level
    if level is None:
        level = {
            "gspo": "sequence-mean",
            "gspo_token": "sequence-mean",
            "gmpo": "sequence-mean",
            "rloo": "sequence-sum",
            "vespo": "sequence-sum",
            "a_lol": "sequence-sum",
        }.get(loss, "token")
    if level == "token":
        return difference
    if loss == "vespo":
        difference = difference.clamp(-20.0, 20.0)
    total = difference.masked_fill(~counts, 0.0).sum(1, keepdim=True)
    return total / length if level == "sequence-mean" else total


def _token_loss(loss, params, x, lp, advantage, metrics):
    low, high = 1 - params.epsilon_low, 1 + params.epsilon_high
    ratio = x.exp()
    if loss == "reinforce":
        return -advantage * lp
    if loss == "dro":
        return -advantage * lp + params.dro_beta / 2 * x.square()
    if loss == "gmpo":
        return -advantage * ratio
    if loss == "sapo":
        temperature = torch.where(
            advantage > 0, params.sapo_temperature_pos, params.sapo_temperature_neg
        ).to(x.dtype)
        return -advantage * torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    if loss in ("dppo_tv", "dppo_kl"):
        now, before = lp.detach().exp(), (lp - x).detach().exp().clamp(max=1)
        divergence = (now - before).abs()
        if loss == "dppo_kl":
            rest, rest_now = ((1 - p).clamp(min=1e-7) for p in (before, now))
            divergence = -before * x.detach() + rest * (rest / rest_now).log()
        below = (divergence > params.epsilon_low) & (now < before)
        above = (divergence > params.epsilon_high) & (now > before)
        metrics["clip_low"] = (below & (advantage <= 0)).to(x.dtype)
        metrics["clip_high"] = (above & (advantage > 0)).to(x.dtype)
        outside = torch.where(advantage > 0, above, below)
        weight = ratio.detach()
        if params.dual_clip is not None:
            metrics["clip_dual"] = ((ratio > params.dual_clip) & ~outside).to(x.dtype)
            weight = weight.clamp(max=params.dual_clip)
        return -advantage * weight * lp.masked_fill(outside, 0.0)
    if loss in ("cispo", "a_lol"):
        metrics |= {"clip_low": (ratio < low).to(x.dtype), "clip_high": (ratio > high).to(x.dtype)}
        if loss == "a_lol":
            advantage = advantage.clamp(min=0)
        return -advantage * ratio.clamp(low, high).detach() * lp
    if loss == "vespo":
        log_w = x.detach().clamp(math.log(1e-8), 20.0)
        k = torch.where(advantage < 0, params.vespo_k_neg, params.vespo_k_pos)
        rate = torch.where(advantage < 0, params.vespo_lambda_neg, params.vespo_lambda_pos)
        return -advantage * (rate + k * log_w - rate * log_w.exp()).exp() * lp
    if loss == "gspo_token":
        ratio = ratio.detach() * (lp - lp.detach()).exp()
    metrics["clip_low"] = ((ratio < low) & (advantage < 0)).to(x.dtype)
    metrics["clip_high"] = ((ratio > high) & (advantage > 0)).to(x.dtype)
    gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if params.dual_clip is not None:
        metrics["clip_dual"] = ((ratio > params.dual_clip) & (advantage < 0)).to(x.dtype)
        bounded = torch.maximum(gain, params.dual_clip * advantage)
        gain = torch.where(advantage < 0, bounded, gain)
    return -gain


def _kl(params, lp, ref, ratio, ratio_of_token):
    delta = ref - lp
    value = {"k1": -delta, "k2": delta.square() / 2, "k3": delta.exp() - delta - 1}
    kl = estimate = value[params.kl_estimator]
    if params.kl_bound is not None:
        kl = estimate = kl.clamp(-params.kl_bound, params.kl_bound)
    if params.kl_correction == "importance":
        return kl * ratio, estimate
    if params.kl_correction != "none":
        weight = 1.0
        if params.kl_correction == "weighted-straight-through":
            weight = ratio_of_token.clamp(max=10.0)
        surrogate = weight * delta.square() / 2
        kl = kl.detach() + surrogate - surrogate.detach()
    return kl, estimate
