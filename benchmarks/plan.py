"""What every benchmark measures where nothing else is asked for, in the order of its worth.

`python -m benchmarks STEM` takes these options before its own, so any of them can be replaced.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    minutes: float
    """About what it takes, on two CPU cores or on one GPU."""
    options: list[str]


_BOTH = ["--threads", "1", "2", "--malloc", "tuned", "default", "--seconds", "1"]
_ONCE = ["--threads", "1", "--malloc", "tuned", "--seconds", "0.7"]
_HEAD = ["--vocab", "49152", "--dtype", "bfloat16", *_BOTH]
_STEPS = ["--dtype", "bfloat16", "--lengths", "64/64", "mixed", "--pairs", "4"]
_PROCESSES = ["--threads", "2", "--malloc", "tuned"]

CPU = {
    "linear_logps": Plan(6, _HEAD),
    "linear_preference_loss": Plan(4, _HEAD),
    "linear_policy_loss": Plan(4, _HEAD),
    "logps": Plan(6, _BOTH),
    "kl": Plan(4, ["--vocab", "49152", *_BOTH, "--malloc", "tuned"]),
    "training": Plan(14, [*_PROCESSES, *_STEPS]),
    "online": Plan(8, _PROCESSES),
    "integrations": Plan(6, ["--threads", "2", "--malloc", "default", "tuned"]),
    **{
        stem: Plan(0.5, _ONCE)
        for stem in (
            *("policy_loss", "gae", "value_loss", "preference_loss", "group_advantages"),
            *("segment_sum", "whiten", "list_loss", "reward_model_loss"),
        )
    },
}

_GPU_ONCE = ["--malloc", "default", "--threads", "8", "--seconds", "1"]
_GPU_HEAD = ["--tokens", "8192", "--vocab", "151936", "--width", "4096", "--dtype", "bfloat16"]
_GPU_LOGITS = ["--tokens", "8192", "--vocab", "32000", "151936", "--dtype", "bfloat16", "float32"]
_GPU_STEPS = ["--dtype", "bfloat16", "--lengths", "256/64", "mixed", "--pairs", "16"]
_GPU_LAST = ("training", "integrations", "online")  # need models and other packages
_GPU_BATCH = ["--batch", "1024", "--length", "4096"]
_GPU_SIZES = {
    **dict.fromkeys(("linear_logps", "linear_preference_loss", "linear_policy_loss"), _GPU_HEAD),
    **dict.fromkeys(("logps", "kl"), _GPU_LOGITS),
    "training": _GPU_STEPS,
    "online": [],
    "integrations": [],
}
_GPU_MINUTES = {"online": 2.5, "training": 2.5, "integrations": 2.5, "linear_logps": 2}
GPU = {
    stem: Plan(
        _GPU_MINUTES.get(stem, 1.0 if stem in _GPU_SIZES else 0.4),
        [*_GPU_ONCE, *_GPU_SIZES.get(stem, _GPU_BATCH)],
    )
    for stem in ("logps", *(s for s in CPU if s not in ("logps", *_GPU_LAST)), *_GPU_LAST)
}


def plans(device: str) -> dict[str, Plan]:
    return GPU if device == "cuda" else CPU
