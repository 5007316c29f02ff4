"""Log-probs from hidden states: forward with backward, and without."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, heads
from benchmarks.heads import Problem
from rlhf_fast.ops import linear_logps


def upstream(problem: Problem) -> Tensor:
    """d loss / d logps: different for every row, as in reinforcement learning."""
    return torch.linspace(-1.0, 1.0, len(problem.labels), device=problem.labels.device)


def eager(p: Problem) -> Tensor:
    logits = F.linear(p.hidden, p.weight)
    return torch.log_softmax(logits, -1).gather(-1, p.labels[:, None])[:, 0]


def compiled_eager(p: Problem) -> Tensor:
    return _compiled(p.hidden, p.weight, p.labels)


@torch.compile(dynamic=False)
def _compiled(hidden, weight, labels):
    logits = F.linear(hidden, weight).float()
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def ours(budget: int, p: Problem) -> Tensor:
    return linear_logps(p.hidden, p.weight, p.labels, logits_budget_bytes=budget).logps


def functions() -> dict[str, object]:
    """Contestants by name; each maps a problem to log-probs."""
    found = {
        "rlhf_fast, budget 0": lambda p: ours(0, p),
        "rlhf_fast, budget for all": lambda p: ours(1 << 40, p),
        "eager": eager,
        "torch.compile": compiled_eager,
    }
    try:
        from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy as cce

        found["CCE torch_compile"] = lambda p: -cce(p.hidden, p.weight, p.labels, reduction="none")
    except ImportError:
        pass
    try:
        from trl.kernels import ChunkedLogProbFunction

        found["TRL ChunkedLogProb"] = lambda p: ChunkedLogProbFunction.apply(
            p.hidden, p.weight, None, p.labels, 1.0, 32768, None, 1.0, ()
        )[0]
    except ImportError:
        pass
    return found


def losses() -> dict[str, object]:
    def loss_of(function):
        return lambda p: (function(p) * upstream(p)).sum()

    return {name: loss_of(function) for name, function in functions().items()}


def run(args) -> None:
    for dtype in (getattr(torch, name) for name in args.dtype):
        if args.grow:
            grow(args, dtype)
            continue
        for vocab in args.vocab:
            torch._dynamo.reset()
            problem = Problem.random(args.tokens, vocab, args.width, dtype)
            heads.compare("linear_logps", problem, losses(), lambda p: losses()["eager"](p), args)


def grow(args, dtype: torch.dtype) -> None:
    """Time and memory of budget 0 while one size grows 16-fold: linear, and flat in N."""
    base = {"tokens": args.tokens, "vocab": args.vocab[0], "width": args.width}
    loss = losses()["rlhf_fast, budget 0"]
    rows = []
    for name, value in base.items():
        for factor in (0.25, 0.5, 1, 2, 4):
            problem = Problem.random(**{**base, name: int(value * factor)}, dtype=dtype)
            for kind in ("frozen head", "trainable head"):
                leaves = problem.with_gradients(*heads.KINDS[kind][0])
                contestant = harness.Contestant(kind, lambda leaves=leaves: leaves.run(loss))
                times = harness.time_all([contestant], 5, args.seconds)[kind]
                extra = harness.peak_extra_bytes(contestant.run)
                rows.append(
                    {
                        **harness.describe(),
                        "kind": kind,
                        "dtype": str(dtype).removeprefix("torch."),
                        **{**base, name: int(value * factor)},
                        **harness.quantiles(times),
                        "peak_extra_bytes": extra,
                    }
                )
                print(
                    f"  {kind:15} {name} x {factor:<5} {rows[-1]['median_ms']:9.1f} ms "
                    f"{extra / 2**20:8.1f} MiB",
                    flush=True,
                )
    if args.save:
        print("saved to", harness.record("linear_logps-growth", rows))
