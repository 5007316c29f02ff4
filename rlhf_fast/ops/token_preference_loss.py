"""Losses of preference pairs from log-probs of tokens, with the tokens' gradient in one call."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rlhf_fast.ops import autograd, native, sequences
from rlhf_fast.ops.preference_inputs import (
    DEFAULT_PARAMS,
    NO_DATA,
    TRAITS,
    PairData,
    PreferenceLossOutput,
    PreferenceParams,
    check,
    check_settings,
)
from rlhf_fast.ops.preference_loss import addresses, pack, preference_loss, values
from rlhf_fast.ops.segment_sum import sums_and_counts

OP = "token_preference_loss"


@native.takes_tensors
def token_preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    interleaved: bool = False,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    params: PreferenceParams = DEFAULT_PARAMS,
    data: PairData = NO_DATA,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> PreferenceLossOutput:
    """`preference_loss` from log-probs of tokens, with gradients to the tokens.

    Equivalent to `preference_loss` of `segment_sum(logps)` and `segment_sum(ref_logps)`, halved
    into chosen and rejected, with the lengths that the sums count. One launch for sums, losses and
    gradient, which is all that is allocated of the tokens' size; the sums come first, in launches
    of their own, for losses that look at the whole batch (aot, aot_unpaired, sft) and for reduction
    "none".

    Args:
        logps: (2B, T), or packed (N,) with `cu_seqlens`: the B chosen sequences, then the B
            rejected ones, as in TRL; with `interleaved` chosen, rejected, chosen, rejected, ...
        ref_logps: like logps, or [2B] sums computed before.
        cu_seqlens: (2B + 1,) cumulative lengths from 0 to N.
        mask: bool like logps, True for tokens of the response; all count without it.
        data: as for `preference_loss`; lengths given here replace the counted ones.
        params: `ld_alpha` is for this function.

    Raises:
        ValueError: as `preference_loss` and `segment_sum`, and for an odd number of sequences.
    """
    sequences.check_tokens(OP, "logps", logps, cu_seqlens)
    sequences.check_mask(OP, mask, logps)
    count = sequences.num_sequences(logps, cu_seqlens)
    if count % 2:
        must = "there must be as many rejected as chosen sequences"
        native.refuse(OP, must, f"{count} sequences", "leave out the one without a partner")
    ref_tokens = ref_sums = None
    if ref_logps is not None and ref_logps.shape == logps.shape:
        ref_tokens = ref_logps
        sequences.check_like(OP, "ref_logps", ref_tokens, logps)
    elif ref_logps is not None:
        ref_sums = ref_logps
        sequences.check_like(OP, "ref_logps", ref_sums, logps, (count,))
    weights = None
    if params.ld_alpha != 1:
        shared = torch.minimum(*_halves(token_lengths(logps, cu_seqlens, mask), interleaved))
        shared = torch.stack((shared, shared), 1 if interleaved else 0).flatten()
        weights = tail_weights(shared, params.ld_alpha, logps, cu_seqlens, mask)
        params = replace(params, ld_alpha=1.0)
    tokens = logps, ref_tokens, cu_seqlens, mask, weights
    pairs = ref_sums, interleaved, data
    settings = loss_type, beta, params, reduction
    of_batch = loss_type == "sft" or "sorted" in TRAITS.get(loss_type, ())
    return (_from_sums if of_batch or reduction == "none" else _at_once)(tokens, pairs, settings)


def token_lengths(tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Tensor:
    """[S] int64: tokens of each sequence that count."""
    if cu_seqlens is None:
        ones = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
        return ones if mask is None else mask.sum(1)
    lengths = cu_seqlens.diff().long()
    if mask is None:
        return lengths
    counted = torch.cat((mask.new_zeros(1, dtype=torch.long), mask.cumsum(0)))
    return counted[cu_seqlens.long()].diff()


def tail_weights(
    shared: Tensor, alpha: float, tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Like the tokens: 1 for the first `shared[s]` counting tokens of sequence s, then alpha."""
    counts = torch.ones_like(tokens, dtype=torch.long) if mask is None else mask.long()
    if cu_seqlens is None:
        position, shared = counts.cumsum(1), shared[:, None]
    else:
        lengths = cu_seqlens.diff().long()
        position = counts.cumsum(0)
        before = torch.cat((position.new_zeros(1), position))[cu_seqlens[:-1].long()]
        num = tokens.numel()
        position = position - before.repeat_interleave(lengths, output_size=num)
        shared = shared.repeat_interleave(lengths, output_size=num)
    weights = torch.full_like(position, alpha, dtype=torch.float32)
    return weights.masked_fill(position <= shared, 1.0)


