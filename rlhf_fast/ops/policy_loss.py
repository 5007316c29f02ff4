"""Policy-gradient losses of token log-probabilities: value, gradient and metrics in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import aggregation, autograd, native, sequences
from rlhf_fast.ops.metrics import Metrics
from rlhf_fast.ops.policy_params import LOSS_TYPES, PolicyLossParams

OP = "policy_loss"


class PolicyMetrics(Metrics):
    """Means over the tokens that count, 0-dim float32, and `num_tokens`.

    clip_low, clip_high, clip_dual: share cut off at a bound; ratio: to the old policy, at the
    loss's level; old_kl_k1, _k2, _k3: estimates of KL(old policy || policy); ref_kl: the chosen
    estimate of KL(policy || reference); entropy; sampling_weight, sampling_clipped, sampling_kl:
    the correction for the sampler, the share it cut off, and the k1 estimate of
    KL(sampler || old policy).
    """

    __slots__ = ()
    _fields = native.POLICY_METRICS


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


@native.takes_tensors
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
    cu_segments: Tensor | None = None,
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
    | `dppo_tv`, `dppo_kl` | -A ratio logp within a divergence | token-mean | 2602.04879 |
    | `sapo` | sigmoid in place of the clip | seq-mean-token-mean | 2511.20347 |
    | `vespo` | gamma weight of the sequence's ratio | token-mean | 2602.10693 |
    | `a_lol` | positive advantages, clipped weight | seq-mean-token-sum | 2305.14718 |
    | `dro` | -A logp + beta / 2 log-ratio^2 | token-mean | 2405.19107 |

    csrc/math/policy.h names the equations; luspo is equation 7 of its paper.

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
        cu_segments: (K + 1,), offsets among the flattened tokens of macro actions, each within one
            sequence. Their ratio takes the place of the token's or the sequence's: the product of
            their tokens' unless `ratio_level` says otherwise (MA-RLHF, arXiv 2410.02743).

    Raises:
        ValueError: for shapes, devices or settings that do not fit; on the CPU also for advantages
            that are not finite and offsets that do not fit, on CUDA with RLHF_FAST_DEBUG=1 only.
    """
    tensors = (old_logps, advantages, mask, cu_seqlens, ref_logps, sampling_logps, entropy)
    args = _prepare(logps, *tensors, loss_type, params, normalizer, cu_segments)
    wanted = autograd.wants_gradient(logps), autograd.wants_gradient(entropy)
    loss, metrics, scale, *gradients = _policy_loss(*args, *wanted)
    inputs = [x.float() for x, is_wanted in zip((logps, entropy), wanted) if is_wanted]
    if inputs:
        gradients = [g for g, w in zip(gradients, wanted) if w]
        loss = autograd.one_pass(loss, inputs, gradients, native.scale_left(logps, scale))
    return PolicyLossOutput(loss, PolicyMetrics(metrics))


@native.takes_tensors
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
    cu_segments: Tensor | None = None,
) -> PolicyLossCoefficients:
    """`policy_loss` with d loss / d logps and d loss / d entropy in place of a graph.

    For callers who form the gradient of what makes logps themselves, chunk by chunk of whole
    sequences: with one `normalizer` for all chunks, losses and gradients add up to the batch's.
    """
    tensors = (old_logps, advantages, mask, cu_seqlens, ref_logps, sampling_logps, entropy)
    args = _prepare(logps, *tensors, loss_type, params, normalizer, cu_segments)
    loss, metrics, scale, *gradients = _policy_loss(*args, True, entropy is not None)
    if native.scale_left(logps, scale) is not None:
        gradients = [g * scale for g in gradients]
    d_logps, d_entropy = gradients
    d_entropy = None if entropy is None else d_entropy
    return PolicyLossCoefficients(loss, d_logps, d_entropy, PolicyMetrics(metrics))


# ---- the op that torch's dispatcher knows --------------------------------------------------------


def _outputs(logps: Tensor, *rest) -> tuple[Tensor, ...]:
    """The loss, the metrics, the gradients' scale, the gradients."""
    *_, with_d_logps, with_d_entropy = rest
    metrics = logps.new_empty(len(native.POLICY_METRICS))
    wanted = (with_d_logps, with_d_entropy)
    gradients = (torch.empty_like(logps) if w else logps.new_empty(0) for w in wanted)
    return logps.new_empty(()), metrics, logps.new_empty(()), *gradients


def _forward(logps, old_logps, advantages, mask, cu_seqlens, ref, sampling, entropy, *rest):
    *how, choices, settings, with_d_logps, with_d_entropy = rest
    sequences.check_offset_values(OP, cu_seqlens, logps.numel())
    if logps.is_cuda and native.debug():
        _check_values(advantages, mask, cu_seqlens)
    outputs = _outputs(logps, with_d_logps, with_d_entropy)
    loss, metrics, scale, d_logps, d_entropy = outputs
    if logps.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    count = sequences.num_sequences(logps, cu_seqlens)
    lengths, partials = logps.new_empty(count), logps.new_empty(count, len(native.POLICY_METRICS))
    given = (logps, old_logps, advantages, mask, ref, sampling, entropy)
    ticket = native.ticket(logps)
    module, *where = native.target(logps)
    module.policy_loss(
        *where,
        sequences.pack(logps, cu_seqlens),
        *map(native.address, given),
        aggregation.pack(aggregation.Aggregation(*how)),
        choices,
        settings,
        *map(native.address, (loss, metrics)),
        d_logps.data_ptr() if with_d_logps else 0,
        d_entropy.data_ptr() if with_d_entropy else 0,
        *map(native.address, (lengths, partials, scale, ticket)),
    )
    return outputs


