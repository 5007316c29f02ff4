"""Modules of a Hugging Face decoder that are computed by `fused` while it runs, then put back.

Nothing is replaced by its name alone: each kind of module is tried on random numbers first, and
what does not give the same values stays. So do adapted, quantised and hooked layers.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rlhf_fast.models import fused

Forward = Callable[[Tensor], Tensor]
ROTARY = "apply_rotary_pos_emb"
JOINT = ("q_proj", "k_proj", "v_proj")
GATED = {"gate_proj", "up_proj", "down_proj"}


class LeanForward:
    """What can be replaced in a decoder, found once; `with lean():` replaces it."""

    def __init__(self, decoder: nn.Module) -> None:
        self.runs, self.rows = False, None
        self.joints: list[_Joint] = []
        self.forwards: list[tuple[nn.Module, Callable]] = []
        trusted: dict[tuple, bool] = {}
        for module in decoder.modules():
            for target, forward in self._replacements(module):
                key = (type(target), *map(type, module.modules()))
                if key not in trusted:
                    trusted[key] = _same(target, forward)
                if trusted[key]:
                    self.forwards.append((target, forward))
        own = list(decoder.layers[-1].modules()) if getattr(decoder, "layers", None) else []
        gated = [m for m, _ in self.forwards if GATED <= dict(m.named_children()).keys()]
        self.last_mlp = next((module for module in gated if module in own), None)
        """Nothing after it looks at other tokens, so it may run on those alone that are read."""
        homes = {sys.modules[type(module).__module__] for module in decoder.modules()}
        self.functions = [
            (home, vars(home)[ROTARY])
            for home in homes
            if vars(home).get(ROTARY, _rotary) is not _rotary and _rotates_alike(vars(home)[ROTARY])
        ]

    def _replacements(self, module: nn.Module) -> list[tuple[nn.Module, Callable]]:
        children = dict(module.named_children())
        if type(module).__name__.endswith("RMSNorm"):
            return _norm(module)
        if set(children) - {"act_fn"} == GATED and _is_gated_mlp(module):
            return [(module, functools.partial(_gated, module))]
        linears = [children.get(name) for name in JOINT]
        if all(map(_is_plain, linears)):
            widths = {linear.in_features for linear in linears}
            biased = {linear.bias is None for linear in linears}
            if len(widths) == len(biased) == 1:
                joint = _Joint(linears)
                self.joints.append(joint)
                return [(linear, functools.partial(joint, k)) for k, linear in enumerate(linears)]
        return []

    def checkpointed(self) -> tuple[contextlib.AbstractContextManager, ...]:
        """For torch's checkpoint: what surrounds a layer now, and when backward repeats it."""
        nothing = contextlib.nullcontext()
        return nothing, _Again(self, self.rows) if self.runs else nothing

    @contextlib.contextmanager
    def __call__(self, rows: Tensor | None = None) -> Iterator[None]:
        """With `rows`, of the flattened tokens, each once, other tokens' states are undefined."""
        changed = [(m, f) for m, f in self.forwards if "forward" not in vars(m)]
        for module, forward in changed:
            if module is self.last_mlp and rows is not None:
                forward = functools.partial(_on_rows, forward, rows)
            module.forward = forward
        for home, _ in self.functions:
            setattr(home, ROTARY, _rotary)
        before, (self.runs, self.rows) = (self.runs, self.rows), (True, rows)
        try:
            yield
        finally:
            self.runs, self.rows = before
            for module, _ in changed:
                del module.forward
            for home, original in self.functions:
                setattr(home, ROTARY, original)
            for joint in self.joints:
                joint.clear()


class _Again(contextlib.ExitStack):
    """The replacements of a forward, for each time that it is repeated."""

    def __init__(self, lean: LeanForward, rows: Tensor | None) -> None:
        super().__init__()
        self.lean, self.rows = lean, rows

    def __enter__(self) -> _Again:
        self.enter_context(self.lean(self.rows))
        return self


class _Joint:
    """The linear layers of one input: the first that is called computes all of them."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.linears = linears
        self.clear()

    def clear(self) -> None:
        self.source: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def __call__(self, index: int, x: Tensor) -> Tensor:
        if any(map(_is_hooked, self.linears)):  # which may bring each its own weight alone
            return nn.functional.linear(x, self.linears[index].weight, self.linears[index].bias)
        if self.source is not x or index not in self.outputs:
            weights, biases = zip(*((linear.weight, linear.bias) for linear in self.linears))
            self.source = x
            self.outputs = dict(enumerate(fused.joint_linear(x, list(weights), list(biases))))
        output = self.outputs.pop(index)
        if not self.outputs:
            self.clear()
        return output


def _norm(module: nn.Module) -> list[tuple[nn.Module, Callable]]:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return []
    own = module.forward

    def forward(x: Tensor, offset: float = 0.0) -> Tensor:
        return fused.rms_norm(x, module.weight, eps, offset) if x.dtype == torch.float32 else own(x)

    shifted = functools.partial(forward, offset=1.0)
    return [(module, shifted if _same(module, shifted) else forward)]


def _gated(module: nn.Module, x: Tensor) -> Tensor:
    if not _is_gated_mlp(module):  # an adapter came later
        return type(module).forward(module, x)
    weights = (module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)
    return fused.gated_mlp(x, *weights, module.act_fn)


def _on_rows(forward: Forward, rows: Tensor, x: Tensor) -> Tensor:
    flat = x.flatten(0, -2)
    result = forward(flat[rows])
    return result.new_zeros(flat.shape).index_copy(0, rows, result).view_as(x)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return fused.rotate(q, cos, sin), fused.rotate(k, cos, sin)


def _is_plain(module: nn.Module | None) -> bool:
    """A linear layer, not adapted nor quantised, with nothing around it that would be skipped."""
    is_linear = type(module) is nn.Linear
    return is_linear and "forward" not in vars(module) and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _is_gated_mlp(module: nn.Module) -> bool:
    linears = [getattr(module, name) for name in GATED]
    return all(_is_plain(linear) and linear.bias is None for linear in linears)


@torch.no_grad()
def _same(module: nn.Module, forward: Forward) -> bool:
    """Whether both give the same for random numbers."""
    weight = next(module.parameters())
    width = getattr(module, "in_features", None) or getattr(module, "hidden_size", None)
    x = torch.randn(2, 3, width or weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(
        weight.device, weight.dtype
    )
    try:
        own = module.forward(x)
        return torch.allclose(forward(x), own, rtol=1e-4, atol=1e-5 * own.abs().max().item())
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False


@torch.no_grad()
def _rotates_alike(function: Callable) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = torch.randn(2, 2, 3, 8, generator=generator)
    try:
        alike = all(map(torch.allclose, _rotary(q, k, cos, sin), function(q, k, cos, sin)))
    except (RuntimeError, TypeError, ValueError):
        return False
    try:
        function(q, k, cos[..., :4], sin[..., :4])
    except RuntimeError:
        return alike
    return False  # it may be asked to rotate a part of the head only
