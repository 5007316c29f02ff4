"""Divergence of two sets of logits: forward, and forward with the student's gradient.

Liger's kernels for log-softmax inputs need a GPU; there is nothing of theirs to run on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.floors import measure
from benchmarks.harness import Contestant
from rlhf_fast.ops import kl, kl_ref, kl_with_grad_


def eager(kind):
    def divergence(student, teacher):
        log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
        if kind == "forward":
            return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        if kind == "reverse":
            return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        half = torch.log(torch.tensor(0.5))
        log_m = torch.logaddexp(log_p + half, log_q + half)
        one, two = (F.kl_div(log_m, x, reduction="none", log_target=True) for x in (log_q, log_p))
        return 0.5 * (one + two).sum(-1)

    return divergence


def functions(kind) -> dict[str, object]:
    """Contestants by name; each maps (student, teacher) to divergences."""
    plain = eager(kind)
    found = {
        "rlhf_fast": lambda s, t: kl(s, t, kind=kind),
        "eager": plain,
        "torch.compile": torch.compile(lambda s, t: plain(s.float(), t.float()), dynamic=False),
    }
    try:
        from trl.experimental.gkd import GKDTrainer

        trl, beta = GKDTrainer.generalized_jsd_loss, {"forward": 0, "reverse": 1, "jsd": 0.5}[kind]
        found["TRL GKD"] = lambda s, t: trl(s, t, beta=beta, reduction="none").sum(-1)
    except ImportError:
        pass
    return found


def check(function, kind, dtype) -> float:
    """RMS error against float64; raises where it is wrong."""
    generator = torch.Generator(harness.DEVICE).manual_seed(0)
    student = (torch.randn(32, 4096, generator=generator) * 3).to(dtype)
    teacher = (student + torch.randn(32, 4096, generator=generator)).to(dtype)
    truth = kl_ref(student.double(), teacher.double(), kind=kind)
    error = (function(student, teacher).double() - truth).square().mean().sqrt().item()
    assert error < 0.2, f"off by {error}"
    return error


def run(args) -> None:
    floors = measure(torch.get_num_threads())
    print(floors)
    rows = []
    for dtype in (getattr(torch, name) for name in args.dtype):
        for vocab in args.vocab:
            for kind in kinds_at(vocab, args.vocab):
                torch._dynamo.reset()
                rows += measure_shape(args, dtype, vocab, kind, floors)
    if args.save:
        print("saved to", harness.record("kl", rows))


def kinds_at(vocab: int, vocabs: list[int]) -> tuple[str, ...]:
    """Every kind at one vocabulary, the middle one; what size does to a pass, one kind tells."""
    middle = sorted(vocabs)[len(vocabs) // 2]
    return ("forward", "reverse", "jsd") if vocab == middle else ("forward",)


def measure_shape(args, dtype, vocab, kind, floors) -> list[dict[str, object]]:
    tokens = min(args.tokens, args.tokens * 49152 // vocab) // 2
    student = torch.randn(tokens, vocab).mul_(3).to(dtype)
    teacher = (student + torch.randn(tokens, vocab)).to(dtype)
    wanted = harness.chosen(functions(kind), args)
    errors = harness.checked(wanted, lambda function: check(function, kind, dtype))

    # Each function of a logit counts once, the mixture's logarithm as an exponential, which takes
    # less. That it needs both log-sums, hence exponentials that are kept or computed twice, is a
    # cost of the kernel and no limit of the machine.
    num_functions = 3 if kind == "jsd" else 2
    num_bytes = student.numel() * student.element_size()
    num_exp = num_functions * student.numel()
    # Two log-softmaxes, a mixture, three products and their gradients.
    wanted = harness.fitting(wanted, num_bytes, copies=10)

    def forward(function):
        with torch.no_grad():
            return function(student, teacher)

    def both(function):
        out = function(student.detach().requires_grad_(), teacher)
        out.backward(torch.ones_like(out))

    # Both rows are read once and one gradient is written, as in the same pass; a backward that
    # comes later has to read them again.
    read = floors.forward_ms(2 * num_bytes, num_exp)
    update = floors.read_and_write_ms(2 * num_bytes, num_bytes, num_exp)
    source, upstream = student.clone(), torch.ones(tokens)
    rows = []
    for part, (runner, floor) in {
        "forward": (forward, read),
        "forward+backward": (both, update),
    }.items():
        contestants = [
            Contestant(name, lambda f=wanted[name], runner=runner: runner(f), error=error)
            for name, error in errors.items()
        ]
        if part != "forward" and "rlhf_fast" in errors:
            contestants.append(
                Contestant(
                    "rlhf_fast, in the same pass",
                    run=lambda: kl_with_grad_(student, teacher, upstream, kind=kind),
                    prepare=lambda: student.copy_(source),
                    error=errors["rlhf_fast"],
                )
            )
        facts = {
            "kind": f"{kind}, {part}",
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "vocab": vocab,
        }
        title = f"{kind} KL, {part}, {dtype}, {tokens} x {vocab}"
        rows += harness.contest(title, facts, contestants, floor, args.seconds)
    return rows
