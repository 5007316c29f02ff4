"""Merging of models as pure functions of one parameter of each, in float32."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf_fast.errors import UserError


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_i weights[i] * tensors[i]` (model soups; equal weights: SALSA, arXiv 2411.01798)."""
    return sum(w * t for w, t in zip(weights, tensors))


def slerp(first: Tensor, second: Tensor, fraction: float) -> Tensor:
    """Spherical interpolation: along the arc between the two, seen as vectors.

    `sin((1-t) W) / sin W * first + sin(t W) / sin W * second`, W the angle between them; linear
    where they are parallel. Keeps the norm of what is interpolated. Source: WARP, arXiv 2406.16768.
    """
    norms = first.norm() * second.norm()
    cosine = (first.flatten() @ second.flatten() / norms).clamp(-1, 1) if norms > 0 else 1.0
    angle = math.acos(float(cosine))
    if math.sin(angle) < 1e-6:
        return linear([first, second], [1 - fraction, fraction])
    near, far = math.sin((1 - fraction) * angle), math.sin(fraction * angle)
    return linear([first, second], [near / math.sin(angle), far / math.sin(angle)])


def warp(base: Tensor, tensors: Sequence[Tensor], scale: float) -> Tensor:
    """`base + scale * slerp of the task vectors`: WARP's stages two and three.

    More than two models are joined one after the other, the m-th with fraction 1 / m. `scale` < 1
    goes back towards the initialisation (LITI). Source: arXiv 2406.16768.
    """
    merged = tensors[0] - base
    for count, tensor in enumerate(tensors[1:], 2):
        merged = slerp(merged, tensor - base, 1 / count)
    return base + scale * merged


def extrapolate(base: Tensor, tensor: Tensor, scale: float) -> Tensor:
    """`tensor + scale * (tensor - base)`: momentum across iterations (APO, arXiv 2410.06293)."""
    return tensor + scale * (tensor - base)


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], scale: float
) -> Tensor:
    """`base + scale * sum_i weights[i] * (tensors[i] - base)` (arXiv 2212.04089)."""
    return base + scale * linear([t - base for t in tensors], weights)


def ties(base: Tensor, tensors: Sequence[Tensor], density: float, scale: float) -> Tensor:
    """Trim, elect sign, merge the agreeing entries (TIES, arXiv 2306.01708).

    Of each task vector the `density` largest entries by magnitude stay; the sign of an entry is
    that of the sum; entries of that sign are averaged.
    """
    vectors = torch.stack([largest(t - base, density) for t in tensors])
    sign = vectors.sum(0).sign()
    agrees = (vectors.sign() == sign) & (vectors != 0)
    mean = (vectors * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    return base + scale * mean


def dare(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    scale: float,
    generator: torch.Generator,
) -> Tensor:
    """Drop entries of the task vectors at random and rescale the rest by 1 / density.

    Unbiased: the expectation is task arithmetic. Source: DARE, arXiv 2311.03099.
    """
    vectors = [dropped(t - base, density, generator) for t in tensors]
    return base + scale * linear(vectors, weights)


def largest(vector: Tensor, density: float) -> Tensor:
    """The `density` largest entries by magnitude, one at least; the others become 0."""
    keep = max(1, round(density * vector.numel()))
    kept = vector.abs().flatten().topk(keep).indices
    result = torch.zeros_like(vector).flatten()
    result[kept] = vector.flatten()[kept]
    return result.view_as(vector)


def dropped(vector: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries drawn with probability `density`, divided by it; the others become 0."""
    kept = torch.rand(vector.shape, generator=generator) < density
    return vector * kept.to(vector.device) / density


def locate_tensors(path: Path) -> dict[str, Path]:
    """Which file of the checkpoint holds which parameter."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} has no .safetensors file")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise UserError(f"{file}: damaged checkpoint ({error})") from error
    index = path / "model.safetensors.index.json"
    if index.is_file():  # without one of its files a model would be merged without those weights
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if missing := sorted({file for name, file in places.items() if name not in found}):
            raise UserError(f"{path}: the model must be whole, got none of {', '.join(missing)}")
    return found
