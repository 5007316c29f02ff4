"""Preference losses from hidden states: head, log-probs, loss and gradient in one pass."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import native, one_node, sequences
from rlhf_fast.ops.head_inputs import (
    DEFAULT_SETTINGS,
    HeadInputs,
    HeadSettings,
    outside_of_node,
    prepare,
)
from rlhf_fast.ops.head_loss import head_loss
from rlhf_fast.ops.linear_logps import linear_logps_ref
from rlhf_fast.ops.preference_inputs import (
    DEFAULT_PARAMS,
    NO_DATA,
    TRAITS,
    PairData,
    PreferenceLossOutput,
    PreferenceParams,
)
from rlhf_fast.ops.preference_loss import preference_loss
from rlhf_fast.ops.preference_ref import preference_loss_ref
from rlhf_fast.ops.segment_sum import segment_sum, segment_sum_ref

OP = "linear_preference_loss"


class LinearPreferenceOutput(NamedTuple):
    """What `linear_preference_loss` returns; only `loss` passes a gradient."""

    loss: Tensor
    """[]: sum over pairs, divided by `num_pairs`."""
    chosen_logps: Tensor
    """[B] sums over tokens."""
    rejected_logps: Tensor
    """[B]"""
    pairs: PreferenceLossOutput
    """Rewards, accuracies and margins of these pairs, as `preference_loss` gives them."""


@native.takes_tensors
def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    settings: HeadSettings = DEFAULT_SETTINGS,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    params: PreferenceParams = DEFAULT_PARAMS,
    data: PairData = NO_DATA,
    num_pairs: float | None = None,
    logits_budget_bytes: int = 256 << 20,
) -> LinearPreferenceOutput:
    """A loss of preference pairs straight from hidden states, its gradient taken in forward.

    Equivalent to `linear_logps`, `segment_sum` over each sequence and `preference_loss`. With a
    trained head chunks hold whole pairs and logits are computed once, three products of 2NVD, if
    the longest pair fits into the budget; else those of rows beyond the budget are computed twice,
    a fourth product. Losses that compare pairs with each other (aot, aot_unpaired, sft) take all
    pairs as one.

    Args:
        hidden: (N, D), the tokens of all sequences, packed; dtypes as for `linear_logps`, but a
            loss scale cannot save float16 gradients, which are taken before it.
        weight: (V, D).
        labels: (N,) int32 or int64; each row is judged by its own, nothing is shifted.
        cu_seqlens: (2B + 1,) offsets of the sequences: chosen and rejected response of the first
            pair, then of the second, ...
        ref_chosen_logps: [B] sums under the reference; left out for losses without one.
        ref_rejected_logps: [B]
        bias: (V,).
        mask: (N,) bool; False where a token does not count.
        settings: temperature, softcap, logit scale and ignored label.
        loss_type: one of `PREFERENCE_LOSSES`; beta, params and data belong to it. Lengths that
            data lacks are the numbers of tokens that count.
        num_pairs: what the sum over pairs is divided by; all pairs of the batch, over micro-batches
            and ranks. None: the pairs of this call.
        logits_budget_bytes: logits to hold at a time. 0 keeps below a tenth of all logits; with a
            trained head it takes 15 to 45 % longer than the default, which is there for speed.

    Raises:
        ValueError: as `linear_logps` and `preference_loss`, and for an odd number of sequences.

    Source: DPO, arXiv 2305.18290, equation 7; `preference_loss` names the others.
    """
    references = (ref_chosen_logps, ref_rejected_logps)
    if torch.compiler.is_compiling():
        words, numbers = one_node.to_settings(params)
        numbers += [
            *settings.numbers(),
            beta,
            one_node.number(num_pairs),
            float(logits_budget_bytes),
        ]
        head = outside_of_node(hidden, weight, bias)
        tensors = *head, labels, cu_seqlens, *references, mask, settings.row_temperatures(), *data
        of_node = one_node.Settings([loss_type, *words], numbers)
        loss, chosen, rejected, *pairs = one_node.call(OP, tensors, of_node)
        return LinearPreferenceOutput(loss, chosen, rejected, PreferenceLossOutput(*pairs))
    rows, batch = _prepare(
        (hidden, weight, labels, bias, mask, settings), cu_seqlens, data, num_pairs
    )

    def loss_of(logps: Tensor, pairs: slice, reduction: Literal["sum", "mean"] = "sum"):
        starts = batch.offsets[2 * pairs.start : 2 * pairs.stop + 1]
        sums = segment_sum(logps, cu_seqlens=starts - starts[0])
        return sums, preference_loss(
            sums[0::2],
            sums[1::2],
            *(None if t is None else t[pairs] for t in references),
            loss_type=loss_type,
            beta=beta,
            params=params,
            data=_of_pairs(batch.data, pairs),
            reduction=reduction,
        )

    everything, bounds = slice(0, batch.count), batch.offsets[::2].tolist()
    with_all = "sorted" in TRAITS.get(loss_type, ()) or loss_type == "sft"
    if with_all:
        bounds = [0, bounds[-1]]

    def of_units(seen, units: slice) -> Tensor:
        pairs = everything if with_all else units
        return loss_of(seen["logps"], pairs)[1].loss / batch.normalizer

    loss, seen = head_loss(rows, of_units, ("logps",), logits_budget_bytes, bounds)
    with torch.no_grad():
        sums, pairs = loss_of(seen["logps"], everything, "mean")
    return LinearPreferenceOutput(loss, sums[0::2], sums[1::2], pairs)


def linear_preference_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    settings: HeadSettings = DEFAULT_SETTINGS,
    data: PairData = NO_DATA,
    num_pairs: float | None = None,
    logits_budget_bytes: int = 0,
    **loss,
) -> LinearPreferenceOutput:
    """What `linear_preference_loss` computes, in plain PyTorch, with all logits."""
    logps = linear_logps_ref(hidden, weight, labels, bias=bias, mask=mask, **vars(settings)).logps
    live = labels != settings.ignore_index
    live = live if mask is None else live & mask
    sums = segment_sum_ref(logps, cu_seqlens=cu_seqlens)
    counts = segment_sum_ref(live.float(), cu_seqlens=cu_seqlens)
    references = (ref_chosen_logps, ref_rejected_logps)
    data = _with_lengths(data, counts)
    pairs = preference_loss_ref(sums[0::2], sums[1::2], *references, data=data, **loss)
    count = len(sums) // 2
    total = pairs.loss * (count / (count if num_pairs is None else num_pairs))
    sums = sums.detach()
    return LinearPreferenceOutput(total, sums[0::2], sums[1::2], pairs)


def _in_one_node(tensors: one_node.Tensors, settings: one_node.Settings) -> tuple[Tensor, ...]:
    hidden, weight, bias, *first, mask, temperatures = tensors[: -len(NO_DATA)]
    (loss_type, *words), (*numbers, beta, num_pairs, budget_bytes) = settings
    of_params = one_node.Settings(words, numbers[: len(words)])
    loss, *sums, pairs = linear_preference_loss(
        hidden,
        weight,
        *first,
        bias=bias,
        mask=mask,
        settings=HeadSettings.from_numbers(numbers[len(words) :], temperatures),
        loss_type=loss_type,
        beta=beta,
        params=one_node.from_settings(PreferenceParams, of_params),
        data=PairData(*tensors[-len(NO_DATA) :]),
        num_pairs=one_node.optional(num_pairs),
        logits_budget_bytes=int(budget_bytes),
    )
    return loss, *(t.clone() for t in (*sums, *pairs))


def _empty_outputs(tensors: one_node.Tensors) -> tuple[Tensor, ...]:
    cu_seqlens = tensors[4]
    one_per_pair = ((cu_seqlens.shape[0] - 1) // 2,)
    shapes = (), *(one_per_pair,) * 2, (), *(one_per_pair,) * 4, (4,)
    return tuple(cu_seqlens.new_empty(shape, dtype=torch.float32) for shape in shapes)


one_node.register(OP, _in_one_node, _empty_outputs)


class _Batch(NamedTuple):
    offsets: Tensor
    """(2B + 1,) of the sequences among the live rows."""
    count: int
    data: PairData
    normalizer: float


def _prepare(inputs, cu_seqlens, data, num_pairs) -> tuple[HeadInputs, _Batch]:
    hidden = inputs[0]
    native.check(
        hidden.dim() == 2,
        OP,
        "hidden must have shape (N, D), its sequences packed",
        tuple(hidden.shape),
        "flatten the batch and pass cu_seqlens",
    )
    sequences.check_tokens(OP, "hidden", hidden[:, 0], cu_seqlens)
    sequences.check_offset_values(OP, cu_seqlens, len(hidden))
    native.check(
        cu_seqlens.numel() % 2 == 1,
        OP,
        "sequences must come in pairs, chosen before rejected",
        f"{cu_seqlens.numel() - 1} sequences",
        "give cu_seqlens of shape (2B + 1,)",
    )
    native.check(
        num_pairs is None or num_pairs > 0,
        OP,
        "num_pairs must be positive",
        num_pairs,
        "pass the number of pairs of the whole batch",
    )
    rows, count = prepare(OP, *inputs), cu_seqlens.numel() // 2
    offsets = rows.live_offsets(cu_seqlens)
    normalizer = float(max(count, 1) if num_pairs is None else num_pairs)
    return rows, _Batch(offsets, count, _with_lengths(data, offsets.diff().float()), normalizer)


def _with_lengths(data: PairData, counts: Tensor) -> PairData:
    chosen = counts[0::2] if data.chosen_lengths is None else data.chosen_lengths
    rejected = counts[1::2] if data.rejected_lengths is None else data.rejected_lengths
    return data._replace(chosen_lengths=chosen, rejected_lengths=rejected)


def _of_pairs(data: PairData, pairs: slice) -> PairData:
    *columns, baseline = data
    return PairData(*(None if t is None else t[pairs] for t in columns), baseline)
