"""python -m benchmarks <stem> [--threads 1 2] [--malloc default tuned] [--save]"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness
from rlhf_fast import timing

IS_CHILD = "RLHF_FAST_BENCHMARK_CHILD"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    stems = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
    parser.add_argument("stem", choices=stems)
    parser.add_argument("--threads", type=int, nargs="+", help="default 1 2; for online 2")
    parser.add_argument("--malloc", nargs="+", help="default and tuned; for online tuned")
    parser.add_argument("--tokens", type=int, default=2048, help="of logits")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 49152, 151936])
    parser.add_argument("--batch", type=int, default=256, help="sequences, for losses")
    parser.add_argument("--length", type=int, default=1024, help="of a sequence, for losses")
    parser.add_argument("--task", nargs="+", default=["dpo", "reward"], help="of training")
    parser.add_argument("--model", default="smollm2", help="for training: smollm2, tiny, a path")
    parser.add_argument("--lengths", nargs="+", default=["64/64", "256/64", "64/256", "mixed"])
    parser.add_argument("--pairs", type=int, default=4, help="per training step")
    parser.add_argument("--steps", type=int, default=6, help="of training")
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
    parser.add_argument("--only", nargs="*", help="contestants whose name contains one of these")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--against", metavar="REV", help="compare with this revision instead")
    args = parser.parse_args(arguments)
    is_whole_run = args.stem == "online"
    args.threads = args.threads or ([2] if is_whole_run else [1, 2])
    args.malloc = args.malloc or (["tuned"] if is_whole_run else ["default", "tuned"])
    return args


def main() -> None:
    args = options()
    if args.against:
        from benchmarks import against

        position = sys.argv.index("--against")
        against.compare(args.against, sys.argv[1:position] + sys.argv[position + 2 :])
        return
    if os.environ.get(IS_CHILD):
        import torch

        torch.set_num_threads(args.threads[0])
        torch.set_default_device(harness.DEVICE)
        if args.clock == "cpu":
            timing.clock = time.process_time
        module = importlib.import_module(f"benchmarks.bench_{args.stem}")
        if args.sweep is None:
            module.run(args)
        else:
            importlib.import_module("benchmarks.sweep").run(args.stem, module, args)
        return
    if missing := harness.absent():
        print(f"absent, as not installed here: {', '.join(missing)}")
    # malloc reads its settings when a process starts, and threads are best set once.
    rest = sys.argv[1:]
    for malloc in args.malloc:
        for threads in args.threads:
            chosen = ["--malloc", malloc, "--threads", str(threads)]
            env = {**os.environ, "OMP_NUM_THREADS": str(threads), IS_CHILD: "1"}
            env |= harness.TUNED_MALLOC if malloc == "tuned" else {}
            print(f"\n==== malloc {malloc}, {threads} thread(s)", flush=True)
            command = [sys.executable, "-m", "benchmarks", *rest, *chosen]
            subprocess.run(command, env=env, check=True)


if __name__ == "__main__":
    main()
