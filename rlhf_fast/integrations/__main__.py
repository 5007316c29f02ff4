"""Runs a script or module with a framework patched: `python -m rlhf_fast.integrations trl dpo.py`.

For frameworks that are started from the command line. Processes that they start in turn run
unpatched, unless this module starts those as well (`torchrun -m rlhf_fast.integrations ...`);
commands that are known to leave training to others are refused.
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

HERE = "rlhf_fast.integrations"
INSTEAD = {
    **dict.fromkeys(
        ("trl", "trl.cli", "trl.cli.main"),
        f"python -m {HERE} trl -m trl.scripts.dpo ..., or for several processes accelerate launch "
        f"-m {HERE} trl -m trl.scripts.dpo ... (or sft, grpo, ...)",
    ),
    "accelerate": f"accelerate launch -m {HERE} FRAMEWORK train.py ...",
    "torchrun": f"torchrun --nproc-per-node GPUS -m {HERE} FRAMEWORK train.py ...",
    "deepspeed": f"deepspeed --module {HERE} FRAMEWORK train.py ...",
}
"""Programs that leave training to processes of their own, and how these come to be patched."""
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
    """Refuses what starts other processes: these would train, but without the kernels."""
    name = Path(program).name
    if name in INSTEAD:
        why, instead = f"{name}, which starts others", INSTEAD[name]
    elif framework == "llamafactory" and name in LLAMAFACTORY and (several := _torchrun_for()):
        why = f"{several}, for which it starts torchrun"
        instead = f"torchrun --nproc-per-node GPUS -m {HERE} llamafactory -m llamafactory.launcher "
        instead += "CONFIG.yaml"
    else:
        return
    raise UserError(
        f"{name}: the process must be the one that trains, got {why}; run instead: {instead}"
    )


def _torchrun_for() -> str | None:
    """Why LLaMA-Factory's command would start torchrun here."""
    if "LOCAL_RANK" in os.environ:
        return None
    if os.environ.get("FORCE_TORCHRUN", "").lower() in ("1", "true", "y"):
        return "FORCE_TORCHRUN"
    count = torch.cuda.device_count()
    return f"{count} GPUs" if count > 1 else None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
