"""The commands. Heavy imports wait until a command needs them, so `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path


def online(arguments: list[str]) -> None:
    """Run the online RLHF workflow: SFT, reward model, iterations, report."""
    import tyro

    from rlhf_fast.online.config import OnlineConfig
    from rlhf_fast.online.config_file import config_from_yaml
    from rlhf_fast.recipes import RECIPES

    parser = argparse.ArgumentParser(prog="rlhf-fast online", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=sorted(RECIPES))
    parser.add_argument("--config", type=Path)
    chosen, rest = parser.parse_known_args(arguments)
    config = RECIPES[chosen.recipe]() if chosen.recipe else OnlineConfig()
    if chosen.config:
        config = config_from_yaml(chosen.config, config)
    description = (
        f"{online.__doc__}\n\n"
        f"--recipe NAME starts from a named run ({', '.join(sorted(RECIPES))}); --config FILE "
        f"starts from a YAML file; the options below override either."
    )
    config = tyro.cli(
        OnlineConfig,
        prog="rlhf-fast online",
        description=description,
        args=rest,
        default=config,
    )
    _quiet_libraries()
    from rlhf_fast.online.workflow import run_online

    print(f"report: {run_online(config)}")


def resume(arguments: list[str]) -> None:
    """Continue a run from its first unfinished stage."""
    path = _run_argument("resume", resume.__doc__, arguments)
    _quiet_libraries()
    from rlhf_fast.online.workflow import resume as resume_run

    print(f"report: {resume_run(path)}")


def report(arguments: list[str]) -> None:
    """Write the HTML report of a run."""
    path = _run_argument("report", report.__doc__, arguments)
    from rlhf_fast.online.report import write_report

    print(f"report: {write_report(path)}")


def env(arguments: list[str]) -> None:
    """Show versions, kernels, devices and integrations."""
    argparse.ArgumentParser(prog="rlhf-fast env", description=env.__doc__).parse_args(arguments)
    from rlhf_fast.cli.environment import print_environment

    print_environment()


def _run_argument(name: str, description: str | None, arguments: list[str]) -> Path:
    parser = argparse.ArgumentParser(prog=f"rlhf-fast {name}", description=description)
    parser.add_argument("run", type=Path, help="run folder")
    return parser.parse_args(arguments).run


def _quiet_libraries() -> None:
    """Progress bars and notices of the libraries would break up this command's own output."""
    import datasets
    import transformers

    from rlhf_fast.memory import reuse_freed_memory

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    reuse_freed_memory()
