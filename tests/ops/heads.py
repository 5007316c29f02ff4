"""What the tests of the fused heads share: problems, gradients, and the bar for their error."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ops.conftest import assert_as_accurate


@dataclass
class Problem:
    """A head and its rows; float tensors require the gradients that `frozen` does not name."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    frozen: tuple[str, ...] = ()

    def leaves(self, dtype: torch.dtype | None = None) -> Problem:
        """A copy with fresh leaves, perhaps in another dtype."""

        def fresh(name):
            tensor = getattr(self, name)
            if tensor is None:
                return None
            return tensor.detach().clone().to(dtype).requires_grad_(name not in self.frozen)

        return replace(self, **{name: fresh(name) for name in ("hidden", "weight", "bias")})

    def gradients(self) -> dict[str, Tensor]:
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {n: t.grad for n, t in tensors.items() if t is not None and t.grad is not None}


def make(
    num_rows=300,
    vocab=333,
    width=24,
    dtype=torch.float32,
    masked=False,
    bias=False,
    device="cpu",
    **options,
) -> Problem:
    generator = torch.Generator().manual_seed(num_rows + vocab)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    labels = torch.randint(vocab, (num_rows,), generator=generator)
    if masked:
        labels[: num_rows // 10] = -100
    mask = torch.rand(num_rows, generator=generator) < 0.7 if masked else None
    return Problem(
        hidden=randn(num_rows, width).to(device, dtype),
        weight=(randn(vocab, width) * 0.6).to(device, dtype),
        labels=labels.to(device),
        bias=randn(vocab).to(device, dtype) if bias else None,
        mask=None if mask is None else mask.to(device),
        **options,
    )


def check_against_float64(
    problem: Problem,
    fused: Callable[[Problem], dict[str, Tensor]],
    plain: Callable[[Problem], dict[str, Tensor]],
    upstream: dict[str, Tensor],
) -> None:
    """Values and gradients of `fused` as accurate as those of plain PyTorch in the same dtype.

    Both map a problem to named outputs; `upstream` holds the gradient of each that has one.
    """
    runs = []
    for function, dtype in ((fused, None), (plain, None), (plain, torch.float64)):
        leaves = problem.leaves(dtype or problem.hidden.dtype)
        outputs = function(leaves)
        sum(
            (outputs[name] * g.to(problem.hidden.device)).sum() for name, g in upstream.items()
        ).backward()
        runs.append((outputs, leaves.gradients()))
    for part, factor in ((0, 2.0), (1, 3.0)):
        names = [set(run[part]) for run in runs]
        assert names[0] == names[1] == names[2], "gradients where there should be none, or none"
        for name in names[0]:
            triple = [run[part][name] for run in runs]
            if triple[0].dim() == 0:  # the error of a single number is chance, so no ratio of two
                exact = problem.hidden.dtype == torch.float32
                rtol, atol = (1e-5, 1e-6) if exact else (5e-2, 1e-2)
                torch.testing.assert_close(triple[0].double(), triple[2], rtol=rtol, atol=atol)
                continue
            assert_as_accurate(("", "gradient of ")[part] + name, *triple, factor=factor)


class Allocations(TorchDispatchMode):
    """Inside, counts the bytes of new tensors that torch's operations return.

    Other than a process's peak, these are the same in every run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in old and storage not in self.seen:
                self.seen.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, num_bytes: int) -> None:
        self.held += num_bytes
        self.peak = max(self.peak, self.held)
