"""The commands. Heavy imports wait until a command needs them, so `--help` answers at once."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rlhf_fast.cli import help_page
from rlhf_fast.errors import UserError, did_you_mean
from rlhf_fast.launch import is_main_process
from rlhf_fast.process import quiet_libraries

if TYPE_CHECKING:
    from rlhf_fast.online.config import OnlineConfig

Config = TypeVar("Config")
Named = TypeVar("Named")
Command = Callable[[list[str]], None]


def online(arguments: list[str]) -> None:
    """Run the online RLHF workflow: SFT, reward model, iterations, report."""
    config = _online_config("online", online.__doc__, arguments)
    _prepare()
    from rlhf_fast.online.workflow import run_online

    _tell(run_online(config))


def profile(arguments: list[str]) -> None:
    """Run the workflow as `online` does, with a table of stages and traces of some."""
    if arguments and not arguments[0].startswith("-"):  # profile RECIPE
        arguments = ["--recipe", *arguments]
    parser = argparse.ArgumentParser(prog="rlhf-fast profile", add_help=False, allow_abbrev=False)
    parser.add_argument("--trace", default="iteration_1/policy")
    parser.add_argument("--trace-steps", type=int, default=5)
    chosen, rest = parser.parse_known_args(arguments)
    summary = (
        f"{profile.__doc__} `profile NAME` is short for --recipe NAME.\n\n"
        f"--trace PATTERN names the stages to trace (iteration_1/policy by default; iteration_1/* "
        f"for all of one iteration), --trace-steps N how many optimiser steps of one (5). Traces "
        f"are written to the run folder's profile/ and open in Perfetto."
    )
    config = _online_config("profile", summary, rest)
    _prepare()
    from rlhf_fast.cli.profile import ProfilingProgress, print_stages
    from rlhf_fast.online.workflow import run_online

    folder = Path(config.output_dir)
    progress = ProfilingProgress(folder / "profile", chosen.trace, chosen.trace_steps)
    report_path = run_online(config, progress)
    for traced, table in progress.tables.items():
        print(f"\n{traced}\n{table}")
    if not progress.tables:
        print(f"nothing traced: no stage that matches {chosen.trace!r} was still to be done")
    print_stages(folder)
    print(f"report: {report_path}")


def bench(arguments: list[str]) -> None:
    """Time the kernels against eager and torch.compile, for one model's shape."""
    import tyro

    from rlhf_fast.cli import bench as contests

    contests.run(tyro.cli(contests.BenchConfig, prog="rlhf-fast bench", args=arguments))


def stage(name: str, summary: str, example: str) -> Command:
    """The command of one stage; `summary` is its line in the list of commands.

    `example` are the options that it needs.
    """

    def command(arguments: list[str]) -> None:
        from rlhf_fast.online.config_file import config_from_yaml
        from rlhf_fast.online.stages import STAGES

        chosen, rest = _file_options(name).parse_known_args(arguments)
        config = STAGES[name]()
        if chosen.config:
            config = config_from_yaml(chosen.config, config)
        description = f"{summary}\n\nExample: rlhf-fast {name} {example}\n\n"
        config = _configure(name, config, rest, description)
        _prepare()
        print(config.run())

    command.__doc__ = summary
    return command


def resume(arguments: list[str]) -> None:
    """Continue a run from its first unfinished stage."""
    path = _run_argument("resume", resume.__doc__, arguments)
    _prepare()
    from rlhf_fast.online.workflow import resume as resume_run

    _tell(resume_run(path))


def report(arguments: list[str]) -> None:
    """Write the HTML report of a run."""
    path = _run_argument("report", report.__doc__, arguments)
    from rlhf_fast.online.report import write_report

    print(f"report: {write_report(path)}")


