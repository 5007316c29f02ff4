"""What is asked of `DeferredLogits` for single labels: log-probs, kept and shared, and losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

NOWHERE = -1
UNKNOWN = torch.iinfo(torch.int64).min  # a label that no row has


class Memory:
    """Log-probs of one model output that were asked for, by row of that output.

    ORPO asks for the chosen response's twice, in its NLL and in its odds.
    """

    def __init__(self, shape: torch.Size, device: torch.device):
        self.rows = torch.arange(math.prod(shape), device=device).view(shape)
        self.kept: dict[tuple[float, bool], tuple[Tensor, Tensor, Tensor]] = {}

    def logps(self, rows: Tensor, labels: Tensor, ignore_index: int, key, compute: Callable):
        """Log-probs of `labels` in these rows, 0 where ignored; `compute(labels)` for new ones."""
        live = labels != ignore_index
        if key not in self.kept:
            logps = compute(labels)
            places = self.rows.new_full((self.rows.numel(),), NOWHERE)
            places[rows.flatten()] = torch.arange(rows.numel(), device=rows.device)
            found = labels.long().masked_fill(~live, UNKNOWN)
            self.kept[key] = (places, found.flatten(), logps.flatten())
            return logps
        places, found, logps = self.kept[key]
        place = places[rows]
        known = live & (place != NOWHERE) & (found[place] == labels)
        return torch.where(known, logps[place], compute(labels.masked_fill(known, ignore_index)))


def cross_entropy(logits, target, weight=None, *args, ignore_index=-100, reduction="mean", **more):
    """`F.cross_entropy`; sums and means are float32 whatever the logits are."""
    options = {"ignore_index": ignore_index, "reduction": reduction} | more
    plain = weight is None and not args and not any(more.values()) and reduction in ("mean", "sum")
    if not plain or not logits.fused or target.shape != logits.shape[:-1] or logits.ndim != 2:
        return F.cross_entropy(logits.compute(), target, weight, *args, **options)
    loss = -logits.labelled_logps(target, ignore_index).sum()
    return loss / (target != ignore_index).sum() if reduction == "mean" else loss


class Deferred:
    """Stands for a tensor that is computed once something is asked of it that is not known here."""

    def compute(self) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.compute(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.compute, (args, kwargs or {}))
        return function(*args, **kwargs)


class DeferredLogSoftmax(Deferred):
    """`log_softmax(logits, -1)`, waiting for the labels to gather."""

    def __init__(self, logits):
        self.logits = logits

    def compute(self) -> Tensor:
        return self.logits.compute().log_softmax(-1)

    def gather(self, dim: int, index: Tensor) -> Tensor:
        logits = self.logits
        if dim % logits.ndim != logits.ndim - 1 or index.shape != (*logits.shape[:-1], 1):
            return self.compute().gather(dim, index)
        return logits.logps_of(index[..., 0])[..., None].to(logits.dtype)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.gather:
            return _gather(*args, **kwargs or {})
        if function is torch.take_along_dim:
            return _take_along_dim(*args, **kwargs or {})
        return super().__torch_function__(function, types, args, kwargs)


def _gather(input, dim, index):
    return input.gather(dim, index)


def _take_along_dim(input, indices, dim=None):
    return input.compute().take_along_dim(indices) if dim is None else input.gather(dim, indices)
