"""The reference of the KL tie across iterations, and momentum between them."""

from __future__ import annotations

from pathlib import Path

from rlhf_fast.online.config import ReferenceConfig
from rlhf_fast.online.merging import MergeConfig, merge_checkpoints
from rlhf_fast.online.protocols import Policy
from rlhf_fast.online.run_folder import RunFolder


def first_reference(run: RunFolder, config: ReferenceConfig, sft_path: Path | str) -> Path | str:
    """The reference of the first iteration: the SFT model, or the soup, made once."""
    if config.rule != "soup":
        return sft_path
    models = [sft_path if m == "sft" else m for m in config.models]
    merge = MergeConfig("linear", weights=config.weights)
    return run.directory(
        "reference/model",
        lambda path: run.launch.on_main(lambda: merge_checkpoints(path, models, merge)),
        lambda path: path,
    )


def advance_reference(
    run: RunFolder, config: ReferenceConfig, policy: Policy, iteration: int
) -> None:
    """Moves the reference before the update of `iteration`; the policy is the previous one's."""
    if config.rule == "previous":
        policy.move_reference()
    if config.rule == "ema":
        run.directory(
            f"iteration_{iteration}/reference",
            lambda path: run.launch.on_main(lambda: policy.average_reference(path, config.decay)),
            policy.load_reference,
        )


def extrapolated(path: Path, before: Path | str, trained: Path, scale: float) -> None:
    """Writes to `path` the model that lies beyond `trained`, seen from `before`."""
    merge_checkpoints(path, [trained], MergeConfig("extrapolate", scale=scale), base=before)