_policy_loss = native.Op(
    "policy_loss(Tensor logps, Tensor? old_logps, Tensor advantages, Tensor? mask, "
    "Tensor? cu_seqlens, Tensor? ref_logps, Tensor? sampling_logps, Tensor? entropy, "
    f"{aggregation.SCHEMA}, int[] choices, float[] settings, bool with_d_logps, "
    "bool with_d_entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _outputs,
)


# ---- checks --------------------------------------------------------------------------------------


def _prepare(
    logps, old_logps, advantages, mask, cu_seqlens, ref_logps, sampling_logps, entropy,
    loss_type, params, normalizer, cu_segments,
) -> tuple:  # fmt: skip
    """Refuses what does not fit; returns the op's arguments but the last two."""
    sequences.check_tokens(OP, "logps", logps, cu_seqlens)
    sequences.check_like(OP, "old_logps", old_logps, logps)
    sequences.check_like(OP, "ref_logps", ref_logps, logps)
    sequences.check_like(OP, "sampling_logps", sampling_logps, logps)
    sequences.check_like(OP, "entropy", entropy, logps)
    sequences.check_mask(OP, mask, logps)
    per_sequence = advantages.dim() == 1 and advantages.shape != logps.shape
    shape = (sequences.num_sequences(logps, cu_seqlens),) if per_sequence else None
    sequences.check_like(OP, "advantages", advantages, logps, shape)
    given = tuple(x is not None for x in (ref_logps, entropy, sampling_logps))
    in_segments = cu_segments is not None
    kind, choices, settings = _numbers(loss_type, params, per_sequence and not in_segments,
                                       in_segments, *given)  # fmt: skip

    how = aggregation.plan(
        OP, kind, logps, cu_seqlens, max_length=params.max_length, normalizer=normalizer
    )
    plain, offsets = sequences.plain, sequences.offsets(cu_seqlens)
    advantages, mask = plain(advantages), plain(mask, torch.bool)
    if in_segments:
        of_sequences, offsets = _segments(logps, cu_seqlens, cu_segments)
        how = aggregation.in_segments(how, mask, logps, of_sequences, offsets)
        if per_sequence:
            lengths = of_sequences.diff()
            advantages = advantages.repeat_interleave(lengths, output_size=logps.numel())
            advantages = advantages.view(logps.shape)
    rest = plain(ref_logps), plain(sampling_logps), plain(entropy)
    return plain(logps), plain(old_logps), advantages, mask, offsets, *rest, *how, choices, settings


@native.remembered
def _numbers(loss_type, params, per_sequence, in_segments, ref, entropy, sampling) -> tuple:
    """The aggregation and the kernel's numbers; refuses settings that do not fit."""
    names = tuple(LOSS_TYPES)
    native.check(
        loss_type in LOSS_TYPES,
        OP,
        f"loss_type must be one of {names}",
        repr(loss_type),
        "choose one",
    )
    for name, coefficient, is_given in (
        ("ref_logps", params.kl_coef, ref),
        ("entropy", params.entropy_coef, entropy),
    ):
        native.check(
            coefficient == 0 or is_given,
            OP,
            f"{name} must be given for a coefficient of {coefficient}",
            None,
            f"pass {name}",
        )
    native.check(
        loss_type != "vespo" or not sampling or params.sampling_level == "token",
        OP,
        "sampling_level must be token for vespo",
        params.sampling_level,
        "its weight multiplies token ratios itself",
    )
    kind = params.aggregation or LOSS_TYPES[loss_type][1]
    return kind, params.choices(loss_type, per_sequence, in_segments), params.settings()


def _segments(logps, cu_seqlens, cu_segments) -> tuple[Tensor, Tensor]:
    """Offsets of the sequences and of their segments among the flattened tokens."""
    sequences.check_offsets(OP, cu_segments, "cu_segments")
    sequences.check_like(OP, "cu_segments", cu_segments, logps, cu_segments.shape)
    if cu_seqlens is None:
        rows, width = logps.shape
        cu_seqlens = torch.arange(rows + 1, device=logps.device) * width
    cu_seqlens, cu_segments = sequences.offsets(cu_seqlens), sequences.offsets(cu_segments)
    if not torch.compiler.is_compiling() and (native.debug() or not cu_segments.is_cuda):
        native.check(
            bool(torch.isin(cu_seqlens, cu_segments).all()),
            OP,
            "cu_segments must hold the boundaries of all sequences",
            f"segments {cu_segments[:8].tolist()} and sequences {cu_seqlens[:8].tolist()}",
            "cut macro actions where a sequence ends",
        )
    return cu_seqlens, cu_segments


def _check_values(advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    finite = advantages.isfinite()
    if mask is not None and mask.shape == advantages.shape:
        finite = finite | ~mask
    native.check(
        bool(finite.all()),
        OP,
        "advantages must be finite where the mask holds",
        advantages[~finite][:4].tolist(),
        "check the rewards they come from",
    )
