"""What the fused heads share: logits in chunks, their gradient in place, the sums it goes into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.memory import on_huge_pages
from rlhf_fast.ops import matmul
from rlhf_fast.ops.head_inputs import IGNORED
from rlhf_fast.ops.logps_kernels import ALL, INTERNAL

Statistics = dict[str, Tensor]
Grads = Sequence[Tensor | None]
"""Of logps, entropy and lse, each (N,) or None."""


MAX_ROUNDINGS = 16
"""Of a 16-bit weight gradient, where the budget has no room for its sum in float32."""
SMALL_BYTES = 1 << 20
"""Logits that lie in the cache: not worth cutting."""
FEWEST_ROWS = 80
"""Of a chunk in a one-pass loss; two passes by slices are as fast as fewer, in less memory."""


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


def rows_per_chunk(
    num_rows: int,
    row_bytes: int,
    on_cuda: bool,
    budget_bytes: int = 0,
    *,
    whole: bool = False,
    unit: int = 1,
    sum_rows: int = 0,
) -> int:
    """Rows of logits to hold at a time.

    Every chunk reads the weight and, in a one-pass loss, adds to its gradient: 8VD bytes beside
    6nVD operations. With n rows that is a twentieth of the time where n = 27 operations per byte,
    the machine's ratio: about 400 rows on a CPU, 4096 on a GPU. So that many are taken, on a CPU
    only as the budget allows, else a sixteenth of all, so as to stay, with what lies beside, below
    a tenth of the logits; but not less than 64. (Where that few would be taken, or no sum over
    chunks is needed, a CPU goes by slices of the vocabulary: `Head.takes_columns`.) A chunk is at
    most 2 GiB. `whole` takes all rows that fit into the budget. Chunks are of equal size, so none
    is a small rest, in multiples of 16; but not so small that they cannot hold a `unit`, rows that
    must be together, if the larger ones could.
    `sum_rows` says how many rows of logits are as large as a float32 sum of the weight's gradient.
    Only more than 16 chunks need one, so chunks of a sixteenth are taken if they are smaller.
    """
    affordable = budget_bytes // row_bytes
    sixteenth = _rounded_up(-(-num_rows // MAX_ROUNDINGS))
    rows = 4096 if on_cuda else min(max(64, sixteenth, affordable), 512)
    if sixteenth <= rows + sum_rows:
        rows = max(rows, sixteenth)
    rows = min(_rounded_up(rows), (2 << 30) // row_bytes)
    rows = max(1, rows, affordable if whole else 0)
    num_chunks = -(-num_rows // rows)
    if num_chunks <= 1:
        return max(1, num_rows)
    even = max(-(-num_rows // num_chunks), unit if unit <= rows else 1)
    return min(_rounded_up(even), rows)


def _rounded_up(rows: int) -> int:
    return -(-rows // 16) * 16


@dataclass(frozen=True)
class Head:
    """Live rows and the output embedding: everything that logits follow from."""

    hidden: Tensor
    """(N, D), contiguous, in the dtype to compute in."""
    weight: Tensor
    """(V, D), same dtype."""
    bias: Tensor | None
    labels: Tensor
    """(N,) int64; IGNORED passes no gradient."""
    row_temperatures: Tensor | None
    """(N,) float32, or None: the temperature of `scalars` holds for all."""
    scalars: tuple[float, float, float]
    """temperature, softcap, logit_scale"""
    budget_bytes: int = 0
    """Logits that may be held."""
    logits_dtype: torch.dtype | None = None
    """None: that of hidden; float32 where products of 16-bit numbers are not to be rounded."""

    @classmethod
    def in_dtype_of_hidden(cls, hidden, weight, bias, *rest) -> Head:
        cast = (None if t is None else t.detach().to(hidden.dtype) for t in (weight, bias))
        return cls(hidden.detach(), *cast, *rest)

    def weight_for_hidden(self) -> Tensor:
        """The weight as `logits @ weight` wants it; a copy only if the budget has room for it."""
        if self.weight.numel() * self.weight.element_size() > self.budget_bytes:
            return self.weight
        return matmul.laid_out(self.weight, self.num_rows)

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def row_bytes(self) -> int:
        return self.vocab_size * (self.logits_dtype or self.hidden.dtype).itemsize

    @property
    def num_kept(self) -> int:
        """Rows whose logits the budget holds."""
        return min(self.budget_bytes // self.row_bytes, self.num_rows)

    def takes_columns(self, one_pass_rows: int = 0, num_products: int = 3) -> bool:
        """Whether to go by slices of the vocabulary, at full speed, and not by chunks of rows.

        Chunks of rows have one use on a CPU: a one-pass loss computes logits once in them and not
        twice, three products instead of four, and leaves out rows without a gradient. So they are
        taken if they hold `one_pass_rows` that make up for their slower products. With a frozen
        weight (`num_products` 2) only the second holds.
        """
        if self.hidden.is_cuda or self.num_rows * self.row_bytes <= SMALL_BYTES:
            return False
        enough = FEWEST_ROWS if num_products == 3 else 4 * FEWEST_ROWS
        return one_pass_rows < min(enough, self.num_rows)

    @property
    def fewest_columns(self) -> int:
        """Of a slice of the vocabulary."""
        return SMALL_BYTES // max(1, self.num_rows * self.row_bytes // self.vocab_size)

    def chunk_rows(self, **options) -> int:
        args = (self.num_rows, self.row_bytes, self.hidden.is_cuda, self.budget_bytes)
        return rows_per_chunk(*args, **options)

    def chunks(self, start: int = 0, stop: int | None = None, size: int = 0) -> list[slice]:
        """Rows from start to stop, `size` at a time."""
        stop, size = self.num_rows if stop is None else stop, size or self.chunk_rows()
        return [slice(a, min(a + size, stop)) for a in range(start, stop, size)]

    def buffer(self, num_rows: int) -> Tensor:
        return on_huge_pages(
            self.hidden.new_empty(num_rows, self.vocab_size, dtype=self.logits_dtype)
        )

    @property
    def temperature(self) -> float | Tensor:
        return self.scalars[0] if self.row_temperatures is None else self.row_temperatures

    def scaled(self, logits: Tensor) -> Tensor:
        """z as the softmax sees it, of one logit of each row."""
        _, softcap, logit_scale = self.scalars
        z = logits * logit_scale
        return (softcap * torch.tanh(z / softcap) if softcap else z) / self.temperature

    def slope_at(self, z: Tensor) -> Tensor:
        """d z / d logit, one of each row."""
        _, softcap, logit_scale = self.scalars
        slope = torch.full_like(z, logit_scale) / self.temperature
        return slope * (1 - (z * self.temperature / softcap).square()) if softcap else slope

    def select(self, rows: slice | Tensor) -> Head:
        """The same head on some of the rows."""
        temperatures = self.row_temperatures
        return replace(
            self,
            hidden=self.hidden[rows],
            labels=self.labels[rows],
            row_temperatures=None if temperatures is None else temperatures[rows],
        )

    def logits(self, out: Tensor) -> Tensor:
        weight = self.weight.t()
        if out.dtype != self.hidden.dtype:
            matmul.unrounded_product(self.hidden, weight, out)
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is None:
            return torch.mm(self.hidden, weight, out=out)
        return torch.addmm(self.bias, self.hidden, weight, out=out)

    def as_operand(self, dlogits: Tensor) -> Tensor:
        """The gradient of some logits, as hidden and weight are multiplied with it."""
        return dlogits.to(self.hidden.dtype)

    def statistics(self, logits: Tensor, outputs: Sequence[str]) -> Statistics:
        """The chosen fields of LogpsOutput, and what backward needs."""
        names = [*outputs, *INTERNAL]
        args = (self.labels, self.row_temperatures, *self.scalars, IGNORED)
        return dict(zip(names, torch.ops.rlhf_fast.logps_forward(logits, *args, names)))

    def statistics_with_gradient_(
        self, logits: Tensor, outputs: Sequence[str], grad_lse: Tensor | None = None
    ) -> Statistics:
        """`statistics`; overwrites logits by the gradient of every log-prob, in the same pass.

        Added to it is `grad_lse` times that of the lse.
        """
        wanted = [*outputs, *INTERNAL]
        ones = torch.ones(self.num_rows, dtype=torch.float32, device=logits.device)
        settings = (self.labels, self.row_temperatures, *self.scalars, IGNORED)
        args = (*settings, wanted, ones, None, grad_lse)
        found = dict(zip(ALL, torch.ops.rlhf_fast.logps_with_grad_(logits, *args)))
        return {name: found[name] for name in wanted}

    def differentiate_(self, logits: Tensor, statistics: Statistics, grads: Grads) -> None:
        """Overwrites logits by the gradient."""
        args = (self.labels, self.row_temperatures, *self.scalars, IGNORED)
        saved = (statistics.get(name) for name in (*INTERNAL, "entropy"))
        torch.ops.rlhf_fast.logps_backward_(logits, *args, *saved, *grads)


def joined(head: Head, parts: list[Statistics], outputs: tuple[str, ...]) -> Statistics:
    """Statistics of chunks as those of all rows."""
    if not parts:
        return head.statistics(head.buffer(0), outputs)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def pick(statistics: Statistics, rows: slice | Tensor) -> Statistics:
    return {name: value[rows] for name, value in statistics.items()}


def pick_grads(grads: Grads, rows: slice | Tensor) -> Grads:
    return [None if g is None else g[rows] for g in grads]


def live_rows(grads: Grads, like: Tensor) -> Tensor | None:
    """Indices of rows with a gradient that is not 0; None for all.

    On CUDA always all: their number is known to the GPU only, and asking would wait for it.
    """
    if like.is_cuda:
        return None
    live = torch.zeros(like.shape[0], dtype=torch.bool)
    for grad in grads:
        if grad is not None:
            live |= grad != 0
    return None if bool(live.all()) else live.nonzero()[:, 0]


def move_to_front_(logits: Tensor, rows: Tensor) -> Tensor:
    """Moves these rows to the front, as few as possible; returns which row now lies where."""
    count, order = len(rows), torch.arange(logits.shape[0])
    is_live = torch.zeros(logits.shape[0], dtype=torch.bool).index_fill_(0, rows, True)
    holes = (~is_live[:count]).nonzero()[:, 0]
    fillers = rows[rows >= count]
    for hole, filler in zip(holes.split(64), fillers.split(64)):
        logits[hole] = logits[filler]
    order[holes] = fillers
    return order[:count]
