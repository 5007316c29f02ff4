"""TRL: the log-probs, entropies and fused head of its trainers.

`patch()` replaces, in `trl.trainer.utils` and wherever TRL has imported them by name, the few
functions that touch logits. Trainers, losses, metrics and normalisers stay TRL's own.
"""

from __future__ import annotations

from rlhf_fast.integrations.from_logits import fits, from_logits
from rlhf_fast.integrations.patching import Framework, Handle, Seam


def patch() -> Handle:
    """Gives the installed TRL our kernels; `undo()` of the result takes them back."""
    return TRL.patch()


def selective_log_softmax(original):
    def replacement(logits, index, temperature=1.0, row_mask=None):
        if temperature <= 0:
            raise ValueError("temperature must be positive")
        if not fits(logits, index):
            return original(logits, index, temperature, row_mask)
        return from_logits(logits, index, temperature=temperature, row_mask=row_mask).logps

    return replacement


def selective_log_softmax_in_logits_dtype(original):
    """Before 1.14 the result has the logits' dtype, and callers write it into such tensors."""

    def replacement(logits, index):
        if not fits(logits, index):
            return original(logits, index)
        return from_logits(logits, index).logps.to(logits.dtype)

    return replacement


def entropy_from_logits(original):
    def replacement(logits, chunk_size=128):
        if not fits(logits):
            return original(logits, chunk_size)
        return from_logits(logits, outputs=("entropy",)).entropy

    return replacement


def entropy_in_logits_dtype(original):
    def replacement(logits, chunk_size=128):
        if not fits(logits):
            return original(logits, chunk_size)
        return from_logits(logits, outputs=("entropy",)).entropy.to(logits.dtype)

    return replacement


def selective_log_softmax_and_entropy(original):
    def replacement(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
        if temperature <= 0:
            raise ValueError("temperature must be positive")
        if not fits(logits, index) or index.dim() == logits.dim():
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        out = from_logits(
            logits,
            index,
            temperature=temperature,
            row_mask=row_mask,
            outputs=("logps", "entropy"),
        )
        return out.logps, out.entropy if entropy_requires_grad else out.entropy.detach()

    return replacement


# ---- the table of seams --------------------------------------------------------------------------

UTILS = "trl.trainer.utils"
ENTROPY = ("(logits, chunk_size=128)",)
FROM_LOGITS_OLD = (
    Seam(
        f"{UTILS}:selective_log_softmax",
        selective_log_softmax_in_logits_dtype,
        ("(logits, index)",),
    ),
    Seam(f"{UTILS}:entropy_from_logits", entropy_in_logits_dtype, ENTROPY),
)
FROM_LOGITS = (
    Seam(
        f"{UTILS}:selective_log_softmax",
        selective_log_softmax,
        ("(logits, index, temperature=1.0, row_mask=None)",),
    ),
    Seam(f"{UTILS}:entropy_from_logits", entropy_from_logits, ENTROPY),
    Seam(
        f"{UTILS}:selective_log_softmax_and_entropy",
        selective_log_softmax_and_entropy,
        ("(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",),
    ),
)

TRL = Framework(
    "trl",
    {
        ">=0.24,<1.14": FROM_LOGITS_OLD,
        ">=1.14,<1.17": FROM_LOGITS,
    },
)
