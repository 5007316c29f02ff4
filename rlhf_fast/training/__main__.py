"""Stand-alone training from the command line, alone or under a launcher of several processes.

`python -m rlhf_fast.training preference --model M --data D --output R`; the kinds are
sft, preference, reward and pairwise, their options the fields of their configuration.
"""

from __future__ import annotations

import sys

import tyro

from rlhf_fast.errors import UserError
from rlhf_fast.threads import bound_spinning

KINDS = {
    "sft": ("SFTRun", "run_sft"),
    "preference": ("PreferenceRun", "run_preference"),
    "reward": ("RewardRun", "run_reward_model"),
    "pairwise": ("PairwiseRun", "run_pairwise_model"),
}
"""The configuration and the function in `training.runs`."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the user's input cannot be used, 2 usage."""
    kind, *options = (sys.argv[1:] if arguments is None else arguments) or [""]
    if kind not in KINDS:
        print(
            f"the first argument must be one of {', '.join(KINDS)}, got {kind!r}; each has --help"
        )
        return 2
    bound_spinning()
    from rlhf_fast.training import runs  # loads torch

    config, train = (getattr(runs, name) for name in KINDS[kind])
    try:
        run = tyro.cli(config, args=options, prog=f"python -m rlhf_fast.training {kind}")
        print(f"written to {train(run)}")
    except UserError as error:
        print(f"{kind}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
