"""Logits that are not computed until somebody needs more of them than log-probs.

Frameworks call `model(...)`, take `.logits`, slice, scale and gather. `DeferredLogits` are hidden
states that answer to what those frameworks do next, so that the fused head can take over.
Everything else computes the logits after all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.integrations.deferred_scores import (
    Deferred,
    DeferredLogSoftmax,
    Memory,
    cross_entropy,
)
from rlhf_fast.ops import LogpsOutput, linear_logps, native

ROWS_AT_A_TIME = 1024  # where logits are needed after all, but not all at once


class DeferredLogits(Deferred):
    """What `scale * F.linear(hidden, weight, bias)` would be, of shape (..., V)."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
        rows: Tensor | None = None,
        memory: Memory | None = None,
    ):
        self.hidden, self.weight, self.bias, self.scale = hidden, weight, bias, scale
        self.dtype = dtype or _product_dtype(hidden)
        self.memory = memory or Memory(hidden.shape[:-1], hidden.device)
        self.rows = self.memory.rows if rows is None else rows
        self.computed: Tensor | None = None
        self.entropy: Tensor | None = None

    def compute(self) -> Tensor:
        """The logits themselves, for whatever is not foreseen here."""
        if self.computed is None:
            self.computed = self._rows(self.hidden)
        return self.computed

    def _rows(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        return (logits if self.scale == 1.0 else logits * self.scale).to(self.dtype)

    @property
    def fused(self) -> bool:
        """Whether the fused head can take over."""
        return self.computed is None and self.hidden.dtype in native.DTYPES and self.scale > 0

    def logps(self, labels: Tensor, **settings) -> LogpsOutput:
        """What `ops.logps` would give for the logits."""
        return linear_logps(
            self.hidden, self.weight, labels, bias=self.bias, logit_scale=self.scale, **settings
        )

    def logps_of(self, labels: Tensor, **settings) -> Tensor:
        """Log-probs alone. The entropy comes from the same product, and is often asked for next."""
        out = self.logps(labels, outputs=("logps", "entropy"), **settings)
        if settings.get("temperature", 1.0) == 1.0:
            self.entropy = out.entropy
        return out.logps

    def labelled_logps(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Log-probs of the rows that have a label, each label of a row computed once."""
        compute = lambda fresh: self.logps(fresh, ignore_index=ignore_index).logps  # noqa: E731
        key = (self.scale, torch.is_grad_enabled())
        return self.memory.logps(self.rows, labels, ignore_index, key, compute)

    def _but(self, **changed) -> DeferredLogits:
        names = ("hidden", "weight", "bias", "scale", "dtype", "rows", "memory")
        return DeferredLogits(**{name: getattr(self, name) for name in names} | changed)

    def _at(self, select: Callable[[Tensor], Tensor]) -> DeferredLogits:
        return self._but(hidden=select(self.hidden), rows=select(self.rows))

    # ---- what can be said without computing ------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def ndim(self) -> int:
        return self.hidden.dim()

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        return self.hidden.requires_grad or self.weight.requires_grad

    def dim(self) -> int:
        return self.hidden.dim()

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index):
        rows = self._index_of_rows(index)
        if self.computed is not None or rows is None:
            return self.compute()[index]
        return self._at(lambda x: x[rows])

    def _index_of_rows(self, index) -> tuple | None:
        """The index without its part for the vocabulary; None if it selects from that."""
        parts = list(index) if isinstance(index, tuple) else [index]
        consumed = [
            p.dim() if isinstance(p, Tensor) and p.dtype == torch.bool else int(p is not None)
            for p in parts
            if p is not Ellipsis
        ]
        places = [i for i, p in enumerate(parts) if p is Ellipsis]
        for place in places[:1]:
            parts[place : place + 1] = [slice(None)] * (self.ndim - sum(consumed))
            consumed[place:place] = [1] * (self.ndim - sum(consumed))
        if sum(consumed) < self.ndim:
            return tuple(parts)
        last = parts[-1]
        return tuple(parts[:-1]) if isinstance(last, slice) and last == slice(None) else None

    def index_select(self, dim: int, index: Tensor):
        if self.computed is not None or self._is_vocabulary(dim):
            return self.compute().index_select(dim, index)
        return self._at(lambda x: x.index_select(dim, index))

    def split(self, size, dim: int = 0):
        if self.computed is not None or self._is_vocabulary(dim):
            return self.compute().split(size, dim)
        parts = zip(self.hidden.split(size, dim), self.rows.split(size, dim))
        return tuple(self._but(hidden=hidden, rows=rows) for hidden, rows in parts)

    def chunk(self, chunks: int, dim: int = 0):
        if self.computed is not None or self._is_vocabulary(dim):
            return self.compute().chunk(chunks, dim)
        parts = zip(self.hidden.chunk(chunks, dim), self.rows.chunk(chunks, dim))
        return tuple(self._but(hidden=hidden, rows=rows) for hidden, rows in parts)

    def _is_vocabulary(self, dim: int) -> bool:
        return dim % self.ndim == self.ndim - 1

    def view(self, *shape):
        """Leading dimensions may be flattened; others hold logits in another order."""
        if self.computed is not None or shape != (-1, self.shape[-1]):
            return self.compute().view(*shape)
        return self._but(hidden=self.hidden.flatten(0, -2), rows=self.rows.flatten())

    def contiguous(self):
        return self if self.computed is None else self.computed.contiguous()

    def detach(self):
        if self.computed is not None:
            return self.computed.detach()
        bias = None if self.bias is None else self.bias.detach()
        parts = {"hidden": self.hidden.detach(), "weight": self.weight.detach(), "bias": bias}
        detached = self._but(**parts, rows=None, memory=None)
        detached.entropy = None if self.entropy is None else self.entropy.detach()
        return detached

    def to(self, *args, **kwargs):
        if self.computed is None and args in ((torch.float32,), (self.dtype,)) and not kwargs:
            return self._but(dtype=args[0])
        return self.compute().to(*args, **kwargs)

    def float(self):
        return self.to(torch.float32)

    def __mul__(self, other):
        if self.computed is None and isinstance(other, int | float):
            return self._but(scale=self.scale * other)
        return self.compute() * other

    def __truediv__(self, other):
        if self.computed is None and isinstance(other, int | float):
            return self._but(scale=self.scale / other)
        return self.compute() / other

    def div_(self, other):
        if self.computed is None and isinstance(other, int | float):
            self.scale, self.entropy = self.scale / other, None
        else:
            self.compute().div_(other)
        return self

    # ---- what needs less than the logits ---------------------------------------------------------

    def mean(self, *args, **kwargs):
        """Over rows and vocabulary, or the vocabulary: products with the mean of the weight."""
        if self.computed is None and not args and not kwargs:
            return self._sum() / (math.prod(self.shape) or math.nan)
        if self.computed is None and args == (-1,) and not kwargs:
            mean = self.weight.mean(0, dtype=torch.float32)
            shift = 0.0 if self.bias is None else self.bias.mean(dtype=torch.float32)
            return (self.hidden.float() @ mean + shift) * self.scale
        return self.compute().mean(*args, **kwargs)

    def nansum(self, *args, **kwargs):
        if self.computed is None and not args and not kwargs:
            return self._sum()
        return self.compute().nansum(*args, **kwargs)

    def _sum(self) -> Tensor:
        rows = self.hidden.flatten(0, -2)
        total = rows.sum(0, dtype=torch.float32) @ self.weight.sum(0, dtype=torch.float32)
        if self.bias is not None:
            total = total + len(rows) * self.bias.sum(dtype=torch.float32)
        return total * self.scale

    def argmax(self, dim: int | None = None):
        if self.computed is not None or dim is None or not self._is_vocabulary(dim):
            return self.compute().argmax(dim)
        with torch.no_grad():
            rows = self.hidden.flatten(0, -2).split(ROWS_AT_A_TIME)
            return torch.cat([self._rows(r).argmax(-1) for r in rows]).view(self.shape[:-1])

    def log_softmax(self, dim: int = -1, dtype: torch.dtype | None = None):
        if not self.fused or not self._is_vocabulary(dim) or dtype is not None:
            return self.compute().log_softmax(dim, dtype)
        return DeferredLogSoftmax(self)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.cross_entropy and isinstance(args[0], cls):
            return cross_entropy(*args, **kwargs or {})
        return super().__torch_function__(function, types, args, kwargs)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _computing(name):
    def method(self, *args):
        return getattr(self.compute(), name)(*args)

    return method


for _name in ("add", "radd", "sub", "rsub", "rmul", "rtruediv", "neg", "matmul", "iter"):
    setattr(DeferredLogits, f"__{_name}__", _computing(f"__{_name}__"))
