"""python -m benchmarks.gpu: everything that a machine with a GPU is needed for, in 25 minutes.

Builds for that GPU, runs the tests that need it, then every benchmark; results go to
benchmarks/results/<gpu>.csv. Each part is a process under a time limit of its own, and none needs
another to succeed. What is done is not done again, so the command can be repeated after an
interruption or with more time: `--again` forgets that.

    python -m benchmarks.gpu                          # all of it
    python -m benchmarks.gpu --parts tests logps      # some
    python -m benchmarks.gpu --small                  # smallest shapes, also on a CPU
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from benchmarks.smallest import OPS, PROCESSES

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu"
HEAD = ["--tokens", "8192", "--vocab", "151936", "--width", "4096", "--dtype", "bfloat16"]
LOGITS = ["--tokens", "8192", "--vocab", "32000", "151936", "--dtype", "bfloat16", "float32"]
BATCH = ["--batch", "1024", "--length", "4096"]
ONCE = ["--malloc", "default", "--threads", "8", "--seconds", "1", "--save"]


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
    sizes = {
        **dict.fromkeys(("linear_logps", "linear_preference_loss", "linear_policy_loss"), HEAD),
        **dict.fromkeys(("logps", "kl"), LOGITS),
        "training": ["--dtype", "bfloat16", "--lengths", "256/64", "mixed", "--pairs", "16"],
        "integrations": [],
        "online": [],
        **dict.fromkeys(
            ("policy_loss", "gae", "value_loss", "preference_loss", "group_advantages"), BATCH
        ),
        **dict.fromkeys(("segment_sum", "whiten", "list_loss", "reward_model_loss"), BATCH),
    }
    limits = {"online": 150.0, "training": 150.0, "integrations": 240.0, "linear_logps": 150.0}
    build = [python, "setup.py", "build_ext", "--inplace"]
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    return [
        Part("build", build, 400),
        Part("limits", [python, "-m", "benchmarks.floors"], 60),
        Part("tests", tests, 300),
        *(Part(s, [*bench, s, *ONCE, *a], limits.get(s, 100.0)) for s, a in sizes.items()),
    ]


def run(part: Part, left_s: float) -> str:
    """How it ended; the output goes to build/gpu/<name>.log."""
    path = LOGS / f"{part.name}.log"
    env = os.environ | {"RLHF_FAST_CUDA": "ON", "RLHF_FAST_EMULATE": "OFF"} | architecture()
    with path.open("w") as log:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(min(part.limit_s, left_s))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {min(part.limit_s, left_s):.0f} s"
    return "done" if code == 0 else f"failed (exit {code}), see {path}"


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
        failed += outcome != "done"
        if outcome == "done" and not args.small:
            marker.touch()
        print(f"{part.name:24} {time.monotonic() - start:6.0f} s  {outcome}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} parts done; then: python -m benchmarks.report")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
