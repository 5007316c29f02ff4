"""What every framework asks of logits: log-probs of labels and the entropy of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops import LogpsOutput, logps, native
from rlhf_fast.ops.logps import MAX_LABELS_PER_ROW

NO_LABEL = torch.iinfo(torch.int32).min  # the frameworks know no ignored label at these seams


def fits(logits: Tensor, labels: Tensor | None = None) -> bool:
    """Whether the kernel takes these tensors. The rest (float64, DTensor, vocabularies that are not
    contiguous in memory, hundreds of labels per row) stays with the framework's own function."""
    return (
        type(logits) is Tensor
        and logits.dtype in native.DTYPES
        and logits.dim() > 1
        and logits.shape[-1] > 0
        and logits.stride(-1) == 1
        and native.row_strides(logits) is not None
        and (
            labels is None
            or labels.shape == logits.shape[:-1]
            or (labels.dim() == logits.dim() and 1 <= labels.shape[-1] <= MAX_LABELS_PER_ROW)
        )
    )


def from_logits(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    outputs: tuple[str, ...] = ("logps",),
) -> LogpsOutput:
    """`ops.logps` in the frameworks' terms: rows where `row_mask` is 0 are 0 in every output."""
    if labels is None:
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    if row_mask is not None:
        labels = labels.masked_fill(row_mask == 0, NO_LABEL)
    out = logps(logits, labels, temperature=temperature, ignore_index=NO_LABEL, outputs=outputs)
    if row_mask is not None and out.entropy is not None:
        out = out._replace(entropy=out.entropy.masked_fill(row_mask == 0, 0.0))
    return out
