"""OpenRLHF: the head of its actor, functions of logits, losses and advantages."""

from __future__ import annotations

import inspect

from rlhf_fast.integrations.declining import declined
from rlhf_fast.integrations.deferred_heads import deferred_heads
from rlhf_fast.integrations.from_logits import ONE_LABEL, from_logits, misfit
from rlhf_fast.integrations.openrlhf_losses import LOSSES, POLICY_LOSS, TOKENS, VALUE_LOSS
from rlhf_fast.integrations.patching import Framework, Handle, Seam


def patch() -> Handle:
    """Gives the installed OpenRLHF our kernels; `undo()` of the result takes them back.

    Raises:
        PatchRefused: if OpenRLHF is missing, of a version that this was not written for, or other
            than expected at a seam.
    """
    return FRAMEWORK.patch()


def log_probs_from_logits(original):
    def replacement(logits, labels, temperature=1.0):
        reason = misfit(logits, labels) or (ONE_LABEL if labels.dim() == logits.dim() else None)
        if reason:
            return declined(original, reason)(logits, labels, temperature)
        if temperature != 1.0:
            logits.div_(temperature)  # callers go on with logits that have been divided
        return from_logits(logits, labels).logps.to(logits.dtype)

    return replacement


def compute_entropy(original):
    def replacement(logits):
        if reason := misfit(logits):
            return declined(original, reason)(logits)
        return from_logits(logits, outputs=("entropy",)).entropy.to(logits.dtype)

    return replacement


def actor_forward(original):
    """Where only log-probs are asked for, the actor's logits wait for what is asked of them."""
    signature = inspect.signature(original)

    def replacement(self, *args, **kwargs):
        asked = signature.bind(self, *args, **kwargs).arguments
        logps_only = asked.get("action_mask") is not None or asked.get("return_logprobs")
        with deferred_heads(self.model if logps_only else None):
            return original(self, *args, **kwargs)

    return replacement


# ---- the table of seams --------------------------------------------------------------------------

HEAD = (
    Seam(
        "openrlhf.models.utils:log_probs_from_logits",
        log_probs_from_logits,
        ("(logits, labels, temperature=1.0)",),
    ),
    Seam("openrlhf.models.utils:compute_entropy", compute_entropy, ("(logits)",)),
    Seam(
        "openrlhf.models.actor:Actor.forward",
        actor_forward,
        ("(self, sequences, action_mask=None, attention_mask=None, ...)",),
    ),
)
FRAMEWORK = Framework(
    "openrlhf",
    {
        ">=0.9,<0.11.2": (*HEAD, *LOSSES, *TOKENS),
        ">=0.11.2,<0.12": (*HEAD, *LOSSES, POLICY_LOSS, VALUE_LOSS, *TOKENS),
    },
)
