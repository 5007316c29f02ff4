"""Merging of models: pure functions of tensors, and checkpoints merged one tensor at a time.

A rule takes one parameter of every model, in float32, and returns the merged parameter.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_directory_atomic
from rlhf_fast.seeds import derive_seed

Method = Literal["linear", "slerp", "warp", "extrapolate", "task", "ties", "dare", "layers"]
Rule = Callable[[str, Sequence[Tensor]], Tensor]
"""(name, the parameter of every model in order) -> the merged parameter."""


@dataclass(frozen=True)
class MergeConfig:
    """How models become one."""

    method: Method = "linear"
    """linear: weighted mean of the models (soups). slerp: between two models. warp: base + scale *
    slerp of the models' task vectors. extrapolate: the model, and `scale` further away from the
    base. task, ties, dare: base + scale * the combined task vectors. layers: base to model, by one
    ratio per group of layers."""
    weights: tuple[float, ...] = ()
    """One per model for linear, task and dare, normalised to sum 1; none means equal. The ratios of
    the layer groups, from input to output, for layers."""
    scale: float = 1.0
    """Interpolation of slerp (0 = first, 1 = second model), and the factor of the others."""
    density: float = 0.2
    """Share of a task vector's entries that ties and dare keep."""
    seed: int = 0
    """Of the entries that dare drops."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UserError(f"merge: density must be in (0, 1], got {self.density}")
        if self.method == "layers" and not self.weights:
            raise UserError("merge: layers needs weights, one ratio per group of layers")

    @property
    def needs_base(self) -> bool:
        return self.method not in ("linear", "slerp")


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
    vectors = torch.stack([_largest(t - base, density) for t in tensors])
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
    vectors = []
    for tensor in tensors:
        kept = torch.rand(tensor.shape, generator=generator) < density
        vectors.append((tensor - base) * kept / density)
    return base + scale * linear(vectors, weights)


def layer_group(name: str, num_layers: int, num_groups: int) -> int:
    """Group of a parameter: layers in order in equal parts; embeddings first, the rest last."""
    layer = re.search(r"\.(\d+)\.", name)
    if layer:
        return int(layer[1]) * num_groups // num_layers
    return 0 if "embed" in name or ".wte" in name or ".wpe" in name else num_groups - 1


def make_rule(config: MergeConfig, names: Sequence[str], count: int) -> Rule:
    """The rule of a configuration for `count` models; with a base, it comes first."""
    weights = config.weights or (1.0,) * count
    _check_count(config, count, weights)
    scale, total = config.scale, sum(weights)
    if config.method == "layers":
        layers = [int(m[1]) for n in names if (m := re.search(r"\.(\d+)\.", n))]
        depth = max(layers, default=0) + 1

        def by_layer(name: str, tensors: Sequence[Tensor]) -> Tensor:
            ratio = weights[layer_group(name, depth, len(weights))]
            return linear(tensors, [1 - ratio, ratio])

        return by_layer
    shares = [w / total for w in weights]

    def dropped(name: str, tensors: Sequence[Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(config.seed, name))
        return dare(
            tensors[0],
            tensors[1:],
            shares,
            density=config.density,
            scale=scale,
            generator=generator,
        )

    return {
        "linear": lambda name, t: linear(t, shares),
        "slerp": lambda name, t: slerp(*t, scale),
        "warp": lambda name, t: warp(t[0], t[1:], scale),
        "extrapolate": lambda name, t: extrapolate(*t, scale),
        "task": lambda name, t: task_arithmetic(t[0], t[1:], shares, scale),
        "ties": lambda name, t: ties(t[0], t[1:], config.density, scale),
        "dare": dropped,
    }[config.method]


def merge_checkpoints(
    output: Path,
    models: Sequence[Path | str],
    config: MergeConfig,
    *,
    base: Path | str | None = None,
) -> None:
    """Writes the merged model; at any time one parameter of each model is in memory.

    Names, dtypes, files and tokenizer are those of `base`, or else of the first model.
    """
    if config.needs_base == (base is None):
        needs = "needs a base model" if config.needs_base else "takes no base model"
        raise UserError(f"merge: {config.method} {needs}")
    paths = [Path(p) for p in ((base, *models) if base is not None else models)]
    tensors = [_locate(path) for path in paths]
    for path, found in zip(paths[1:], tensors[1:]):
        if found.keys() != tensors[0].keys():
            odd = sorted(found.keys() ^ tensors[0].keys())
            raise UserError(f"merge: {path} and {paths[0]} have different parameters: {odd[:3]}")
    rule = make_rule(config, list(tensors[0]), len(models))

    def fill(directory: Path) -> None:
        for file in paths[0].iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copyfile(file, directory / file.name)
        for file in sorted(set(tensors[0].values())):
            names = [name for name, place in tensors[0].items() if place == file]
            _write_file(directory / file.name, names, tensors, rule)

    write_directory_atomic(output, fill)


def _check_count(config: MergeConfig, count: int, weights: Sequence[float]) -> None:
    single = config.method in ("extrapolate", "layers")
    exact = 1 if single else 2 if config.method == "slerp" else None
    if count < 1 or (exact is not None and count != exact):
        raise UserError(f"merge: {config.method} takes {exact or 'some'} models, got {count}")
    if config.method != "layers" and len(weights) != count:
        raise UserError(f"merge: one weight per model, got {len(weights)} for {count} models")
    if config.method in ("linear", "task", "dare") and sum(weights) == 0:
        raise UserError("merge: the weights must not sum to 0")


def _largest(vector: Tensor, density: float) -> Tensor:
    keep = max(1, round(density * vector.numel()))
    kept = vector.abs().flatten().topk(keep).indices
    result = torch.zeros_like(vector).flatten()
    result[kept] = vector.flatten()[kept]
    return result.view_as(vector)


def _locate(path: Path) -> dict[str, Path]:
    """Which file of the checkpoint holds which parameter."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"merge: {path} has no .safetensors file")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise UserError(f"{file}: damaged checkpoint ({error})") from error
    return found


def _write_file(
    path: Path, names: Sequence[str], tensors: Sequence[dict[str, Path]], rule: Rule
) -> None:
    """One safetensors file, written parameter by parameter behind a header made beforehand."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        with safe_open(tensors[0][name], framework="pt") as file:
            entry = file.get_slice(name)
            dtype, shape = entry.get_dtype(), entry.get_shape()
            size = file.get_tensor(name).nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            output.write(_merged(name, tensors, rule))


def _merged(name: str, tensors: Sequence[dict[str, Path]], rule: Rule) -> bytes:
    values = []
    for place in tensors:
        with safe_open(place[name], framework="pt") as file:
            values.append(file.get_tensor(name))
    if {v.shape for v in values} != {values[0].shape}:
        raise UserError(f"merge: {name} has shapes {[tuple(v.shape) for v in values]}")
    dtype = values[0].dtype
    if not dtype.is_floating_point:  # buffers such as position ids
        result = values[0]
    else:
        result = rule(name, [v.float() for v in values]).to(dtype)
    return result.contiguous().flatten().view(torch.uint8).numpy().tobytes()
