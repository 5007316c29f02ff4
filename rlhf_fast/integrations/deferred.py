"""Logits that are not computed until somebody needs more of them than log-probs.

Frameworks call `model(...)`, take `.logits`, slice, scale and gather. In `deferred_heads(...)` the
output embedding returns `DeferredLogits`: hidden states that answer to what those frameworks do
next, so that the fused head can take over. Everything else computes the logits after all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from rlhf_fast.ops import LogpsOutput, linear_logps, native

ROWS_AT_A_TIME = 1024  # where logits are needed after all, but not all at once


@contextlib.contextmanager
def deferred_heads(*models: nn.Module | None) -> Iterator[None]:
    """Within the block these models return `DeferredLogits`, if their heads allow it."""
    heads = {id(head): head for head in map(plain_head, models) if head is not None}
    for head in heads.values():
        head.forward = lambda hidden, head=head: DeferredLogits(hidden, head.weight, head.bias)
    try:
        yield
    finally:
        for head in heads.values():
            del head.forward


def plain_head(model: nn.Module | None) -> nn.Linear | None:
    """The output embedding, where its weight can also be read outside the model's forward.

    None for adapters and quantised heads, for weights that are sharded (FSDP, ZeRO-3) or offloaded,
    and for wrappers that look into the output: these keep computing logits.
    """
    while isinstance(getattr(model, "module", None), nn.Module):
        if isinstance(model, nn.DataParallel) or getattr(model, "find_unused_parameters", False):
            return None
        model = model.module
    if hasattr(model, "_orig_mod") or not hasattr(model, "get_output_embeddings"):
        return None
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    weight = head.weight
    whole = weight.shape == (head.out_features, head.in_features) and not hasattr(weight, "ds_id")
    return head if whole and not isinstance(weight, DTensor) and not weight.is_meta else None


class DeferredLogits:
    """What `scale * F.linear(hidden, weight, bias)` would be, of shape (..., V)."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ):
        self.hidden, self.weight, self.bias, self.scale = hidden, weight, bias, scale
        self.dtype = dtype or _product_dtype(hidden)
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

    def _but(self, hidden: Tensor, **changed) -> DeferredLogits:
        kept = {"scale": self.scale, "dtype": self.dtype} | changed
        return DeferredLogits(hidden, self.weight, self.bias, **kept)

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
        return self._but(self.hidden[rows])

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
        return self._but(self.hidden.index_select(dim, index))

    def split(self, size, dim: int = 0):
        if self.computed is not None or self._is_vocabulary(dim):
            return self.compute().split(size, dim)
        return tuple(map(self._but, self.hidden.split(size, dim)))

    def chunk(self, chunks: int, dim: int = 0):
        if self.computed is not None or self._is_vocabulary(dim):
            return self.compute().chunk(chunks, dim)
        return tuple(map(self._but, self.hidden.chunk(chunks, dim)))

    def _is_vocabulary(self, dim: int) -> bool:
        return dim % self.ndim == self.ndim - 1

    def contiguous(self):
        return self if self.computed is None else self.computed.contiguous()

    def detach(self):
        if self.computed is not None:
            return self.computed.detach()
        bias = None if self.bias is None else self.bias.detach()
        settings = (self.scale, self.dtype)
        detached = DeferredLogits(self.hidden.detach(), self.weight.detach(), bias, *settings)
        detached.entropy = None if self.entropy is None else self.entropy.detach()
        return detached

    def to(self, *args, **kwargs):
        if self.computed is None and args in ((torch.float32,), (self.dtype,)) and not kwargs:
            return self._but(self.hidden, dtype=args[0])
        return self.compute().to(*args, **kwargs)

    def float(self):
        return self.to(torch.float32)

    def __mul__(self, other):
        if self.computed is None and isinstance(other, int | float):
            return self._but(self.hidden, scale=self.scale * other)
        return self.compute() * other

    def __truediv__(self, other):
        if self.computed is None and isinstance(other, int | float):
            return self._but(self.hidden, scale=self.scale / other)
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

    # ---- everything else -------------------------------------------------------------------------

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.compute(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.compute, (args, kwargs or {}))
        return function(*args, **kwargs)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _computing(name):
    def method(self, *args):
        return getattr(self.compute(), name)(*args)

    return method


for _name in ("add", "radd", "sub", "rsub", "rmul", "rtruediv", "neg", "matmul", "iter"):
    setattr(DeferredLogits, f"__{_name}__", _computing(f"__{_name}__"))


class DeferredLogSoftmax:
    """`log_softmax(logits, -1)`, waiting for the labels to gather."""

    def __init__(self, logits: DeferredLogits):
        self.logits = logits

    def compute(self) -> Tensor:
        return self.logits.compute().log_softmax(-1)

    def gather(self, dim: int, index: Tensor) -> Tensor:
        logits = self.logits
        if dim % logits.ndim != logits.ndim - 1 or index.shape != (*logits.shape[:-1], 1):
            return self.compute().gather(dim, index)
        return logits.logps_of(index[..., 0])[..., None].to(logits.dtype)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.compute(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.gather:
            return _gather(*args, **kwargs or {})
        if function is torch.take_along_dim:
            return _take_along_dim(*args, **kwargs or {})
        args, kwargs = tree_map_only(cls, cls.compute, (args, kwargs or {}))
        return function(*args, **kwargs)


def _gather(input, dim, index):
    return input.gather(dim, index)


def _take_along_dim(input, indices, dim=None):
    return input.compute().take_along_dim(indices) if dim is None else input.gather(dim, indices)
