"""python -m benchmarks.gpu: everything that a machine with a GPU is needed for, in 25 minutes.

Builds for that GPU, runs the tests that need it, every benchmark, the growth of costs, and the
workflow of the quickstart with a trace; results go to benchmarks/results/<gpu>.csv or where
RLHF_FAST_BENCHMARK_RESULTS says, the rest to build/gpu. Each part is a process under a time limit
of its own, and none needs another to succeed. What is done is not done again, so the command can be
repeated after an interruption or with more time: `--again` forgets that.

    python -m benchmarks.gpu                          # all of it
    python -m benchmarks.gpu --minutes 9              # and again, until all is done
    python -m benchmarks.gpu --parts tests logps      # some
    python -m benchmarks.gpu --small                  # smallest shapes, also on a CPU
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass

from benchmarks import harness, processes
from benchmarks.plan import GPU
from benchmarks.smallest import OPS, PROCESSES

LOGS = processes.ROOT / "build" / "gpu"


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    limit_s: float


def parts(small: bool) -> list[Part]:
    """In the order of their worth: what comes last may find no time left."""
    python = sys.executable
    bench = [python, "-m", "benchmarks"]
    if small:
        tests = [python, "-m", "pytest", "-q", "-x", "tests/ops/test_whiten.py"]
        benches = [Part(s, [*bench, s, *a], 120) for s, a in {**OPS, **PROCESSES}.items()]
        return [Part("tests", tests, 120), *benches]
    test = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m"]
    cli = "from rlhf_fast.cli import main; raise SystemExit(main())"
    profile = [python, "-c", cli, "profile", "quickstart", "--output-dir"]
    grow = ["--sweep", "tokens", "vocab", "--dtype", "bfloat16", "--seconds", "0.3", "--save"]
    return [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 400),
        Part("limits", [python, "-m", "benchmarks.floors"], 60),
        Part("tests", [*test, "gpu", "tests"], 300),
        *(Part(s, [*bench, s, "--save"], 120 * plan.minutes) for s, plan in GPU.items()),
        Part("growth", [*bench, "linear_logps", "logps", *grow, "--tokens", "2048"], 120),
        Part("workflow", [*profile, f"{LOGS}/run-{time.time():.0f}"], 240),
        Part("vllm", [*test, "vllm", "tests/generation"], 240),
    ]


def run(part: Part, left_s: float) -> str:
    """How it ended; the output goes to build/gpu/<name>.log."""
    env = os.environ | {"RLHF_FAST_CUDA": "ON", "RLHF_FAST_EMULATE": "OFF"} | architecture()
    return processes.run(part.command, min(part.limit_s, left_s), env, LOGS / f"{part.name}.log")


def architecture() -> dict[str, str]:
    """Compiles for the GPU that is here."""
    import torch

    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"RLHF_FAST_CUDA_ARCHS": f"{major}{minor}-real"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--minutes", type=float, default=25, help="for all of it")
    parser.add_argument("--small", action="store_true", help="smallest shapes, nothing is saved")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    args = parser.parse_args()
    chosen = [p for p in parts(args.small) if not args.parts or p.name in args.parts]
    if not args.small and not architecture():
        raise SystemExit("benchmarks.gpu needs a CUDA device, found none; --small runs without")
    LOGS.mkdir(parents=True, exist_ok=True)
    print(f"{harness.device_name()}; absent: {', '.join(harness.absent()) or 'nobody'}", flush=True)
    deadline = time.monotonic() + 60 * args.minutes
    failed = 0
    for part in chosen:
        marker = LOGS / f"{part.name}.done"
        if marker.exists() and not args.again and not args.small:
            print(f"{part.name:24} done before", flush=True)
            continue
        start = time.monotonic()
        left = deadline - start
        outcome = run(part, left) if left > 10 else "no time left"
        failed += outcome != processes.DONE
        if outcome == processes.DONE and not args.small:
            marker.touch()
        print(f"{part.name:24} {time.monotonic() - start:6.0f} s  {outcome}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} parts done; then: python -m benchmarks.report")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
