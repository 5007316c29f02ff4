"""Tokens in sequences: rows (B, T), or packed (N,) with `cu_seqlens`; checked and handed over."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_fast.ops import native

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check_tokens(op: str, name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
    """What every op asks of the tensor that says how the tokens lie."""
    dims = 2 if cu_seqlens is None else 1
    if tokens.dim() != dims or tokens.dtype not in FLOATS:
        shape = "(B, T)" if cu_seqlens is None else "(N,), the tokens that cu_seqlens divides"
        got = f"{tokens.dtype} {tuple(tokens.shape)}"
        native.check(tokens.dim() == dims, op, f"{name} must have shape {shape}", got, "reshape it")
        native.refuse(op, f"{name} must be of a floating-point type", got, "convert it")
    if cu_seqlens is not None:
        check_offsets(op, cu_seqlens)
        _check_device(op, "cu_seqlens", cu_seqlens, tokens)


def check_like(op: str, name: str, tensor: Tensor | None, tokens: Tensor, shape=None) -> None:
    """An optional companion of the tokens: same device, and their shape unless one is given."""
    if tensor is None:
        return
    shape = tokens.shape if shape is None else shape
    if tensor.shape != shape:
        got = tuple(tensor.shape)
        native.refuse(op, f"{name} must have shape {tuple(shape)}", got, "slice or reshape it")
    _check_device(op, name, tensor, tokens)


def _check_device(op: str, name: str, tensor: Tensor, tokens: Tensor) -> None:
    if tensor.device != tokens.device:
        must = f"{name} must be on {tokens.device}, like the other tensors"
        native.refuse(op, must, tensor.device, "move it")


def check_mask(op: str, mask: Tensor | None, tokens: Tensor, name: str = "mask") -> None:
    check_like(op, name, mask, tokens)
    if mask is not None and mask.dtype != torch.bool:
        must = f"{name} must be bool{', True where a token counts' if name == 'mask' else ''}"
        native.refuse(op, must, mask.dtype, f"convert it with {name}.bool()")


def check_offsets(op: str, offsets: Tensor, name: str = "cu_seqlens") -> None:
    good = offsets.dim() == 1 and offsets.numel() >= 1 and offsets.dtype in INTEGERS
    if not good:
        must = f"{name} must be int32 or int64 of shape (count + 1,)"
        got = f"{offsets.dtype} {tuple(offsets.shape)}"
        native.refuse(op, must, got, "pass the cumulative lengths, starting with 0")


def check_offset_values(op: str, cu_seqlens: Tensor | None, total: int) -> None:
    """On CUDA only in debug mode: it makes the GPU wait."""
    if cu_seqlens is None or (cu_seqlens.is_cuda and not native.debug()):
        return
    if not bool((cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() >= 0).all()):
        must = f"cu_seqlens must rise from 0 to the number of tokens, {total}"
        got = cu_seqlens.tolist() if cu_seqlens.numel() <= 9 else f"{cu_seqlens[:8].tolist()}..."
        native.refuse(op, must, got, "pass the cumulative lengths of the packed sequences")


def num_sequences(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def plain(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """As a kernel reads it: dense, of one dtype, without gradient. These tensors are small."""
    if tensor is None:
        return None
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    return plain(cu_seqlens, torch.int64)


def pack(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """As the bindings take it; `cu_seqlens` comes from `offsets`, and may divide flattened rows."""
    length = tokens.shape[-1] if cu_seqlens is None else 0
    count = num_sequences(tokens, cu_seqlens)
    return count, length, tokens.numel(), native.address(cu_seqlens)


def spans(tokens: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[int, int]]:
    """(begin, end) of each sequence among the flattened tokens; for the `_ref` twins."""
    if cu_seqlens is None:
        length = tokens.shape[1]
        yield from ((row * length, (row + 1) * length) for row in range(tokens.shape[0]))
    else:
        ends = cu_seqlens.tolist()
        yield from zip(ends[:-1], ends[1:])


def padded(tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token of a padded batch lies among packed ones, and whether there is one."""
    ends = cu_seqlens.long()[:, None]
    begins, ends = ends[:-1], ends[1:]
    longest = int((ends - begins).max()) if len(begins) else 0
    index = begins + torch.arange(longest, device=tokens.device)
    inside = index < ends
    return index.masked_fill(~inside, 0), inside
