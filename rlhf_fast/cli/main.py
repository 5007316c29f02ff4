"""`rlhf-fast COMMAND ...`: a thin layer over the Python functions of the same names."""

from __future__ import annotations

import os
import select
import sys

from rlhf_fast.cli import commands
from rlhf_fast.errors import ToldElsewhere, UserError, did_you_mean
from rlhf_fast.process import bound_spinning, stopped_as_by_ctrl_c

COMMANDS: dict[str, commands.Command] = {
    "online": commands.online,
    "iterate": commands.online,  # the same by the name of what it does among the stages
    "resume": commands.resume,
    "report": commands.report,
    "export": commands.export,
    "sft": commands.stage(
        "sft",
        "Fine-tune a model on demonstrations.",
        "--model MODEL --data DEMONSTRATIONS.jsonl --output SFT_MODEL",
    ),
    "reward": commands.stage(
        "reward",
        "Train a reward model on preference pairs.",
        "--model SFT_MODEL --pairs PAIRS.jsonl --output REWARD_MODEL",
    ),
    "generate": commands.stage(
        "generate",
        "Sample responses to prompts.",
        "--model SFT_MODEL --prompts PROMPTS.jsonl --output RESPONSES.jsonl",
    ),
    "score": commands.stage(
        "score",
        "Give responses their rewards.",
        "--completions RESPONSES.jsonl --reward.model REWARD_MODEL --output SCORED.jsonl",
    ),
    "select": commands.stage(
        "select",
        "Select pairs or responses by their rewards.",
        "--scored SCORED.jsonl --output SELECTED.jsonl",
    ),
    "train": commands.stage(
        "train",
        "Update a policy on what was selected.",
        "--model SFT_MODEL --selected SELECTED.jsonl --output POLICY",
    ),
    "evaluate": commands.stage(
        "evaluate",
        "Win rates, best-of-n, accuracy of a reward.",
        "--scored SCORED.jsonl --baseline SCORED_BEFORE.jsonl --output METRICS.json",
    ),
    "merge": commands.stage(
        "merge",
        "Merge models: soups, WARP, TIES, DARE, layer ratios.",
        "--models MODEL OTHER_MODEL --output MERGED",
    ),
    "bench": commands.bench,
    "profile": commands.profile,
    "env": commands.env,
}
GROUPS = {
    "the whole workflow": ("online", "resume", "report", "export"),
    "one stage, files in and files out": tuple(
        "sft reward generate score select train evaluate merge".split()
    ),
    "this machine": ("env", "bench", "profile"),
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 the user's input cannot be used, 2 usage,
    130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    command = COMMANDS.get(arguments[0])
    if command is None:
        hint = did_you_mean(arguments[0], COMMANDS)
        print(f"rlhf-fast: no command {arguments[0]!r}{hint}\n\n{_help()}", file=sys.stderr)
        return 2
    bound_spinning()
    try:
        with stopped_as_by_ctrl_c():
            command(arguments[1:])
            sys.stdout.flush()
    except ToldElsewhere:
        return 1
    except UserError as error:
        print(f"rlhf-fast {arguments[0]}: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"rlhf-fast {arguments[0]}: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return 1
    except KeyboardInterrupt as stopped:
        print(f"rlhf-fast {arguments[0]}: interrupted{stopped}", file=sys.stderr)
        return 130
    return 0


def _output_is_closed() -> bool:
    """Whether who read the output is gone, as after `| head`; then the rest goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLERR)
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _help() -> str:
    lines = ["usage: rlhf-fast COMMAND [options]"]
    for title, names in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<9} {(COMMANDS[name].__doc__ or '').splitlines()[0]}" for name in names]
    lines += ["", "`rlhf-fast COMMAND --help` lists the options of a command."]
    return "\n".join(lines)
