"""What the benchmarks of the fused heads share: the problem, the products' own time, the table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Contestant
from rlhf_fast.ops import matmul


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @classmethod
    def random(cls, tokens: int, vocab: int, width: int, dtype: torch.dtype) -> Problem:
        """Logits with a standard deviation of about 4."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(harness.DEVICE).manual_seed(tokens + vocab)
        hidden = torch.randn(tokens, width, generator=generator)
        weight = torch.randn(vocab, width, generator=generator) * (4 / math.sqrt(width))
        labels = torch.randint(vocab, (tokens,), generator=generator)
        return cls(hidden.to(device, dtype), weight.to(device, dtype), labels.to(device))

    @property
    def logits_bytes(self) -> int:
        return len(self.hidden) * len(self.weight) * self.hidden.element_size()

    def with_gradients(self, *names: str) -> Problem:
        tensors = (
            getattr(self, n).detach().requires_grad_(n in names) for n in ("hidden", "weight")
        )
        return Problem(*tensors, self.labels)

    def run(self, loss: Callable[[Problem], Tensor]) -> None:
        """Forward, and backward where something needs a gradient."""
        self.hidden.grad = self.weight.grad = None
        if self.hidden.requires_grad or self.weight.requires_grad:
            loss(self).backward()
        else:
            with torch.no_grad():
                loss(self)


def products(problem: Problem) -> dict[str, Callable[[], None]]:
    """The matrix products alone, by the fastest exact path, over preallocated memory."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    for_hidden = matmul.laid_out(weight, len(hidden))
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run(count: int) -> None:
        with matmul.fastest(hidden), torch.no_grad():
            torch.mm(hidden, weight.t(), out=logits)
            if count >= 4:
                torch.mm(logits, for_hidden, out=d_hidden)
            if count >= 6:
                torch.mm(logits.t(), hidden, out=d_weight)

    return {f"products alone, {n}NVD": lambda n=n: run(n) for n in (2, 4, 6)}


KINDS = {
    "no gradient": ((), 2),
    "frozen head": (("hidden",), 4),
    "trainable head": (("hidden", "weight"), 6),
}
"""Name -> (what needs a gradient, products of NVD that this takes at least)."""


def compare(
    stem: str,
    problem: Problem,
    losses: dict[str, Callable[[Problem], Tensor]],
    truth: Callable[[Problem], Tensor],
    args,
    share: float = 1.0,
) -> None:
    """Checks losses against `truth` in float64, then times them and measures their memory.

    `share` of the tokens count: the products alone are timed, and the logits' size taken, for it.
    Every contestant gets the fastest float32 products. Memory is beyond inputs and gradients.
    Who is too slow for `--limit` is named and left out.
    """
    live = max(1, round(len(problem.hidden) * share))
    logits_bytes = problem.logits_bytes * live // len(problem.hidden)
    losses = harness.chosen(losses, args)
    losses = harness.fitting(losses, logits_bytes, copies=11)  # TRL's, trained, holds most
    facts = {
        **harness.describe(),
        "dtype": str(problem.hidden.dtype).removeprefix("torch."),
        "tokens": len(problem.hidden),
        "vocab": len(problem.weight),
        "width": problem.hidden.shape[1],
    }
    with matmul.fast_float32():
        errors = check(problem, losses, truth)
        floors = products(Problem(problem.hidden[:live], problem.weight, problem.labels[:live]))
        for kind, (names, count) in KINDS.items():
            leaves = problem.with_gradients(*names)
            runs = {name: partial(leaves.run, losses[name]) for name in errors}
            floor = f"products alone, {count}NVD"
            contestants = [Contestant(n, run) for n, run in {floor: floors[floor], **runs}.items()]
            times = harness.time_all(contestants, 30, args.seconds, args.limit)
            floor_ms = harness.quantiles(times[floor])["median_ms"]
            rows = [
                {
                    **facts,
                    "kind": kind,
                    "contestant": name,
                    **harness.quantiles(times[name]),
                    "floor_ms": floor_ms,
                    "rms_error": errors.get(name, 0.0),
                    "peak_extra_per_logits": _extra(runs.get(name), logits_bytes),
                }
                for name in times
            ]
            shape = " ".join(f"{n}={facts[n]}" for n in ("tokens", "vocab", "width"))
            harness.print_table(f"{stem}, {kind}, {facts['dtype']}, {shape}", rows)
            for row in rows:
                extra = row["peak_extra_per_logits"]
                print(f"  {row['contestant']:28} peak extra / logits {extra:6.3f}")
            if args.save:
                print("saved to", harness.record(stem, rows))


def _extra(run: Callable[[], None] | None, logits_bytes: int) -> float:
    if run is None or not harness.peak_is_known():
        return math.nan
    return round(harness.peak_extra_bytes(run) / logits_bytes, 4)


def check(problem: Problem, losses, truth) -> dict[str, float]:
    """Relative RMS error of the worse gradient; who is wrong does not take part."""
    small = Problem.random(64, 1000, 64, problem.hidden.dtype)
    exact = Problem(small.hidden.double(), small.weight.double(), small.labels)
    exact = exact.with_gradients("hidden", "weight")
    exact.run(truth)

    def error_of(loss) -> float:
        leaves = small.with_gradients("hidden", "weight")
        leaves.run(loss)
        worst = 0.0
        for got, want in ((leaves.hidden, exact.hidden), (leaves.weight, exact.weight)):
            difference = (got.grad.double() - want.grad).square().mean().sqrt()
            worst = max(worst, (difference / want.grad.square().mean().sqrt()).item())
        assert worst < 0.1, f"gradients off by {worst:.2g}"
        return worst

    return harness.checked(losses, error_of)


def loss_contestants(
    ours: Callable[[int, Problem], Tensor],
    from_logps: Callable[[Callable], Callable[[Problem], Tensor]],
    logps_functions: dict[str, Callable],
    liger: tuple[str, Callable[[], Callable]],
) -> dict[str, Callable[[Problem], Tensor]]:
    """A fused loss, the same loss over each way to get log-probs, and Liger's where installed."""
    found = {
        "rlhf_fast, budget 0": lambda p: ours(0, p),
        "rlhf_fast, budget for all": lambda p: ours(1 << 40, p),
    }
    for name, function in logps_functions.items():
        if "rlhf_fast" not in name:
            found[f"{name}, no prompt"] = from_logps(function)
    name, make = liger
    with available(name):
        found[name] = make()
    return found


