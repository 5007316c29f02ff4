"""Stand-alone training from the command line, alone or under a launcher of several processes.

`python -m rlhf_fast.training preference --model M --data D --output R`; the kinds are
sft, preference, reward and pairwise, their options the fields of their configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import tyro

from rlhf_fast.errors import UserError
from rlhf_fast.training import runs

KINDS: dict[str, tuple[type, Callable]] = {
    "sft": (runs.SFTRun, runs.run_sft),
    "preference": (runs.PreferenceRun, runs.run_preference),
    "reward": (runs.RewardRun, runs.run_reward_model),
    "pairwise": (runs.PairwiseRun, runs.run_pairwise_model),
}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the user's input cannot be used, 2 usage."""
    kind, *options = (sys.argv[1:] if arguments is None else arguments) or [""]
    if kind not in KINDS:
        print(
            f"the first argument must be one of {', '.join(KINDS)}, got {kind!r}; each has --help"
        )
        return 2
    config, train = KINDS[kind]
    try:
        run = tyro.cli(config, args=options, prog=f"python -m rlhf_fast.training {kind}")
        print(f"written to {train(run)}")
    except UserError as error:
        print(f"{kind}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
