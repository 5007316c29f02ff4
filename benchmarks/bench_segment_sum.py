"""Sums and means of token values per sequence, padded and packed."""

from __future__ import annotations

import torch

from benchmarks import small_losses
from benchmarks.small_losses import Contest
from rlhf_fast.ops import segment_sum


def eager(values, mask):
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).square().sum()


def index_add(values, owner, count):
    return values.new_zeros(count).index_add(0, owner, values).square().sum()


def segment_reduce(values, lengths):
    return torch.segment_reduce(values, "sum", lengths=lengths).square().sum()


def run(args) -> None:
    lengths = torch.randint(1, args.length + 1, (args.batch,))
    mask = torch.arange(args.length) < lengths[:, None]
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    padded = -torch.rand(args.batch, args.length)
    packed = padded[mask]
    owner = torch.arange(args.batch).repeat_interleave(lengths)
    compiled = torch.compile(eager, dynamic=False)
    contests = [
        Contest(
            "masked means",
            [padded],
            lambda x: eager(x, mask),
            {
                "rlhf_fast": lambda x: segment_sum(x, mask=mask, mean=True).square().sum(),
                "eager": lambda x: eager(x, mask),
                "torch.compile": lambda x: compiled(x, mask),
            },
            num_bytes=10 * padded.numel(),
        ),
        Contest(
            "packed sums",
            [packed],
            lambda x: index_add(x, owner, args.batch),
            {
                "rlhf_fast": lambda x: segment_sum(x, cu_seqlens=cu_seqlens).square().sum(),
                "eager index_add": lambda x: index_add(x, owner, args.batch),
                "torch.segment_reduce": lambda x: segment_reduce(x, lengths),
            },
            num_bytes=8 * packed.numel(),
        ),
    ]
    small_losses.run("segment_sum", contests, args)
