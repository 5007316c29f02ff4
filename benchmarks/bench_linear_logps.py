"""Log-probs from hidden states: forward with backward, and without."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import heads
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
    with heads.available("CCE"):
        from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy as cce

        found["CCE torch_compile"] = lambda p: -cce(p.hidden, p.weight, p.labels, reduction="none")
    with heads.available("TRL"):
        from trl.kernels import ChunkedLogProbFunction

        found["TRL ChunkedLogProb"] = lambda p: ChunkedLogProbFunction.apply(
            p.hidden, p.weight, None, p.labels, 1.0, 32768, None, 1.0, ()
        )[0]
    return found


def losses() -> dict[str, object]:
    def loss_of(function):
        return lambda p: (function(p) * upstream(p)).sum()

    return {name: loss_of(function) for name, function in functions().items()}


SWEEP, whole = heads.SWEEP, heads.whole


def curves(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, object]:
    return heads.curves(losses()["rlhf_fast, budget 0"], sizes, dtype)


def run(args) -> None:
    for dtype in (getattr(torch, name) for name in args.dtype):
        for vocab in args.vocab:
            torch._dynamo.reset()
            problem = Problem.random(args.tokens, vocab, args.width, dtype)
            heads.compare("linear_logps", problem, losses(), lambda p: losses()["eager"](p), args)
