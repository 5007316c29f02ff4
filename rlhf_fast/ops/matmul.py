"""torch's matrix products by the fastest path that keeps their accuracy, and sums of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_fast.memory import on_huge_pages

_SLICE_BYTES = 1 << 20  # of a product on its way into a sum: stays in the cache
_ROWS = 256  # at a time where dtypes are mixed, as torch converts to new memory
_GPU_SLICE_BYTES = 64 << 20


@functools.cache
def _onednn_keeps_float32() -> bool:
    """Whether "bf16" precision, which sends products to oneDNN, leaves them in float32.

    It does on processors without matrix tiles; a product that bfloat16 would round tells.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    a = torch.linspace(1.0, 1.9, 64 * 256, dtype=torch.float32).reshape(64, 256)
    b = torch.linspace(1.9, 1.0, 256 * 128, dtype=torch.float32).reshape(256, 128)
    truth = a.double() @ b.double()
    with _precision("bf16"):
        return bool(((a @ b).double() / truth - 1.0).abs().max() < 1e-5)


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul
    previous, settings.fp32_precision = settings.fp32_precision, name
    try:
        yield
    finally:
        settings.fp32_precision = previous


@contextlib.contextmanager
def fast_float32() -> Iterator[None]:
    """Inside, float32 products on the CPU take the fastest exact path, also those of backward."""
    with _precision("bf16") if _onednn_keeps_float32() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def fastest(tensor: Tensor) -> Iterator[None]:
    """Inside, products of tensors where this one is take the fastest exact path, outside autocast.

    torch sends float32 products on x86 to MKL, which runs at half speed on AMD processors.
    """
    use_onednn = not tensor.is_cuda and _onednn_keeps_float32()
    with (
        torch.autocast(tensor.device.type, enabled=False),
        _precision("bf16") if use_onednn else contextlib.nullcontext(),
    ):
        yield


def laid_out(weight: Tensor, num_rows: int) -> Tensor:
    """The weight (V, D) in the layout that `logits @ weight` runs fastest in, copied if it pays.

    On the CPU oneDNN takes a sixth less time for a transposed right-hand side, and the copy costs
    as much as that saves at about 700 rows.
    """
    if weight.is_cuda or num_rows < 1024:
        return weight
    return on_huge_pages(weight.new_empty(weight.t().shape)).copy_(weight.t()).t()


def unrounded_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b for 16-bit a and b, in float32 without rounding to 16 bits."""
    if out.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    a = a.to(out.dtype)
    step = max(256, _SLICE_BYTES // (b.shape[0] * out.element_size()))
    for start in range(0, b.shape[1], step):
        columns = slice(start, start + step)
        torch.mm(a, b[:, columns].to(out.dtype), out=out[:, columns])


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a 16-bit product to a float32 sum: before 2.8 it has no call for that,
    and in the first versions with one the sum must be of 16 bits too."""
    if not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    total, factor = (torch.zeros(8, 8, dtype=t, device=device) for t in (torch.float32, dtype))
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with a total of the same dtype or float32."""
    if a.dtype == total.dtype and (total.is_cuda or total.dtype != torch.float32):
        total.addmm_(a, b)
        return
    if total.is_cuda and _adds_to_float32(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    if total.is_cuda:
        unrounded = {"out_dtype": total.dtype} if hasattr(torch.ops.aten.mm, "dtype_out") else {}
        step = max(_ROWS, _GPU_SLICE_BYTES // (total.shape[1] * total.element_size()))
        for sums, rows in zip(total.split(step), a.split(step)):
            sums += torch.mm(rows, b, **unrounded)
        return
    # On the CPU a float32 product that adds to its result is slower than the two in cache.
    step = max(256, _SLICE_BYTES // (total.shape[1] * total.element_size()))
    for start in range(0, total.shape[0], step):
        some = slice(start, start + step)
        for rows, part in zip(total[some].split(_ROWS), (a[some] @ b).split(_ROWS)):
            rows += part


def mix_(total: Tensor, other: Tensor, shares: Tensor) -> None:
    """total = (1 - shares) * total + shares * other, row by row, for a total in float32."""
    for part in zip(total.split(_ROWS), other.split(_ROWS), shares.split(_ROWS)):
        rows, others, share = part
        rows.lerp_(others.float(), share[:, None])


def sum_products(out: Tensor, terms: list[tuple[Tensor, Tensor]]) -> None:
    """out = sum of a @ b over the terms, summed in float32 and rounded once at the end."""
    if len(terms) == 1 and out.dtype == terms[0][0].dtype:
        torch.mm(*terms[0], out=out)
        return
    in_place = out.dtype == torch.float32
    total = out.zero_() if in_place else torch.zeros_like(out, dtype=torch.float32)
    for a, b in terms:
        add_product(total, a, b)
    if not in_place:
        out.copy_(total)
