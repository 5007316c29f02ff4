"""Policy-gradient losses from hidden states: head, log-probs, loss and gradient in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import native, one_node
from rlhf_fast.ops.head_inputs import DEFAULT_SETTINGS, HeadSettings, outside_of_node
from rlhf_fast.ops.head_loss import head_loss
from rlhf_fast.ops.linear_logps import linear_logps_ref
from rlhf_fast.ops.linear_policy_tokens import OP, aggregation_of, prepare_tokens
from rlhf_fast.ops.policy_loss import PolicyMetrics, policy_loss
from rlhf_fast.ops.policy_loss_ref import policy_loss_ref
from rlhf_fast.ops.policy_params import LOSS_TYPES, RATIO_LEVELS, PolicyLossParams


class LinearPolicyOutput(NamedTuple):
    """What `linear_policy_loss` returns; only `loss` passes a gradient."""

    loss: Tensor
    logps: Tensor
    """Shaped like the labels, 0 where a token does not count."""
    entropy: Tensor
    """The same."""
    metrics: PolicyMetrics


@native.takes_tensors
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    settings: HeadSettings = DEFAULT_SETTINGS,
    loss_type: str = "ppo",
    params: PolicyLossParams = PolicyLossParams(),  # noqa: B008, frozen
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    logits_budget_bytes: int = 256 << 20,
) -> LinearPolicyOutput:
    """A policy-gradient loss straight from hidden states, its gradient taken in forward.

    Equivalent to `linear_logps` with the entropy and `policy_loss`, without keeping or recomputing
    logits. Tokens whose coefficient is 0 (masked, advantage 0, clipped) leave the products of the
    gradient. Losses with a ratio per sequence (gspo, gmpo, rloo, ...) see sequences whole: if one
    is longer than the budget holds, logits of rows beyond it are computed twice, a fourth product.

    Args:
        hidden: (B, T, D), or packed (N, D) with `cu_seqlens`; dtypes as for `linear_logps`, but a
            loss scale cannot save float16 gradients, which are taken before it.
        weight: (V, D).
        labels: (B, T) or (N,), int32 or int64; nothing is shifted.
        old_logps: like labels; those of the policy that the data are credited to, or None.
        advantages: like labels, or one per sequence.
        bias: (V,).
        mask: like labels, bool; False where a token does not count.
        cu_seqlens: (S + 1,) int32 or int64 offsets of packed sequences.
        settings: temperature, softcap, logit scale and ignored label.
        loss_type: as for `policy_loss`, like params, ref_logps, sampling_logps and normalizer.
        logits_budget_bytes: logits to hold at a time. 0 keeps below a tenth of all logits; with a
            trained head it takes 15 to 45 % longer than the default, which is there for speed.

    Raises:
        ValueError: as `linear_logps` and `policy_loss`.
    """
    native.check(
        loss_type in LOSS_TYPES, OP, f"loss_type must be one of {tuple(LOSS_TYPES)}",
        loss_type, "see policy_loss",
    )  # fmt: skip
    if torch.compiler.is_compiling():
        fixed = normalizer if isinstance(normalizer, Tensor) else None
        if fixed is not None:
            normalizer = None
        words, numbers = one_node.to_settings(params)
        numbers += [*settings.numbers(), one_node.number(normalizer), float(logits_budget_bytes)]
        head = outside_of_node(hidden, weight, bias)
        per_token = labels, old_logps, advantages, mask, ref_logps, sampling_logps
        tensors = *head, *per_token, cu_seqlens, settings.row_temperatures(), fixed
        of_node = one_node.Settings([loss_type, *words], numbers)
        loss, logps, entropy, metrics = one_node.call(OP, tensors, of_node)
        return LinearPolicyOutput(loss, logps, entropy, PolicyMetrics(metrics))
    rows, batch = prepare_tokens(
        (hidden, weight, labels, bias, mask, settings),
        (old_logps, advantages, ref_logps, sampling_logps),
        cu_seqlens,
    )
    if normalizer is None:
        normalizer = batch.normalizer(loss_type, params)

    def loss_of(seen, tokens: slice, cu_seqlens: Tensor, denominator):
        old, advantage, reference, sampling = (
            None if t is None else t[tokens] for t in batch.tokens
        )
        entropy = seen["entropy"] if params.entropy_coef else seen["entropy"].detach()
        return policy_loss(
            seen["logps"],
            old,
            advantage,
            cu_seqlens=cu_seqlens,
            loss_type=loss_type,
            params=params,
            ref_logps=reference,
            sampling_logps=sampling,
            entropy=entropy,
            normalizer=denominator,
        )

    whole = _needs_whole_sequences(loss_type, params, sampling_logps)
    by_length = aggregation_of(loss_type, params) == "seq-mean-token-mean"

    def of_units(seen, units: slice) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        for tokens, cu_seqlens, lengthening in batch.pieces(units, whole, by_length):
            first = batch.bounds[units.start] if whole else units.start
            local = slice(tokens.start - first, tokens.stop - first)
            part = {name: value[local] for name, value in seen.items()}
            total = total + loss_of(part, tokens, cu_seqlens, normalizer * lengthening).loss
        return total

    outputs, bounds = ("logps", "entropy"), batch.bounds if whole else None
    loss, seen = head_loss(rows, of_units, outputs, logits_budget_bytes, bounds)
    with torch.no_grad():
        found = loss_of(seen, slice(0, len(rows.labels)), batch.offsets, normalizer)
    return LinearPolicyOutput(loss, *(rows.scatter(seen[n]) for n in outputs), found.metrics)


def linear_policy_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    settings: HeadSettings = DEFAULT_SETTINGS,
    logits_budget_bytes: int = 0,
    **loss,
) -> LinearPolicyOutput:
    """What `linear_policy_loss` computes, in plain PyTorch, with all logits."""
    live = labels != settings.ignore_index
    live = live if mask is None else live & mask
    outputs = ("logps", "entropy")
    options = {"bias": bias, "mask": mask, "outputs": outputs, **vars(settings)}
    found = linear_logps_ref(hidden, weight, labels, **options)
    total, metrics = policy_loss_ref(
        found.logps, old_logps, advantages, mask=live, entropy=found.entropy, **loss
    )
    return LinearPolicyOutput(total, found.logps, found.entropy, metrics)


def _in_one_node(tensors: one_node.Tensors, settings: one_node.Settings) -> tuple[Tensor, ...]:
    hidden, weight, bias, *per_token, cu_seqlens, temperatures, normalizer = tensors
    *per_token, mask, ref_logps, sampling_logps = per_token
    (loss_type, *words), (*numbers, fixed, budget_bytes) = settings
    of_params = one_node.Settings(words, numbers[: len(words)])
    loss, logps, entropy, metrics = linear_policy_loss(
        hidden,
        weight,
        *per_token,
        bias=bias,
        mask=mask,
        cu_seqlens=cu_seqlens,
        settings=HeadSettings.from_numbers(numbers[len(words) :], temperatures),
        loss_type=loss_type,
        params=one_node.from_settings(PolicyLossParams, of_params),
        ref_logps=ref_logps,
        sampling_logps=sampling_logps,
        normalizer=one_node.optional(fixed) if normalizer is None else normalizer,
        logits_budget_bytes=int(budget_bytes),
    )
    return loss, logps, entropy, metrics.values


def _empty_outputs(tensors: one_node.Tensors) -> tuple[Tensor, ...]:
    labels = tensors[3]
    shapes = (), labels.shape, labels.shape, (len(PolicyMetrics._fields),)
    return tuple(labels.new_empty(shape, dtype=torch.float32) for shape in shapes)


one_node.register(OP, _in_one_node, _empty_outputs)


def _needs_whole_sequences(loss_type: str, params: PolicyLossParams, sampling_logps) -> bool:
    level = native.POLICY_RATIO_LEVELS[native.POLICY_LOSSES.index(LOSS_TYPES[loss_type][0])]
    if params.ratio_level is not None:
        level = RATIO_LEVELS.index(params.ratio_level)
    sampling = sampling_logps is not None and params.sampling_level != "token"
    return level != RATIO_LEVELS.index("token") or sampling
