"""What every framework asks of logits: log-probs of labels and the entropy of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.integrations.deferred import DeferredLogits
from rlhf_fast.ops import LogpsOutput, logps, native
from rlhf_fast.ops.logps_inputs import MAX_LABELS_PER_ROW

ONE_LABEL = "a row must have one label"
DTYPES = "float32, bfloat16 or float16"
NO_LABEL = torch.iinfo(torch.int32).min  # the frameworks know no ignored label at these seams


def misfit(
    logits: Tensor | DeferredLogits | LiveLogits, labels: Tensor | None = None
) -> str | None:
    """Why the kernel does not take these tensors and the framework's own function has to; or None.

    What it does not take: float64, DTensor, vocabularies that are not contiguous in memory, and
    hundreds of labels per row.
    """
    if isinstance(logits, LiveLogits):
        logits = logits.logits
    if isinstance(logits, DeferredLogits) and logits.computed is not None:
        logits = logits.computed
    if isinstance(logits, DeferredLogits):
        if labels is not None and labels.shape != logits.shape[:-1]:
            return ONE_LABEL
        return misfit_of_hidden(logits.hidden) or (
            None if logits.fused else "temperature must be positive"
        )
    if type(logits) is not Tensor:
        return f"logits must be a plain tensor, got {type(logits).__name__}"
    if logits.dtype not in native.DTYPES:
        return f"logits must be {DTYPES}, got {logits.dtype}"
    if logits.dim() < 2 or logits.shape[-1] == 0:
        return "logits must have rows and a vocabulary"
    if logits.stride(-1) != 1 or native.row_strides(logits) is None:
        return "logits must be contiguous along the vocabulary, in evenly spaced rows"
    if labels is None or labels.shape == logits.shape[:-1]:
        return None
    several = labels.dim() == logits.dim() and 1 <= labels.shape[-1] <= MAX_LABELS_PER_ROW
    return None if several else f"a row must have 1 to {MAX_LABELS_PER_ROW} labels"


def misfit_of_hidden(hidden: Tensor) -> str | None:
    """Why a fused head does not take these hidden states, or None."""
    fits = hidden.dtype in native.DTYPES
    return None if fits else f"hidden states must be {DTYPES}, got {hidden.dtype}"


def from_logits(
    logits: Tensor | DeferredLogits | LiveLogits,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    outputs: tuple[str, ...] = ("logps",),
    inplace_backward: bool = False,
) -> LogpsOutput:
    """`ops.logps` in the frameworks' terms: rows where `row_mask` is 0 are 0 in every output."""
    if isinstance(logits, LiveLogits):
        logits, row_mask = logits.logits, logits.live
    if labels is None:
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    if row_mask is not None:
        labels = labels.masked_fill(row_mask == 0, NO_LABEL)
    settings = {"temperature": temperature, "ignore_index": NO_LABEL}
    if isinstance(logits, DeferredLogits):
        if logits.computed is None:
            return _from_deferred(logits, labels, outputs, settings, row_mask is not None)
        logits = logits.computed
    out = logps(logits, labels, outputs=outputs, inplace_backward=inplace_backward, **settings)
    if row_mask is not None and out.entropy is not None:
        out = out._replace(entropy=out.entropy.masked_fill(row_mask == 0, 0.0))
    return out


def _from_deferred(logits, labels, outputs, settings, masked: bool) -> LogpsOutput:
    if outputs == ("logps",) and masked and settings["temperature"] == 1.0:
        return LogpsOutput(logps=logits.labelled_logps(labels, settings["ignore_index"]))
    if outputs == ("logps",) and not masked:
        return LogpsOutput(logps=logits.logps_of(labels, **settings))
    if outputs == ("entropy",) and logits.entropy is not None:
        known = logits.entropy
        return LogpsOutput(entropy=known if torch.is_grad_enabled() else known.detach())
    return logits.logps(labels, outputs=outputs, **settings)


class LiveLogits:
    """Logits for code that only wants labels' log-probs, which are 0 in dead rows.

    Such code reads `torch.gather(logits[:, :-1, :].log_softmax(-1), 2, labels[..., None])`, or
    calls a function that is patched.
    """

    def __init__(self, logits: Tensor | DeferredLogits, live: Tensor):
        self.logits, self.live = logits, live
        self.shape, self.dtype = logits.shape, logits.dtype

    @classmethod
    def labelled(cls, logits: Tensor | DeferredLogits, labels: Tensor, ignore_index: int):
        """Live is each position whose next label is not `ignore_index`."""
        return cls(logits, F.pad(labels[:, 1:] != ignore_index, (0, 1), value=False))

    def __getitem__(self, index: tuple) -> LiveLogits:
        return LiveLogits(self.logits[index], self.live[index[:-1]])

    def log_softmax(self, dim: int) -> LiveLogits:
        return self

    def gather(self, dim: int, index: Tensor) -> Tensor:
        return from_logits(self.logits, index[..., 0], row_mask=self.live).logps[..., None]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return cls.gather(*args, **kwargs) if function is torch.gather else NotImplemented