def export(arguments: list[str]) -> None:
    """Write a run's data for other tools: HF datasets, AlpacaEval, MT-Bench, lm-eval, ..."""
    from rlhf_fast.online.export import FORMATS

    parser = argparse.ArgumentParser(prog="rlhf-fast export", description=export.__doc__)
    parser.add_argument("run", type=Path, help="run folder, or a file of generate, score, select")
    parser.add_argument("--format", choices=sorted(FORMATS), default="preference")
    parser.add_argument("--output", type=Path, required=True, help="file or folder to write")
    parser.add_argument("--iteration", type=int, help="default: all, or the last for evaluations")
    chosen = parser.parse_args(arguments)
    if not chosen.run.exists():
        raise UserError(f"no such run folder or file: {chosen.run}")
    _prepare()
    print(FORMATS[chosen.format](chosen.run, chosen.output, chosen.iteration))


def env(arguments: list[str]) -> None:
    """Show versions, kernels, devices and integrations."""
    argparse.ArgumentParser(prog="rlhf-fast env", description=env.__doc__).parse_args(arguments)
    from rlhf_fast.cli.environment import print_environment

    print_environment()


def _online_config(name: str, summary: str | None, arguments: list[str]) -> OnlineConfig:
    """The configuration of a run from a recipe, methods, a file and options."""
    from rlhf_fast.online.config import OnlineConfig
    from rlhf_fast.online.config_file import config_with, read_mapping
    from rlhf_fast.recipes import METHODS, RECIPES

    parser = _file_options(name)
    parser.add_argument("--recipe")
    parser.add_argument("--method", action="append", default=[])
    chosen, rest = parser.parse_known_args(arguments)
    if help_page.requested(rest) == "methods":
        print(
            help_page.settings_table({method: changes for method, (_, changes) in METHODS.items()})
        )
        raise SystemExit(0)
    recipes = (
        f"--recipe NAME starts from a named run ({', '.join(sorted(RECIPES))}); --method NAME "
        f"changes it to a published method (listed by --help methods; may be repeated); both may "
        f"also stand in the file, as `recipe` and `method`; "
    )
    settings = read_mapping(chosen.config) if chosen.config else {}
    recipe, methods = settings.pop("recipe", None), settings.pop("method", [])
    recipe = chosen.recipe or recipe
    config = _named("recipe", str(recipe), RECIPES)() if recipe else OnlineConfig()
    for method in [*(methods if isinstance(methods, list) else [methods]), *chosen.method]:
        _, changes = _named("method", str(method), METHODS)
        config = config_with(config, changes, f"--method {method}")
    config = config_with(config, settings, str(chosen.config))
    example = (
        f"Example: rlhf-fast {name} --model MODEL --data.prompts PROMPTS.jsonl --reward.model "
        f"REWARD_MODEL"
    )
    return _configure(name, config, rest, f"{summary}\n\n{example}\n\n{recipes}")


def _named(kind: str, name: str, known: dict[str, Named]) -> Named:
    name = name.lower()
    if name not in known:
        page = "--help methods" if kind == "method" else "--help"
        hint = did_you_mean(name, known) or f"; `rlhf-fast online {page}` lists them"
        raise UserError(f"there is no {kind} {name!r}{hint}")
    return known[name]


def _file_options(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"rlhf-fast {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    return parser


def _configure(name: str, base: Config, arguments: list[str], description: str) -> Config:
    """`base`, changed by the options."""
    import tyro

    command = f"rlhf-fast {name}"
    parse = functools.partial(
        tyro.cli,
        type(base),
        prog=command,
        description=f"{description}--config FILE starts from a YAML file; the options below "
        f"override it.",
        default=base,
    )
    if (topic := help_page.requested(arguments)) is not None:
        print(help_page.page(lambda words: parse(args=words), command, topic), end="")
        raise SystemExit(0)
    return parse(args=arguments)


def _run_argument(name: str, description: str | None, arguments: list[str]) -> Path:
    parser = argparse.ArgumentParser(prog=f"rlhf-fast {name}", description=description)
    parser.add_argument("run", type=Path, help="run folder")
    return parser.parse_args(arguments).run


def _tell(report_path: Path) -> None:
    if is_main_process():
        print(f"report: {report_path}")


def _prepare() -> None:
    """Before the work of a command that loads models."""
    from rlhf_fast.memory import reuse_freed_memory

    quiet_libraries()
    reuse_freed_memory()
