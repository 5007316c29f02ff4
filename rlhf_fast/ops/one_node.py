"""Fused head losses in compiled code: one node of the graph, which runs what eager code runs.

How many rows are live is known only from the data, so a compiler cannot look inside. But a loss's
gradient can be taken with it, and then every shape is known before: those of the outputs, and those
of the tensors that need a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import autograd, native

Tensors = Sequence[Tensor | None]


class Settings(NamedTuple):
    """What is no tensor, as the op's schema takes it."""

    words: list[str]
    numbers: list[float]


class _Node(NamedTuple):
    function: Callable[[Tensors, Settings], tuple[Tensor, ...]]
    fake: Callable[[Tensors], tuple[Tensor, ...]]


_nodes: dict[str, _Node] = {}


def register(name: str, function: Callable, fake: Callable) -> None:
    """`function`: (tensors, settings) -> the loss and other outputs, none of them a view.

    `fake`: (tensors) -> empty tensors of the same shapes.
    """
    _nodes[name] = _Node(function, fake)


def call(name: str, tensors: Tensors, settings: Settings) -> tuple[Tensor, ...]:
    """The outputs of that function; the first is differentiable in the floating-point tensors."""
    needs = [autograd.wants_gradient(t) for t in tensors]
    constants = [None if t is None else t.detach() for t in tensors]
    loss, *found = torch.ops.rlhf_fast.loss_node(name, constants, needs, *settings)
    inputs = [t for t, is_needed in zip(tensors, needs) if is_needed and t is not None]
    count = len(found) - len(inputs)
    if inputs:
        loss = autograd.one_pass(loss, inputs, found[count:])
    return loss, *found[:count]


def to_settings(record: object) -> Settings:
    """A flat dataclass of words and numbers; None becomes "" and NaN."""
    values = [getattr(record, field.name) for field in fields(record)]
    words = [value if isinstance(value, str) else "" for value in values]
    return Settings(words, [number(None if isinstance(v, str) else v) for v in values])


def from_settings(kind: type, settings: Settings):
    """The dataclass of that kind that `to_settings` has taken apart."""
    values = {}
    for field, word, value in zip(fields(kind), *settings, strict=True):
        values[field.name] = word or optional(value)
        if values[field.name] is not None and field.type == "int | None":
            values[field.name] = int(value)
    return kind(**values)


def number(value: float | None) -> float:
    return math.nan if value is None else value


def optional(value: float) -> float | None:
    return None if math.isnan(value) else value


# ---- the op that torch's dispatcher knows --------------------------------------------------------

native.LIBRARY.define(
    "loss_node(str name, Tensor?[] tensors, bool[] needs, str[] words, float[] numbers) -> Tensor[]"
)


def _needed(tensors: Tensors, needs: Sequence[bool]) -> list[Tensor]:
    return [t for t, is_needed in zip(tensors, needs) if is_needed and t is not None]


def _forward(name, tensors, needs, words, numbers):
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    # Compiled graphs run below autograd, which is needed here.
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        leaves = [
            t.detach().requires_grad_() if is_needed else t for t, is_needed in zip(tensors, needs)
        ]
        loss, *others = _nodes[name].function(leaves, Settings(words, numbers))
        inputs = _needed(leaves, needs)
        gradients = torch.autograd.grad(loss, inputs) if inputs else ()
    return [loss.detach(), *others, *gradients]


def _fake(name, tensors, needs, words, numbers):
    return [*_nodes[name].fake(tensors), *map(torch.empty_like, _needed(tensors, needs))]


_AUTOGRAD_KEYS = [
    getattr(torch._C.DispatchKey, name)
    for name in (
        "AutogradFunctionality",
        "AutogradOther",
        "AutogradCPU",
        "AutogradCUDA",
        "ADInplaceOrView",
    )
]
native.implement("loss_node", _forward)
torch.library.register_fake("rlhf_fast::loss_node", lib=native.LIBRARY)(_fake)
