"""Policy-gradient losses of token log-probabilities: value, gradient and metrics in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import native, sequences
from rlhf_fast.ops.policy_params import LOSS_TYPES, PolicyLossParams

PolicyMetrics = NamedTuple("PolicyMetrics", [(name, Tensor) for name in native.POLICY_METRICS])
PolicyMetrics.__doc__ = """Means over the tokens that count, 0-dim float32, and `num_tokens`.

clip_low, clip_high, clip_dual: share cut off at a bound; ratio: to the old policy, at the loss's
level; old_kl_k1, _k2, _k3: estimates of KL(old policy || policy); ref_kl: the chosen estimate of
KL(policy || reference); entropy; sampling_weight, sampling_clipped, sampling_kl: the correction for
the sampler, the share it cut off, and the k1 estimate of KL(sampler || old policy).
"""


class PolicyLossOutput(NamedTuple):
    loss: Tensor
    """0-dim float32; differentiable in logps and entropy."""
    metrics: PolicyMetrics


class PolicyLossCoefficients(NamedTuple):
    """A loss with its gradient already taken; nothing here is part of a graph."""

    loss: Tensor
    d_logps: Tensor
    """float32, shaped like logps: d loss / d logps."""
    d_entropy: Tensor | None
    """The same for entropy, which may be None."""
    metrics: PolicyMetrics


def policy_loss(
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
) -> PolicyLossOutput:
    """A policy-gradient loss of a batch, to be minimised.

    Equivalent, for ppo, to `ratio = exp(logps - old_logps); -min(ratio * A, clip(ratio) * A)` plus
    `kl_coef * kl - entropy_coef * entropy`, aggregated over the tokens that count. The gradient is
    computed with the loss: backward only multiplies it.

    | loss_type | of a token | aggregation | source, arXiv |
    |---|---|---|---|
    | `reinforce`, `remax` | -A logp | token-mean, seq-mean-token-sum | -, 2310.10505 |
    | `rloo` | ppo with the product of a sequence's ratios | seq-mean-token-mean | 2402.14740 |
    | `ppo`, `reinforce++`, `bnpo`, `dapo` | clipped ratio | token-mean | 1707.06347, 2503.14476 |
    | `grpo`, `dr_grpo` | same | seq-mean-token-mean, -sum-norm | 2402.03300, 2503.20783 |
    | `cispo` | clipped ratio as a constant weight of logp | token-mean | 2506.13585 |
    | `gspo`, `gspo_token` | ppo with the geometric mean ratio | seq-mean-token-mean | 2507.18071 |
    | `luspo` | gspo | seq-mean-token-sum | 2602.05261 |
    | `gmpo` | geometric mean of clipped ratios | seq-mean-token-mean | 2507.20673 |
    | `sapo` | sigmoid in place of the clip | seq-mean-token-mean | 2511.20347 |
    | `vespo` | gamma weight of the sequence's ratio | token-mean | 2602.10693 |
    | `a_lol` | positive advantages, clipped weight | seq-mean-token-sum | 2305.14718 |
    | `dro` | -A logp + beta / 2 log-ratio^2 | token-mean | 2405.19107 |

    Aggregations: token-mean (sum over tokens / tokens), token-sum, seq-mean-token-mean (sum over
    sequences of their token mean / sequences), seq-mean-token-sum, seq-mean-token-sum-norm (that
    / max_length). Masked tokens and sequences without a token do not count.

    Args:
        logps: (B, T), or (N,) packed with `cu_seqlens`; any floating type, computed in float32.
        old_logps: like logps; those of the policy that the data are credited to. None: the policy's
            own, so that every ratio is 1.
        advantages: like logps, or one per sequence.
        mask: like logps, bool, True where a token counts. What lies elsewhere is never read into a
            result, NaN included.
        ref_logps: like logps; needed for `kl_coef`.
        sampling_logps: like logps; those that the sampler reported, NaN where it reported none.
            Multiplies the loss with exp(old_logps - sampling_logps), within bounds.
        entropy: like logps; needed for `entropy_coef`.
        normalizer: divides the sum in place of the counts (and of max_length), so that the split
            into micro-batches and ranks changes nothing: pass the count of the whole step, as a
            number or, to avoid a wait, a tensor.

    Raises:
        ValueError: for shapes, devices or settings that do not fit; on the CPU also for advantages
            that are not finite and offsets that do not fit, on CUDA with RLHF_FAST_DEBUG=1 only.
    """
    tensors = (old_logps, advantages, mask, cu_seqlens, ref_logps, sampling_logps, entropy)
    args = _prepare(logps, *tensors, loss_type, params, normalizer)
    if torch.is_grad_enabled():
        logps = logps.float()
        entropy = None if entropy is None else entropy.float()
        loss, metrics = _PolicyLoss.apply(logps, entropy, *args)
    else:
        loss, metrics, *_ = torch.ops.rlhf_fast.policy_loss(*args, False)
    return PolicyLossOutput(loss, PolicyMetrics(*metrics.unbind()))


def policy_loss_coefficients(
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
) -> PolicyLossCoefficients:
    """`policy_loss` with d loss / d logps and d loss / d entropy in place of a graph.

    For callers who form the gradient of what makes logps themselves, chunk by chunk of whole
    sequences: with one `normalizer` for all chunks, losses and gradients add up to the batch's.
    """
    tensors = (old_logps, advantages, mask, cu_seqlens, ref_logps, sampling_logps, entropy)
    args = _prepare(logps, *tensors, loss_type, params, normalizer)
    loss, metrics, d_logps, d_entropy = torch.ops.rlhf_fast.policy_loss(*args, entropy is not None)
    d_entropy = None if entropy is None else d_entropy
    return PolicyLossCoefficients(loss, d_logps, d_entropy, PolicyMetrics(*metrics.unbind()))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps, entropy, *args):
        with_entropy = entropy is not None and entropy.requires_grad
        op = torch.ops.rlhf_fast.policy_loss
        loss, metrics, d_logps, d_entropy = op(*args, with_entropy)
        ctx.save_for_backward(d_logps, d_entropy if with_entropy else None)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        d_logps, d_entropy = ctx.saved_tensors
        d_entropy = None if d_entropy is None else d_entropy * grad
        return d_logps * grad, d_entropy, *(None,) * 12


# ---- the op that torch's dispatcher knows --------------------------------------------------------

native.LIBRARY.define(
    "policy_loss(Tensor logps, Tensor? old_logps, Tensor advantages, Tensor? mask, "
    "Tensor? cu_seqlens, Tensor? ref_logps, Tensor? sampling_logps, Tensor? entropy, "
    "Tensor? normalizer, Tensor? sequence_weights, int[] choices, float[] settings, "
    "bool with_d_entropy) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _outputs(logps: Tensor, with_d_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = logps.new_zeros(())
    metrics = logps.new_zeros(len(native.POLICY_METRICS))
    d_entropy = torch.empty_like(logps) if with_d_entropy else logps.new_empty(0)
    return loss, metrics, torch.empty_like(logps), d_entropy


def _forward(logps, old_logps, advantages, mask, cu_seqlens, ref, sampling, entropy, *rest):
    normalizer, sequence_weights, choices, settings, with_d_entropy = rest
    sequences.check_offset_values("policy_loss", cu_seqlens, logps.numel())
    if logps.is_cuda and native.debug():
        _check_values(advantages, mask, cu_seqlens)
    outputs = loss, metrics, d_logps, d_entropy = _outputs(logps, with_d_entropy)
    if logps.numel() == 0:
        return outputs
    count = sequences.num_sequences(logps, cu_seqlens)
    lengths, partials = logps.new_empty(count), logps.new_empty(count, len(metrics))
    given = (logps, old_logps, advantages, mask, ref, sampling, entropy, normalizer)
    module, *where = native.target(logps)
    module.policy_loss(
        *where,
        sequences.pack(logps, cu_seqlens),
        *map(native.address, (*given, sequence_weights)),
        list(choices),
        list(settings),
        *map(native.address, (loss, metrics, d_logps)),
        d_entropy.data_ptr() if with_d_entropy else 0,
        *map(native.address, (lengths, partials)),
    )
    return outputs


native.implement("policy_loss", _forward)


@torch.library.register_fake("rlhf_fast::policy_loss", lib=native.LIBRARY)
def _(logps, *args):
    return _outputs(logps, args[-1])


# ---- checks --------------------------------------------------------------------------------------


def _prepare(
    logps, old_logps, advantages, mask, cu_seqlens, ref_logps, sampling_logps, entropy,
    loss_type, params, normalizer,
) -> tuple:  # fmt: skip
    """Refuses what does not fit; returns the op's arguments but the last."""
    op = "policy_loss"
    names = tuple(LOSS_TYPES)
    native.check(
        loss_type in LOSS_TYPES, op, f"loss_type must be one of {names}", loss_type, "see it"
    )
    sequences.check_tokens(op, "logps", logps, cu_seqlens)
    per_token = {"old_logps": old_logps, "ref_logps": ref_logps, "entropy": entropy}
    for name, tensor in (per_token | {"sampling_logps": sampling_logps}).items():
        sequences.check_like(op, name, tensor, logps)
    sequences.check_mask(op, mask, logps)
    count = sequences.num_sequences(logps, cu_seqlens)
    per_sequence = advantages.dim() == 1 and advantages.shape != logps.shape
    shape = (count,) if per_sequence else None
    sequences.check_like(op, "advantages", advantages, logps, shape)
    for name, coefficient, tensor in (
        ("ref_logps", params.kl_coef, ref_logps),
        ("entropy", params.entropy_coef, entropy),
    ):
        native.check(
            coefficient == 0 or tensor is not None,
            op,
            f"{name} must be given for a coefficient of {coefficient}",
            None,
            f"pass {name}",
        )
    native.check(
        loss_type != "vespo" or sampling_logps is None or params.sampling_level == "token",
        op,
        "sampling_level must be token for vespo",
        params.sampling_level,
        "its weight multiplies token ratios itself",
    )
    plain, scale = sequences.plain, 1.0
    aggregation = params.aggregation or LOSS_TYPES[loss_type][1]
    if aggregation == "seq-mean-token-sum-norm" and normalizer is None:
        native.check(
            params.max_length is not None or cu_seqlens is None,
            op,
            "max_length must be given for packed sequences and seq-mean-token-sum-norm",
            None,
            "there is no batch width to take instead",
        )
        scale = 1 / (params.max_length or max(logps.shape[-1], 1))
    return (
        *map(plain, (logps, old_logps, advantages)),
        plain(mask, torch.bool),
        sequences.offsets(cu_seqlens),
        *map(plain, (ref_logps, sampling_logps, entropy)),
        _normalizer(op, normalizer, logps),
        None,
        params.choices(loss_type, normalizer is not None, per_sequence),
        params.settings(scale),
    )


def _normalizer(op: str, normalizer: float | Tensor | None, logps: Tensor) -> Tensor | None:
    if normalizer is None:
        return None
    if not isinstance(normalizer, Tensor):
        native.check(normalizer > 0, op, "normalizer must be positive", normalizer, "pass a count")
        return torch.full((), float(normalizer), device=logps.device)
    sequences.check_like(op, "normalizer", normalizer, logps, ())
    return sequences.plain(normalizer)


def _check_values(advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    finite = advantages.isfinite()
    if mask is not None and mask.shape == advantages.shape:
        finite = finite | ~mask
    native.check(
        bool(finite.all()),
        "policy_loss",
        "advantages must be finite where the mask holds",
        advantages[~finite][:4].tolist(),
        "check the rewards they come from",
    )
