"""The live tokens of a batch for `linear_policy_loss`, and which of them it sees at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.ops import native, sequences
from rlhf_fast.ops.head_inputs import HeadInputs, prepare
from rlhf_fast.ops.policy_params import LOSS_TYPES, PolicyLossParams

OP = "linear_policy_loss"


def aggregation_of(loss_type: str, params: PolicyLossParams) -> str:
    return params.aggregation or LOSS_TYPES[loss_type][1]


@dataclass(frozen=True)
class PolicyTokens:
    tokens: tuple[Tensor | None, ...]
    """old_logps, advantages, ref_logps, sampling_logps of the live tokens."""
    offsets: Tensor
    """Where sequences begin among the live tokens, then how many these are."""
    bounds: list[int]
    """The same, on the host."""
    width: int | None
    """Of a padded batch."""

    def normalizer(self, loss_type: str, params: PolicyLossParams) -> float:
        """What the aggregation divides by, for the tokens of this call."""
        aggregation = aggregation_of(loss_type, params)
        if aggregation in ("token-mean", "token-sum"):
            return float(max(self.bounds[-1], 1)) if aggregation == "token-mean" else 1.0
        count = max(sum(a < b for a, b in zip(self.bounds, self.bounds[1:])), 1)
        if aggregation != "seq-mean-token-sum-norm":
            return float(count)
        length = params.max_length or self.width
        native.check(
            length is not None,
            OP,
            "max_length must be given for packed sequences and seq-mean-token-sum-norm",
            None,
            "there is no batch width to take instead",
        )
        return float(count * max(length, 1))

    def pieces(
        self, units: slice, whole: bool, by_length: bool
    ) -> Iterator[tuple[slice, Tensor, float]]:
        """What `policy_loss` sees in one call, of some units: (live tokens, their cu_seqlens, 1).

        Units are sequences (`whole`) or tokens. A loss that divides by sequence lengths sees a
        sequence that the units cut alone; in place of 1 comes its length over that of the part.
        """
        bounds, offsets = self.bounds, self.offsets
        if whole:
            tokens = slice(bounds[units.start], bounds[units.stop])
            yield tokens, offsets[units.start : units.stop + 1] - tokens.start, 1.0
            return
        ends = torch.arange(2, device=offsets.device)
        if not by_length:  # a sum over tokens, whosever they are
            yield units, ends * (units.stop - units.start), 1.0
            return
        start = units.start
        while start < units.stop:
            sequence = bisect_right(bounds, start) - 1
            begin, end = bounds[sequence : sequence + 2]
            if begin == start and end <= units.stop:
                last = bisect_right(bounds, units.stop) - 1  # sequences before it are whole
                stop = bounds[last]
                yield slice(start, stop), offsets[sequence : last + 1] - start, 1.0
            else:
                stop = min(end, units.stop)
                yield slice(start, stop), ends * (stop - start), (end - begin) / (stop - start)
            start = stop


def prepare_tokens(inputs, per_token, cu_seqlens) -> tuple[HeadInputs, PolicyTokens]:
    hidden, _, labels = inputs[:3]
    dims = 3 if cu_seqlens is None else 2
    native.check(
        hidden.dim() == dims,
        OP,
        f"hidden must have shape {'(B, T, D)' if dims == 3 else '(N, D) with cu_seqlens'}",
        tuple(hidden.shape),
        "pass cu_seqlens with packed sequences, and only with them",
    )
    rows = prepare(OP, *inputs)
    width = None
    if cu_seqlens is None:
        count, width = labels.shape
        cu_seqlens = torch.arange(count + 1, device=labels.device) * width
    else:
        sequences.check_tokens(OP, "hidden", hidden[:, 0], cu_seqlens)
        sequences.check_offset_values(OP, cu_seqlens, len(hidden))
    old_logps, advantages, *others = per_token
    advantages = _per_token(advantages, labels, cu_seqlens)
    names = ("old_logps", "advantages", "ref_logps", "sampling_logps")
    per_token = (old_logps, advantages, *others)
    for name, tensor in zip(names, per_token):
        sequences.check_like(OP, name, tensor, labels)
    tokens = tuple(None if t is None else rows.gather(t.detach()) for t in per_token)
    offsets = rows.live_offsets(cu_seqlens)
    return rows, PolicyTokens(tokens, offsets, offsets.tolist(), width)


def _per_token(advantages: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    if advantages.shape == labels.shape or advantages.dim() != 1:
        return advantages
    sequences.check_like(OP, "advantages", advantages, labels, (cu_seqlens.numel() - 1,))
    lengths = cu_seqlens.diff()
    spread = advantages.repeat_interleave(lengths, output_size=labels.numel())
    return spread.view(labels.shape)