@contextmanager
def available(name: str) -> Iterator[None]:
    """Inside, what is not installed is told and left out."""
    try:
        yield
    except ImportError as error:
        _tell(f"  without {name}: {error}")


@functools.cache
def _tell(line: str) -> None:
    """Prints it, once."""
    print(line)


def race_losses(stem: str, losses: Callable[[], dict[str, Callable]], args) -> None:
    """Compares fused losses at every dtype and vocabulary asked for; half the rows are prompt."""
    for dtype in (getattr(torch, name) for name in args.dtype):
        for vocab in args.vocab:
            torch._dynamo.reset()
            problem = Problem.random(args.tokens, vocab, args.width, dtype)
            truth = losses()["eager, no prompt"]
            compare(stem, problem, losses(), truth, args, share=0.5)


SWEEP = ("tokens", "vocab", "width")


def curves(loss: Callable[[Problem], Tensor], sizes: dict[str, int], dtype: torch.dtype):
    """What to run at these sizes, for each kind of head that needs a gradient."""
    problem = Problem.random(**sizes, dtype=dtype)
    leaves = {kind: problem.with_gradients(*names) for kind, (names, _) in KINDS.items() if names}
    return {kind: partial(p.run, loss) for kind, p in leaves.items()}


def whole(sizes: dict[str, int], dtype: torch.dtype) -> tuple[str, int]:
    return "all logits", sizes["tokens"] * sizes["vocab"] * dtype.itemsize
