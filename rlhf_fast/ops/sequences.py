"""Tokens in sequences: rows (B, T), or packed (N,) with `cu_seqlens`; checked and handed over."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_fast.ops import native

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tokens(op: str, name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
    """What every op asks of the tensor that says how the tokens lie."""
    got = f"{tokens.dtype} {tuple(tokens.shape)}"
    dims = 2 if cu_seqlens is None else 1
    shape = "(B, T)" if cu_seqlens is None else "(N,), the tokens that cu_seqlens divides"
    native.check(tokens.dim() == dims, op, f"{name} must have shape {shape}", got, "reshape it")
    native.check(
        tokens.dtype in FLOATS, op, f"{name} must be of a floating-point type", got, "convert it"
    )
    if cu_seqlens is not None:
        check_offsets(op, cu_seqlens)
        native.check(
            cu_seqlens.device == tokens.device,
            op,
            f"cu_seqlens must be on {tokens.device}, like the other tensors",
            cu_seqlens.device,
            "move it",
        )


def check_like(op: str, name: str, tensor: Tensor | None, tokens: Tensor, shape=None) -> None:
    """An optional companion of the tokens: same device, and their shape unless one is given."""
    if tensor is None:
        return
    shape = tuple(tokens.shape if shape is None else shape)
    native.check(
        tuple(tensor.shape) == shape,
        op,
        f"{name} must have shape {shape}",
        tuple(tensor.shape),
        "slice or reshape it to match",
    )
    native.check(
        tensor.device == tokens.device,
        op,
        f"{name} must be on {tokens.device}, like the other tensors",
        tensor.device,
        "move it",
    )


def check_mask(op: str, mask: Tensor | None, tokens: Tensor) -> None:
    check_like(op, "mask", mask, tokens)
    native.check(
        mask is None or mask.dtype == torch.bool,
        op,
        "mask must be bool, True where a token counts",
        None if mask is None else mask.dtype,
        "convert it with mask.bool()",
    )


def check_offsets(op: str, offsets: Tensor, name: str = "cu_seqlens") -> None:
    native.check(
        offsets.dim() == 1 and offsets.numel() >= 1 and offsets.dtype in (torch.int32, torch.int64),
        op,
        f"{name} must be int32 or int64 of shape (count + 1,)",
        f"{offsets.dtype} {tuple(offsets.shape)}",
        "pass the cumulative lengths, starting with 0",
    )


def check_offset_values(op: str, cu_seqlens: Tensor | None, total: int) -> None:
    """On CUDA only in debug mode: it makes the GPU wait."""
    if cu_seqlens is None or (cu_seqlens.is_cuda and not native.debug()):
        return
    good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() >= 0).all()
    native.check(
        bool(good),
        op,
        f"cu_seqlens must rise from 0 to the number of tokens, {total}",
        cu_seqlens.tolist() if cu_seqlens.numel() <= 9 else f"{cu_seqlens[:8].tolist()}...",
        "pass the cumulative lengths of the packed sequences",
    )


def num_sequences(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def plain(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """As a kernel reads it: dense, of one dtype, without gradient. These tensors are small."""
    return None if tensor is None else tensor.detach().to(dtype).contiguous()


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
