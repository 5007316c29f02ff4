"""Log-probs of labels from logits: forward, and forward with backward."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.floors import measure
from benchmarks.harness import Contestant
from rlhf_fast.ops import logps, logps_ref


def eager(logits, labels):
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def cross_entropy(logits, labels):
    return -F.cross_entropy(logits, labels, reduction="none")


def functions() -> dict[str, object]:
    """Contestants by name; each maps (logits, labels) to log-probs."""
    compiled = torch.compile(lambda x, y: eager(x.float(), y), dynamic=False)
    found = {
        "rlhf_fast": lambda x, y: logps(x, y).logps,
        "rlhf_fast, in place": lambda x, y: logps(x, y, inplace_backward=True).logps,
        "eager": eager,
        "F.cross_entropy": cross_entropy,
        "torch.compile": compiled,
    }
    try:
        from trl.trainer.utils import selective_log_softmax

        found["TRL selective_log_softmax"] = selective_log_softmax
    except ImportError:
        pass
    if harness.DEVICE == "cuda":
        found |= quack()
    return found


def quack() -> dict[str, object]:
    try:
        from quack.cross_entropy import cross_entropy
    except ImportError:
        return {}

    def negated(logits, labels, **settings):
        return -cross_entropy(logits, labels, reduction="none", **settings)

    in_place = functools.partial(negated, inplace_backward=True)
    return {"QuACK": negated, "QuACK, in place": in_place}


def check(function, dtype: torch.dtype) -> float:
    """RMS error against float64; raises where it is wrong."""
    generator = torch.Generator(harness.DEVICE).manual_seed(0)
    logits = (torch.randn(32, 4096, generator=generator) * 4).to(dtype)
    labels = torch.randint(4096, (32,), generator=generator)
    truth = logps_ref(logits.double(), labels).logps
    error = (function(logits, labels).double() - truth).square().mean().sqrt().item()
    assert error < 0.2, f"off by {error}"
    return error


SWEEP = ("tokens", "vocab")


def curves(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, object]:
    """Forward and backward; without "in place" the gradient is a tensor of its own."""
    logits = torch.randn(sizes["tokens"], sizes["vocab"]).mul_(4).to(dtype)
    labels = torch.randint(sizes["vocab"], (sizes["tokens"],))

    def both(function):
        function(logits.detach().requires_grad_(), labels).sum().backward()

    wanted = ("rlhf_fast", "rlhf_fast, in place", "eager")
    return {n: lambda f=f: both(f) for n, f in functions().items() if n in wanted}


def run(args) -> None:
    threads = torch.get_num_threads()
    floors = measure(threads)
    print(
        f"floors: read {floors.read_gb_s:.1f} GB/s, update {floors.update_gb_s:.1f} GB/s, "
        f"exp {floors.exp_g_s:.1f} G/s"
    )
    rows = []
    for dtype in (getattr(torch, name) for name in args.dtype):
        for vocab in args.vocab:
            torch._dynamo.reset()
            rows += measure_shape(args, dtype, vocab, floors)
    if args.save:
        print("saved to", harness.record("logps", rows))


def measure_shape(args, dtype: torch.dtype, vocab: int, floors) -> list[dict[str, object]]:
    tokens = args.tokens
    source = torch.randn(tokens, vocab).mul_(4).to(dtype)
    logits = source.clone()
    labels = torch.randint(vocab, (tokens,))
    upstream = torch.ones(tokens)
    wanted = harness.chosen(functions(), args)
    num_bytes = source.numel() * source.element_size()
    # Log-softmax and two gradients; in 16 bits some of them in float32.
    wanted = harness.fitting(wanted, num_bytes, copies=3 if dtype == torch.float32 else 6)
    errors = harness.checked(wanted, lambda function: check(function, dtype))

    def forward(function):
        with torch.no_grad():
            return function(logits, labels)

    def both(function):
        x = logits.detach().requires_grad_()
        out = function(x, labels)
        out.backward(upstream.to(out.dtype))

    read = floors.forward_ms(num_bytes, source.numel())
    update = floors.update_ms(num_bytes, source.numel())
    # forward+backward: the logits are read, then read again and overwritten by the gradient
    kinds = {"forward": (forward, read), "forward+backward": (both, read + update)}
    rows = []
    for kind, (runner, floor) in kinds.items():
        contestants = [
            Contestant(
                name,
                run=lambda f=function, runner=runner: runner(f),
                prepare=(lambda: logits.copy_(source)) if "in place" in name else lambda: None,
                error=errors[name],
            )
            for name, function in wanted.items()
            if name in errors and (kind == "forward+backward" or "in place" not in name)
        ]
        facts = {
            "kind": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "vocab": vocab,
        }
        title = f"{kind}, {dtype}, {tokens} x {vocab}"
        rows += harness.contest(title, facts, contestants, floor, args.seconds)
        logits.copy_(source)
    return rows
