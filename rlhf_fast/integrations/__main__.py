"""Runs a script or module with a framework patched: `python -m rlhf_fast.integrations trl dpo.py`.

For frameworks that are started from the command line. Processes that they start in turn run
unpatched, unless this module starts those as well (`torchrun -m rlhf_fast.integrations ...`).
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch

from rlhf_fast.errors import UserError
from rlhf_fast.integrations import FRAMEWORKS

LLAMAFACTORY = ("llamafactory.cli", "llamafactory-cli", "lmf")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlhf_fast.integrations", description=__doc__)
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("-m", "--module", action="store_true", help="the program is a module")
    parser.add_argument("--local_rank", help="what deepspeed's launcher adds: handed on")
    parser.add_argument("program", help="a script, the name of a command, or a module after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    _must_train_here(given.framework, given.program)
    path = None if given.module else _script(given.program)
    handle = importlib.import_module(f"rlhf_fast.integrations.{given.framework}").patch()
    print(f"rlhf_fast: patched {handle}", file=sys.stderr)
    rank = [] if given.local_rank is None else [f"--local_rank={given.local_rank}"]
    sys.argv = [given.program, *rank, *given.arguments]
    if path is None:
        runpy.run_module(given.program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(path.parent))  # what `python script.py` does
        runpy.run_path(str(path), run_name="__main__")


def _script(program: str) -> Path:
    found = program if program.endswith(".py") else shutil.which(program)
    if found is None or not Path(found).is_file():
        raise UserError(
            f"{program}: must be a script or an installed command, got neither; "
            f"give a path that ends with .py, or a module after -m"
        )
    return Path(found).resolve()


def _must_train_here(framework: str, program: str) -> None:
    """LLaMA-Factory's command starts torchrun for several GPUs, and that would run unpatched."""
    if framework != "llamafactory" or program not in LLAMAFACTORY or "LOCAL_RANK" in os.environ:
        return
    if os.environ.get("FORCE_TORCHRUN", "").lower() in ("1", "true", "y"):
        why = "FORCE_TORCHRUN"
    elif (count := torch.cuda.device_count()) > 1:
        why = f"{count} GPUs"
    else:
        return
    raise UserError(
        f"{program}: the process must be the one that trains, got {why}, for which it starts "
        f"torchrun; start it yourself: torchrun --nproc-per-node GPUS -m "
        f"rlhf_fast.integrations llamafactory -m llamafactory.launcher CONFIG.yaml"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
