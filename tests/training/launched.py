"""Fits in a process of their own: `python -m tests.training.launched TASKS DIRECTORY [DELAY]`.

TASKS are names of `trajectories.TASKS`, with commas between; DELAY is a pause in seconds after
every step, so the parent can hit it. Launched by torchrun or Accelerate it shares the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator

from rlhf_fast.launch import launched_with
from rlhf_fast.training.checkpoints import Checkpoints
from rlhf_fast.training.fit import FitOptions
from tests.training.trajectories import make, train

REPLICATED = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = ["accelerate.commands.launch", "--main_process_port", "0"]  # any that is free
SHARDED = [*LAUNCH, "--config_file", "docs/examples/fsdp2.yaml"]
ZERO = [*LAUNCH, "--use_deepspeed", "--num_processes", "2"]
LAUNCHERS = {
    "replicated": [sys.executable, "-m", *REPLICATED],
    "sharded": [sys.executable, "-m", *SHARDED],
}
if find_spec("deepspeed"):
    for stage in ("zero2", "zero3"):
        file = ["--deepspeed_config_file", f"tests/training/{stage}.json"]
        LAUNCHERS[stage] = [sys.executable, "-m", *ZERO, *file]


def command(tasks: str, directory: Path, *more: str) -> list[str]:
    return ["-m", "tests.training.launched", tasks, str(directory), *more]


def result_of(tasks: str, directory: Path, launcher=(sys.executable,)) -> dict:
    """Rows and sums of the weights of each task, trained by the processes of this launcher."""
    directory.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [*launcher, *command(tasks, directory)]
    done = subprocess.run(line, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((directory / "result.json").read_text())


def main(tasks: str, directory: Path, delay: float = 0.0) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True) if "WORLD_SIZE" in os.environ else None

    def on_step(row: dict[str, float], total: int) -> None:
        parameters = list(model.model.parameters())
        if launched_with("FSDP"):
            assert all(hasattr(p, "full_tensor") for p in parameters)
        if "zero3" in os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""):
            assert not any(p.numel() for p in parameters)  # nothing is whole between steps
        print(f"step {row['step']} of {total}", flush=True)
        time.sleep(delay)

    results = {}
    for task in tasks.split(","):
        model = make(task, micro_batch_tokens=64, row_tokens=48)
        checkpoints = Checkpoints(directory / f"checkpoints_{task}", every_steps=3)
        options = FitOptions(checkpoints, accelerator)
        rows = train(task, model, options=options, on_step=on_step)
        parameters = dict(model.model.named_parameters())
        whole = {n: getattr(p.detach(), "full_tensor", p.detach)() for n, p in parameters.items()}
        weights = {name: value.double().sum().item() for name, value in whole.items()}
        results[task] = {"rows": rows, "weights": weights}
    if accelerator is None or accelerator.is_main_process:
        (directory / "result.json").write_text(json.dumps(results))
    if accelerator is not None:
        accelerator.wait_for_everyone()  # a peer that leaves while others work may abort them
        accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(float, sys.argv[3:]))
