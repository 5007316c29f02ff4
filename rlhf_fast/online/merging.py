"""Checkpoints merged one tensor at a time, by the rules of models/merging.py.

A rule takes one parameter of every model, in float32, and returns the merged parameter.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_directory_atomic
from rlhf_fast.models.adapter_folder import merge_folder
from rlhf_fast.models.merging import (
    dare,
    extrapolate,
    linear,
    locate_tensors,
    slerp,
    task_arithmetic,
    ties,
    warp,
)
from rlhf_fast.models.names import MODEL_FILES, base_of_adapters, model_directory
from rlhf_fast.models.reward_model import GATE_FILE
from rlhf_fast.seeds import derive_seed

Method = Literal[
    "linear", "shared", "slerp", "warp", "extrapolate", "task", "ties", "dare", "layers"
]
LAYER = re.compile(r"\.(\d+)\.")
"""In the name of a parameter of a layer: its number."""
Rule = Callable[[str, Sequence[Tensor]], Tensor]
"""(name, the parameter of every model in order) -> the merged parameter."""


@dataclass(frozen=True)
class MergeConfig:
    """How models become one."""

    method: Method = "linear"
    """linear: weighted mean of the models (soups). shared: that of the parameters which all have;
    outside of the layers the first model keeps what only it has, as a reward model its head when
    a language model is merged into it (DogeRM, arXiv 2407.01470). slerp: between two models. warp:
    base + scale * slerp of the models' task vectors. extrapolate: the model, and `scale` further
    away from the base. task, ties, dare: base + scale * the combined task vectors. layers: base to
    model, by one ratio per group of layers."""
    weights: tuple[float, ...] = ()
    """One per model for linear, shared, task and dare, normalised to sum 1; none means equal. The
    ratios of the layer groups, from input to output, for layers."""
    scale: float = 1.0
    """Interpolation of slerp (0 = first, 1 = second model), and the factor of the others."""
    density: float = 0.2
    """Share of a task vector's entries that ties and dare keep."""
    seed: int = 0
    """Of the entries that dare drops."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UserError(f"merge.density must be in (0, 1], got {self.density}")
        if self.method == "layers" and not self.weights:
            raise UserError("merge.method layers needs weights, one ratio per group of layers")

    @property
    def needs_base(self) -> bool:
        return self.method not in ("linear", "shared", "slerp")


def layer_group(name: str, num_layers: int, num_groups: int) -> int:
    """Group of a parameter: layers in order in equal parts; embeddings first, the rest last."""
    if layer := LAYER.search(name):
        return int(layer[1]) * num_groups // num_layers
    return 0 if "embed" in name or ".wte" in name or ".wpe" in name else num_groups - 1


def make_rule(config: MergeConfig, names: Sequence[str], count: int) -> Rule:
    """The rule of a configuration for `count` models; with a base, it comes first."""
    weights = config.weights or (1.0,) * count
    _check_count(config, count, weights)
    scale, total = config.scale, sum(weights)
    if config.method == "layers":
        layers = [int(m[1]) for n in names if (m := LAYER.search(n))]
        depth = max(layers, default=0) + 1

        def by_layer(name: str, tensors: Sequence[Tensor]) -> Tensor:
            ratio = weights[layer_group(name, depth, len(weights))]
            return linear(tensors, [1 - ratio, ratio])

        return by_layer
    shares = [w / total for w in weights]

    def by_dare(name: str, tensors: Sequence[Tensor]) -> Tensor:
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
        "shared": lambda name, t: linear(t, shares) if len(t) == count else t[0],
        "slerp": lambda name, t: slerp(*t, scale),
        "warp": lambda name, t: warp(t[0], t[1:], scale),
        "extrapolate": lambda name, t: extrapolate(*t, scale),
        "task": lambda name, t: task_arithmetic(t[0], t[1:], shares, scale),
        "ties": lambda name, t: ties(t[0], t[1:], config.density, scale),
        "dare": by_dare,
    }[config.method]


def merge_checkpoints(
    output: Path,
    models: Sequence[Path | str],
    config: MergeConfig,
    *,
    base: Path | str | None = None,
) -> None:
    """Writes the merged model; at any time one parameter of each model is in memory.

    Names, dtypes, files and tokenizer are those of `base`, or else of the first model. A folder of
    adapters stands for its base with them merged in, written to disk meanwhile.
    """
    if config.needs_base == (base is None):
        needs = "needs a base model" if config.needs_base else "takes no base model"
        raise UserError(f"merge.method {config.method} {needs}")
    names = [base, *models] if base is not None else models
    with tempfile.TemporaryDirectory(prefix="rlhf_fast_merge_") as folder:
        paths = [
            _whole_model(name, "models" if name in models else "base", Path(folder) / str(i))
            for i, name in enumerate(names)
        ]
        tensors = [locate_tensors(path) for path in paths]
        for name, found in zip(names[1:], tensors[1:]):
            odd = sorted(found.keys() ^ tensors[0].keys())
            if config.method == "shared":
                odd = [parameter for parameter in odd if LAYER.search(parameter)]
            if odd:
                raise UserError(f"{name} and {names[0]} have different parameters: {odd[:3]}")
        rule = make_rule(config, list(tensors[0]), len(models))
        write_directory_atomic(output, lambda directory: _fill(directory, paths[0], tensors, rule))


def _whole_model(name: Path | str, argument: str, place: Path) -> Path:
    """The model's directory; adapters are merged into their base at `place`."""
    path = model_directory(name, argument, files=(*MODEL_FILES, GATE_FILE))
    if (path / GATE_FILE).is_file():
        raise UserError(f"{argument}: {name} is a reward model with a gate, which no rule merges")
    if base_of_adapters(path) is not None:
        merge_folder(path, place)
        return place
    return path


def _fill(directory: Path, first: Path, tensors: Sequence[dict[str, Path]], rule: Rule) -> None:
    """Configuration and tokenizer of the first model, with the parameters merged."""
    for file in {file for pattern in MODEL_FILES for file in first.glob(pattern)}:
        if file.suffix != ".safetensors":
            shutil.copyfile(file, directory / file.name)
    for file in sorted(set(tensors[0].values())):
        names = [name for name, place in tensors[0].items() if place == file]
        _write_file(directory / file.name, names, tensors, rule)


def _check_count(config: MergeConfig, count: int, weights: Sequence[float]) -> None:
    single = config.method in ("extrapolate", "layers")
    exact = 1 if single else 2 if config.method == "slerp" else None
    if count < 1 or (exact is not None and count != exact):
        raise UserError(f"merge.method {config.method} takes {exact or 'some'} models, got {count}")
    if config.method != "layers" and len(weights) != count:
        raise UserError(f"merge.weights must be one per model, got {len(weights)} for {count}")
    if config.method in ("linear", "shared", "task", "dare") and sum(weights) == 0:
        raise UserError("merge.weights must not sum to 0")


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
    for place in [place for place in tensors if name in place]:
        with safe_open(place[name], framework="pt") as file:
            values.append(file.get_tensor(name))
    if {v.shape for v in values} != {values[0].shape}:
        raise UserError(f"{name} has shapes {[tuple(v.shape) for v in values]}")
    dtype = values[0].dtype
    if not dtype.is_floating_point:  # buffers such as position ids
        result = values[0]
    else:
        result = rule(name, [v.float() for v in values]).to(dtype)
    return result.contiguous().flatten().view(torch.uint8).numpy().tobytes()
