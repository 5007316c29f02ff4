"""Logits by slices of the vocabulary, all rows at once, where they are not kept on a CPU.

A product with few rows orders the whole weight anew: at 64 rows it takes a third longer. Slices of
the vocabulary of the same size read the weight once and run at full speed. What is known of each
slice's softmax adds up to that of all, as in attention over blocks of keys (arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_fast.memory import give_back
from rlhf_fast.ops import matmul
from rlhf_fast.ops.head import Grads, Head, Statistics, joined
from rlhf_fast.ops.head_inputs import IGNORED
from rlhf_fast.ops.logps_kernels import INTERNAL

NUM_SLICES = 24
"""Of the logits: with what lies beside it, a slice stays below a tenth of all."""
MOST_ROWS = 4096
"""Beyond these, memory does not grow with the rows."""


@dataclass(frozen=True)
class Slice:
    """Some columns of the logits, and a buffer for them."""

    columns: slice
    head: Head
    """Of these columns alone; labels in others are ignored."""
    is_elsewhere: Tensor
    """(N,) bool: whether the label lies in other columns."""
    buffer: Tensor

    def logits(self) -> Tensor:
        return self.head.logits(self.buffer)

    def statistics_with_gradient_(self, logits: Tensor, outputs: Sequence[str]) -> Statistics:
        """Overwrites logits by the gradient of log-probs among these columns.

        A label elsewhere still lowers every probability here: its d logp is -d lse.
        """
        through_lse = self.is_elsewhere.float().neg()
        return self.head.statistics_with_gradient_(logits, outputs, through_lse)

    def differentiate_(self, logits: Tensor, statistics: Statistics, grads: Grads) -> None:
        """Overwrites logits by the gradient; statistics are those of all columns."""
        grad_logps, grad_entropy, grad_lse = grads
        if grad_logps is not None:
            through_lse = grad_logps.float().neg().masked_fill(~self.is_elsewhere, 0.0)
            grad_lse = through_lse if grad_lse is None else grad_lse + through_lse
        self.head.differentiate_(logits, statistics, (grad_logps, grad_entropy, grad_lse))


def slices(head: Head) -> Iterator[Slice]:
    """The columns of all rows, slice by slice; the buffer is the same memory in each."""
    if head.num_rows == 0:
        yield Slice(slice(0, head.vocab_size), head, head.labels < 0, head.buffer(0))
        return
    width = -(-head.vocab_size // NUM_SLICES) * min(MOST_ROWS, head.num_rows) // head.num_rows
    width = max(64, -(-max(width, head.fewest_columns) // 64) * 64)
    width = min(width, head.vocab_size)
    flat = head.hidden.new_empty(head.num_rows * width, dtype=head.logits_dtype)
    for start in range(0, head.vocab_size, width):
        stop = min(start + width, head.vocab_size)
        labels = head.labels - start
        is_out = (labels < 0) | (labels >= stop - start)
        local = replace(
            head,
            weight=head.weight[start:stop],
            bias=None if head.bias is None else head.bias[start:stop],
            labels=labels.masked_fill(is_out, IGNORED),
        )
        buffer = flat[: head.num_rows * (stop - start)].view(head.num_rows, -1)
        yield Slice(slice(start, stop), local, is_out & (head.labels != IGNORED), buffer)
    give_back(flat)


def statistics_by_columns(head: Head, outputs: tuple[str, ...]) -> Statistics:
    found = []
    for rows in head.chunks(size=MOST_ROWS):
        parts = _Parts(head.select(rows), outputs)
        parts.read()
        found.append(parts.statistics())
    return joined(head, found, outputs)


def gradient_by_columns(head: Head, outputs: tuple[str, ...]) -> tuple[Statistics, Tensor]:
    """Statistics, and the gradient of every log-prob with respect to its row of hidden."""
    found, gradient = [], torch.empty_like(head.hidden)
    for rows in head.chunks(size=MOST_ROWS):
        parts = _Parts(head.select(rows), outputs)
        mean = parts.read_with_gradient(gradient[rows])
        found.append(parts.statistics())
        parts.add_rest_of_label_(mean)
        gradient[rows] = mean
    return joined(head, found, outputs), gradient


class _Parts:
    """Statistics of the slices so far, each as if there were no others. (S, N) of S slices."""

    def __init__(self, head: Head, outputs: tuple[str, ...]) -> None:
        self.head, self.outputs = head, outputs
        self.needed = ("lse", *(n for n in outputs if n not in ("logps", "lse")))
        self.parts: list[Statistics] = []
        self.lse = torch.tensor(-torch.inf, dtype=torch.float64)
        self.log_share = self.label_logits = self.lse

    def read(self) -> None:
        for piece in slices(self.head):
            logits = piece.logits()
            seen = self._seen(piece, logits)
            self.parts.append(piece.head.statistics(logits, self.needed) | seen)

    def read_with_gradient(self, scratch: Tensor) -> Tensor:
        """The gradient of log-probs, but for `add_rest_of_label_`; `scratch` is overwritten."""
        mean = torch.zeros_like(scratch, dtype=torch.float32)
        for piece in slices(self.head):
            logits = piece.logits()
            seen = self._seen(piece, logits)
            self.parts.append(piece.statistics_with_gradient_(logits, self.needed) | seen)
            share = self._share_of_last()
            torch.mm(self.head.as_operand(logits), piece.head.weight, out=scratch)
            if bool((share == 0).any()):  # perhaps NaN, where every logit is -inf
                scratch.masked_fill_((share == 0)[:, None], 0)
            matmul.mix_(mean, scratch, share)
        return mean

    def _seen(self, piece: Slice, logits: Tensor) -> Statistics:
        """What has to be read from logits before they are overwritten."""
        labels = piece.head.labels
        chosen = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0].double()
        seen = {"has_label": labels != IGNORED, "label_logit": self.head.scaled(chosen)}
        if "is_top1" in self.outputs:
            seen["highest"] = logits.amax(1)
        if "mean_logit" in self.outputs:
            seen["width"] = torch.full_like(chosen, piece.head.vocab_size)
        return seen

    def _share_of_last(self) -> Tensor:
        """Of the last slice in the probability of those so far, (N,) float32."""
        lse = self._lse(self.parts[-1])
        self.lse = torch.logaddexp(self.lse, lse)
        return (lse - self.lse).exp().masked_fill(lse == -torch.inf, 0.0).float()

    def _lse(self, part: Statistics) -> Tensor:
        lse = self._of_reference(part["reference"]) + part["log_sum"]
        return lse.masked_fill(part["lse"] == -torch.inf, -torch.inf)

    def _of_reference(self, reference: Tensor) -> Tensor:
        """z where a kernel has its reference, which is in units of csrc/math/logits.h."""
        _, softcap, logit_scale = self.head.scalars
        return reference.double() * (softcap or logit_scale) / self.head.temperature

    def statistics(self) -> Statistics:
        """Of all columns, as `Head.statistics` gives them."""
        names = list(self.parts[0])
        parts = {name: torch.stack([part.pop(name) for part in self.parts]) for name in names}
        part_lse, has_label = self._lse(parts), parts["has_label"]
        lse, is_empty = part_lse.logsumexp(0), part_lse == -torch.inf
        undefined, is_ignored = is_empty.all(0), ~has_label.any(0)
        shares = (part_lse - lse).exp().masked_fill(undefined, torch.nan)
        label_lse = part_lse.where(has_label, 0.0).sum(0)
        self.log_share = (label_lse - lse).masked_fill(is_ignored, 0.0)
        self.label_logits = parts["label_logit"].where(has_label, 0.0).sum(0)
        logps = (self.label_logits - lse).clamp(max=0.0).masked_fill(is_ignored, 0.0)
        values = {"lse": lse, "logps": logps}
        if "entropy" in parts:
            of_parts = shares * parts["entropy"].masked_fill(is_empty, 0.0)
            values["entropy"] = (of_parts + torch.special.entr(shares)).sum(0)
        if "sum_p2" in parts:
            of_parts = shares.square() * parts["sum_p2"].masked_fill(is_empty, 0.0)
            values["sum_p2"] = of_parts.sum(0)
        if "mean_logit" in parts:
            of_parts = parts["mean_logit"] * (parts["width"] / self.head.vocab_size)
            values["mean_logit"] = of_parts.sum(0)
        if "highest" in parts:
            first = parts["highest"].argmax(0, keepdim=True)
            values["is_top1"] = parts["is_top1"].gather(0, first)[0]
        reference = parts["reference"].gather(0, part_lse.argmax(0, keepdim=True))[0]
        values |= {"reference": reference, "log_sum": lse - self._of_reference(reference)}
        found = {name: values[name] for name in (*self.outputs, *INTERNAL)}
        return {n: t if t.dtype == torch.bool else t.float() for n, t in found.items()}

    def add_rest_of_label_(self, gradient: Tensor) -> None:
        """Adds what the mean of the slices' gradients lacks of the label's logit.

        The slice that holds it has it in full, but counts by its share only.
        """
        rest = -torch.expm1(self.log_share)
        factor = (rest * self.head.slope_at(self.label_logits)).masked_fill(rest == 0, 0.0)
        for rows in self.head.chunks(size=256):
            labels = self.head.weight[self.head.labels[rows].clamp(min=0)]
            gradient[rows].addcmul_(labels.float(), factor[rows, None].float())