def _halves(x: Tensor | None, interleaved: bool) -> tuple[Tensor | None, Tensor | None]:
    """Of the chosen and of the rejected sequences, where they lie."""
    if x is None:
        return None, None
    return x.view(-1, 2).unbind(1) if interleaved else x.view(2, -1).unbind(0)


def _from_sums(tokens, pairs, settings) -> PreferenceLossOutput:
    logps, ref_tokens, cu_seqlens, mask, weights = tokens
    ref_sums, interleaved, data = pairs
    loss_type, beta, params, reduction = settings
    sums, lengths = sums_and_counts(logps, cu_seqlens, mask, weights)
    if ref_tokens is not None:
        ref_sums, _ = sums_and_counts(ref_tokens.detach(), cu_seqlens, mask, weights)
    counted = _halves(lengths, interleaved)
    given = [n if own is None else own for own, n in zip(data[:2], counted)]
    return preference_loss(
        *_halves(sums, interleaved),
        *_halves(ref_sums, interleaved),
        loss_type=loss_type,
        beta=beta,
        params=params,
        data=PairData(*given, *data[2:]),
        reduction=reduction,
    )


def _at_once(tokens, pairs, settings) -> PreferenceLossOutput:
    logps, ref_tokens, cu_seqlens, mask, weights = tokens
    ref_sums, interleaved, data = pairs
    loss_type, beta, params, reduction = settings
    has_reference = ref_tokens is not None or ref_sums is not None
    given = (True, True, *(x is not None for x in data[2:]))
    numbers = check_settings(
        loss_type, beta, params, reduction, False, (has_reference, has_reference), given
    )
    references = _halves(ref_sums, interleaved)
    count = sequences.num_sequences(logps, cu_seqlens) // 2
    per_pair = logps.new_empty(count, dtype=torch.float32)
    check((per_pair, per_pair, *references), None, data)
    is_wanted = autograd.wants_gradient(logps)
    rows, loss, means, d_logps = _token_preference_loss(
        sequences.plain(logps),
        sequences.plain(ref_tokens),
        sequences.plain(mask, torch.bool),
        weights,
        sequences.offsets(cu_seqlens),
        [values(x) for x in (*references, *data)],
        interleaved,
        loss_type,
        numbers,
        1.0 / max(count, 1) if reduction == "mean" else 1.0,
        is_wanted,
    )
    if is_wanted:
        loss = autograd.one_pass(loss, (logps.float(),), (d_logps,))
    return PreferenceLossOutput(loss, *rows.unbind()[1:5], means)


# ---- the op that torch's dispatcher knows --------------------------------------------------------


def _outputs(logps, ref_logps, mask, weights, cu_seqlens, *rest):
    """Rows of losses, four details and the sums' gradients; the loss; means; the gradient."""
    count = sequences.num_sequences(logps, cu_seqlens) // 2
    d_logps = torch.empty_like(logps) if rest[-1] else logps.new_empty(0)
    return logps.new_empty(7, count), logps.new_empty(()), logps.new_empty(4), d_logps


def _forward(logps, ref_logps, mask, weights, cu_seqlens, constants, interleaved, *rest):
    loss_type, settings, scale, with_gradient = rest
    sequences.check_offset_values(OP, cu_seqlens, logps.numel())
    outputs = _outputs(logps, ref_logps, mask, weights, cu_seqlens, with_gradient)
    *of_pairs, d_logps = outputs
    count = of_pairs[0].shape[1]
    if count == 0:
        return tuple(t.zero_() for t in outputs)
    ticket = native.ticket(logps)
    module, *where = native.target(logps)
    module.token_preference_loss(
        *where,
        sequences.pack(logps, cu_seqlens),
        interleaved,
        *map(native.address, (logps, ref_logps, mask, weights)),
        pack(count, loss_type, settings, (None, None, *constants), None, scale),
        addresses(*of_pairs),
        d_logps.data_ptr() if with_gradient else 0,
        native.address(ticket),
    )
    return outputs


# constants: the reference's sums, chosen and rejected, then the fields of PairData
_token_preference_loss = native.Op(
    "token_preference_loss_forward(Tensor logps, Tensor? ref_logps, Tensor? mask, "
    "Tensor? weights, Tensor? cu_seqlens, Tensor?[] constants, bool interleaved, str loss_type, "
    "float[] settings, float scale, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _outputs,
)
