"""Runs a script or module with a framework patched: `python -m rlhf_fast.integrations trl dpo.py`.

For frameworks that are started from the command line. Processes that they start in turn run
unpatched, unless this module starts those as well (`torchrun -m rlhf_fast.integrations ...`).
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import shutil
import sys

from rlhf_fast.errors import UserError
from rlhf_fast.integrations import FRAMEWORKS


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlhf_fast.integrations", description=__doc__)
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("-m", "--module", action="store_true", help="the program is a module")
    parser.add_argument("program", help="a script, the name of a command, or a module after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    handle = importlib.import_module(f"rlhf_fast.integrations.{given.framework}").patch()
    print(f"rlhf_fast: patched {handle}", file=sys.stderr)
    sys.argv = [given.program, *given.arguments]
    if given.module:
        runpy.run_module(given.program, run_name="__main__", alter_sys=True)
        return
    path = given.program if given.program.endswith(".py") else shutil.which(given.program)
    if path is None:
        raise UserError(
            f"{given.program}: must be a script or an installed command, got neither; "
            f"give a path that ends with .py, or a module after -m"
        )
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
