"""A step of other frameworks' trainers, patched and not: time, peak memory, and the same losses.

    python -m benchmarks.bench_integrations --framework trl --trainer SFT DPO --save

Every contestant is a process of its own, steps are interleaved, and losses and gradient norms must
agree, or nothing is reported. Peaks are of the whole process, taken with default malloc.
"""

from __future__ import annotations

import argparse
import math
import statistics
from importlib.util import find_spec
from pathlib import Path

from benchmarks import harness
from benchmarks.bench_training import Contestant, model_path
from benchmarks.integration_step import NAMES, PATCHED, Settings

TRAINERS = {
    "trl": ["SFT", "DPO", "ORPO", "KTO", "GRPO", "Reward"],
    "llamafactory": ["DPO", "KTO"],
    "openrlhf": ["PPO"],
    "verl": ["PPO", "PPO fused"],
}
WARMUP_STEPS = 1
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}
"""Relative: bf16 gradients round differently in every order of a product."""


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_integrations")
    parser.add_argument("--framework", nargs="+", choices=NAMES, help="default: those installed")
    parser.add_argument("--trainer", nargs="+", help="default: all of the framework")
    parser.add_argument("--model", default="", help="smollm2, or a Hugging Face model's folder")
    parser.add_argument("--width", type=int, default=512, help="of a random Llama, as is")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=2, help="examples or pairs per step")
    parser.add_argument("--length", type=int, default=512, help="tokens, a quarter of them prompt")
    parser.add_argument("--completion", type=int, default=64, help="tokens that are sampled")
    parser.add_argument("--steps", type=int, default=5, help="the first of which warms up")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--malloc", nargs="+", default=["default", "tuned"])
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results")
    return parser.parse_args(arguments)


def run(args) -> None:
    """For `python -m benchmarks integrations`: its malloc and threads."""
    given = ["--threads", str(args.threads[0]), "--malloc", *args.malloc]
    given += ["--width", str(args.width), "--vocab", str(args.vocab[0])]
    given += ["--length", str(min(args.length, 512)), *(["--save"] if args.save else [])]
    measure(options(given))


def measure(args: argparse.Namespace) -> None:
    args.model = model_path(args.model)
    frameworks = args.framework or [name for name in NAMES if find_spec(name)]
    if not frameworks:
        print(f"nothing to compare with: none of {', '.join(NAMES.values())} is installed")
    beside = ("framework", "trainer", "malloc", "save")
    own = {k: v for k, v in vars(args).items() if k not in beside}
    for framework in frameworks:
        for trainer in args.trainer or TRAINERS[framework]:
            settings = Settings(framework=framework, trainer=trainer, **own)
            for malloc in args.malloc:
                rows = contest(settings, malloc)
                if args.save:
                    print("saved to", harness.record("integrations", rows))


def contest(settings: Settings, malloc: str) -> list[dict[str, object]]:
    framework = NAMES[settings.framework]
    contestants = [
        Contestant(name, settings, module="benchmarks.integration_step", tuned=malloc == "tuned")
        for name in (framework, PATCHED + framework)
    ]
    for _ in range(settings.steps):
        for contestant in contestants:
            contestant.step()
    peaks = {c.name: c.finish()["peak_bytes"] for c in contestants}
    check_steps(settings, *contestants)
    kind = settings.trainer + (" LoRA" if settings.lora else "")
    kind = kind if framework == "TRL" else f"{framework} {kind}"
    print(f"\n{kind}, {settings.dtype}, {malloc} malloc: losses and gradients agree")
    rows = []
    for contestant in contestants:
        times = [step["wall_ms"] for step in contestant.steps[WARMUP_STEPS:]]
        cpu = statistics.median(s["cpu_ms"] for s in contestant.steps[WARMUP_STEPS:])
        row = {
            **harness.describe(),
            "threads": settings.threads,
            "malloc": malloc,
            "kind": kind,
            **{n: getattr(settings, n) for n in ("dtype", "batch", "length")},
            **model_facts(settings),
            "contestant": contestant.name,
            **harness.quantiles(times),
            "cpu_ms": round(cpu, 1),
            "first_loss": contestant.steps[0]["loss"],
            "last_loss": contestant.steps[-1]["loss"],
        }
        if malloc == "default" or settings.on_gpu:  # tuned malloc keeps what is freed
            row["peak_bytes"] = peaks[contestant.name]
        rows.append(row)
        peak = f"{row['peak_bytes'] / 2**20:8.0f} MiB" if "peak_bytes" in row else ""
        print(f"  {contestant.name:18} {row['median_ms']:9.1f} ms {cpu:9.1f} CPU ms {peak}")
    return rows


def model_facts(settings: Settings) -> dict[str, object]:
    if settings.model:
        return {"model": Path(settings.model).name}
    sizes = {"vocab": settings.vocab, "width": settings.width}
    return {**sizes, "model": f"llama-{settings.layers}-layers"}


def check_steps(settings: Settings, plain: Contestant, patched: Contestant) -> None:
    """Losses and gradient norms: in bf16 of the first step, as updates of weights are rounded."""
    exact = settings.dtype == "float32"
    tolerance = TOLERANCE[settings.dtype]
    pairs = list(zip(plain.steps, patched.steps))
    for number, pair in enumerate(pairs if exact else pairs[:1], 1):
        for what in ("loss", "grad_norm"):
            one, two = (step[what] for step in pair)
            if not math.isclose(one, two, rel_tol=tolerance, abs_tol=tolerance * 0.1):
                raise SystemExit(
                    f"{settings.trainer}: {what} must agree, got {one} and patched {two} in step "
                    f"{number}; times of different computations are not compared"
                )


if __name__ == "__main__":
    measure(options())
