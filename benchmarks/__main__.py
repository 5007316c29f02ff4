"""python -m benchmarks [STEM ...] [--save]: contests of every op, training step and iteration.

Without a stem all of them, in about 55 minutes; stems come before options. Each is measured at the
sizes of benchmarks/plan.py where no others are given. What fails is named at the end.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.plan import plans
from benchmarks.smallest import OPS
from rlhf_fast import timing

WHOLE_MINUTES = 60


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=raw
    )
    stems = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
    parser.add_argument("stems", nargs="*", metavar="STEM", help=", ".join(stems))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--malloc", nargs="+", choices=["default", "tuned"], default=["tuned"])
    parser.add_argument("--tokens", type=int, default=2048, help="of logits")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 49152, 151936])
    parser.add_argument("--batch", type=int, default=256, help="sequences, for losses")
    parser.add_argument("--length", type=int, default=1024, help="of a sequence, for losses")
    parser.add_argument(
        "--task", nargs="+", default=["dpo", "reward"], help="of training; also sft"
    )
    parser.add_argument("--model", default="smollm2", help="for training: smollm2, tiny, a path")
    parser.add_argument("--lengths", nargs="+", default=["64/64", "256/64", "64/256", "mixed"])
    parser.add_argument("--pairs", type=int, default=8, help="per training step")
    parser.add_argument("--steps", type=int, default=4, help="of training")
    parser.add_argument("--width", type=int, default=576, help="of hidden states, for heads")
    parser.add_argument("--iterations", type=int, default=2, help="of online")
    parser.add_argument("--prompts", type=int, default=32, help="of an iteration, for online")
    parser.add_argument("--generations", type=int, default=8, help="per prompt, for online")
    parser.add_argument("--new-tokens", type=int, default=64, help="per response, for online")
    parser.add_argument("--shots", type=int, default=6, help="examples in a prompt, for online")
    parser.add_argument("--python-trl", default=sys.executable, help="interpreter with TRL")
    parser.add_argument("--python-vllm", default=sys.executable, help="interpreter with vLLM")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for online")
    parser.add_argument("--sweep", nargs="*", metavar="SIZE", help="grow sizes instead (all)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=4.0, help="per group of contestants")
    parser.add_argument(
        "--limit", type=float, default=20.0, metavar="SECONDS", help="of one run, for heads"
    )
    parser.add_argument("--only", nargs="*", help="contestants whose name contains one of these")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--against", metavar="REV", help="compare with this revision instead")
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES",
        help=f"for everything together; {WHOLE_MINUTES} without a stem, else none",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="skip what this command has done at this revision"
    )
    args = parser.parse_args(arguments)
    if unknown := [stem for stem in args.stems if stem not in stems]:
        parser.error(f"a stem must be one of {', '.join(stems)}, got {', '.join(unknown)}")
    return args


def measure(stem: str, args: argparse.Namespace) -> None:
    """One setting of threads and malloc, in the process that was started for it."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(args.threads[0])
    # It costs a microsecond in every call of a torch function; processes place their own tensors.
    if harness.DEVICE != "cpu" and stem in OPS:
        torch.set_default_device(harness.DEVICE)
    if args.clock == "cpu":
        timing.clock = time.process_time
    module = importlib.import_module(f"benchmarks.bench_{stem}")
    if args.sweep is None:
        module.run(args)
    else:
        importlib.import_module("benchmarks.sweep").run(stem, module, args)


def has_sizes(stem: str) -> bool:
    """Whether a benchmark says which of its sizes can grow."""
    return hasattr(importlib.import_module(f"benchmarks.bench_{stem}"), "SWEEP")


def main() -> None:
    arguments = sys.argv[1:]
    args = options(arguments)
    if os.environ.get(harness.COMMAND_VARIABLE):
        measure(args.stems[0], args)
        return
    from benchmarks import against, suite

    sys.stdout.reconfigure(line_buffering=True)  # in order with what the processes print
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # its processes end, too

    rest = arguments[len(args.stems) :]
    planned = plans(harness.DEVICE)
    chosen = {stem: planned[stem] for stem in args.stems or planned}
    if args.sweep is not None:
        chosen = {stem: plan for stem, plan in chosen.items() if has_sizes(stem)}
        if missing := set(args.stems) - set(chosen):
            growing = ", ".join(filter(has_sizes, planned))
            sys.exit(f"--sweep is for {growing}, got {', '.join(sorted(missing))}")
    if args.against:
        against.compare(args.against, chosen, rest)
        return
    minutes = args.budget or (math.inf if args.stems else WHOLE_MINUTES)
    if not suite.run(chosen, rest, options, minutes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
