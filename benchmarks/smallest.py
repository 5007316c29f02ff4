"""The smallest arguments of every benchmark: what CI runs, and `pytest benchmarks/`."""

from __future__ import annotations

_COMMON = ["--threads", "1", "--malloc", "default", "--seconds", "0.05"]
_LOGITS = ["--tokens", "16", "--vocab", "1000"]
_HEAD = ["--tokens", "64", "--vocab", "500", "--width", "16"]
_BATCH = ["--batch", "16", "--length", "32"]

OPS = {
    stem: [*_COMMON, *sizes]
    for stem, sizes in {
        "gae": _BATCH,
        "group_advantages": _BATCH,
        "kl": _LOGITS,
        "linear_logps": _HEAD,
        "linear_policy_loss": _HEAD,
        "linear_preference_loss": _HEAD,
        "list_loss": _BATCH,
        "logps": _LOGITS,
        "policy_loss": _BATCH,
        "preference_loss": _BATCH,
        "reward_model_loss": _BATCH,
        "segment_sum": _BATCH,
        "value_loss": _BATCH,
        "whiten": _BATCH,
    }.items()
}
"""Benchmarks of single ops."""

PROCESSES = {
    "integrations": [*_COMMON, "--vocab", "500", "--width", "64", "--length", "32"],
    "online": [*_COMMON, "--quick"],
    "training": [
        *_COMMON, "--model", "tiny", "--lengths", "8/8", "mixed", "--pairs", "2", "--steps", "3",
        "--dtype", "float32", "--task", "dpo", "reward", "sft",
    ],
}  # fmt: skip
"""Benchmarks whose contestants are processes of their own."""
