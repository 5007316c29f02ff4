"""Stand-alone training from the command line, alone or under a launcher of several processes.

`python -m rlhf_fast.training preference --model M --data D --output R`; the kinds are
sft, preference, unpaired, reward and pairwise, their options the fields of their configuration.
"""

from __future__ import annotations

import sys

import tyro

from rlhf_fast.errors import UserError
from rlhf_fast.process import bound_spinning, quiet_libraries

KINDS = {
    "sft": ("SFTRun", "run_sft", "supervised fine-tuning on the assistant's turns"),
    "preference": ("PreferenceRun", "run_preference", "DPO and its relatives on pairs"),
    "unpaired": ("UnpairedRun", "run_unpaired", "KTO and its relatives on labelled responses"),
    "reward": ("RewardRun", "run_reward_model", "a reward model from pairs, or from scores"),
    "pairwise": ("PairwiseRun", "run_pairwise_model", "a model that says which of two is better"),
}
"""The configuration and the function in `training.runs`, and what is trained."""
HELP = "\n".join(
    [
        "usage: python -m rlhf_fast.training KIND --model MODEL --data DATA --output FOLDER [...]",
        "",
        *(f"  {kind:<11} {summary}" for kind, (*_, summary) in KINDS.items()),
        "",
        "`python -m rlhf_fast.training KIND --help` lists the options.",
    ]
)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the user's input cannot be used, 2 usage,
    130 interrupted."""
    kind, *options = (sys.argv[1:] if arguments is None else arguments) or [""]
    if kind in ("-h", "--help"):
        print(HELP)
        return 0
    if kind not in KINDS:
        kinds = f"the first argument must be one of {', '.join(KINDS)}, got {kind!r}"
        print(f"{kinds}\n\n{HELP}", file=sys.stderr)
        return 2
    bound_spinning()
    from rlhf_fast.training import runs  # loads torch

    quiet_libraries()
    config, train = (getattr(runs, name) for name in KINDS[kind][:2])
    try:
        run = tyro.cli(config, args=options, prog=f"python -m rlhf_fast.training {kind}")
        print(f"written to {train(run)}")
    except UserError as error:
        print(f"{kind}: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"{kind}: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "the same command goes on from the last checkpoint, or begins anew without one"
        print(f"{kind}: interrupted; {again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
