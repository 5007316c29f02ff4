"""verl: log-probs and entropies of logits, fused heads, advantages and policy losses.

In every process of a run, without touching its scripts:
`VERL_USE_EXTERNAL_MODULES=rlhf_fast.integrations.patch_verl`.
"""

from __future__ import annotations

import os

from rlhf_fast.integrations.declining import declined
from rlhf_fast.integrations.from_logits import ONE_LABEL, from_logits, misfit, misfit_of_hidden
from rlhf_fast.integrations.patching import Framework, Handle, Seam
from rlhf_fast.integrations.verl_advantages import ADVANTAGES
from rlhf_fast.integrations.verl_losses import LOSSES
from rlhf_fast.ops import linear_logps


def patch() -> Handle:
    """Gives the installed verl our kernels; `undo()` of the result takes them back.

    Raises:
        PatchRefused: if verl is missing, of a version that this was not written for, or other than
            expected at a seam.
    """
    return FRAMEWORK.patch()


def logprobs_from_logits(original):
    def replacement(logits, labels, inplace_backward=True):
        reason = misfit(logits, labels) or (ONE_LABEL if labels.dim() == logits.dim() else None)
        if reason:
            return declined(original, reason)(logits, labels, inplace_backward)
        flash = _uses_flash_attention(original)
        out = from_logits(logits, labels, inplace_backward=inplace_backward and flash)
        return out.logps if flash else out.logps.to(logits.dtype)

    return replacement


def _uses_flash_attention(original) -> bool:
    """Where verl calls flash-attn, log-probs are float32 and backward may overwrite the logits."""
    available = original.__globals__.get("FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)
    return available and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"


def entropy_from_logits(original):
    def replacement(logits):
        if reason := misfit(logits):
            return declined(original, reason)(logits)
        return from_logits(logits, outputs=("entropy",)).entropy.to(logits.dtype)

    return replacement


def entropy_from_logits_with_chunking(original):
    def replacement(logits, chunk_size=2048):
        if reason := misfit(logits):
            return declined(original, reason)(logits, chunk_size)
        return from_logits(logits, outputs=("entropy",)).entropy

    return replacement


def linear_cross_entropy(original):
    """Called as `linear_cross_entropy(...)`: verl binds the `apply` of its autograd function."""

    def replacement(
        hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
    ):
        reason = misfit_of_hidden(hidden)
        if reduction != "none" or dist_process_group is not None:
            reason = "the vocabulary must be whole and reduction none"
        if reason:
            args = (hidden, weight, labels, temperature, reduction, dist_process_group)
            return declined(original, reason)(*args)
        out = linear_logps(
            hidden.flatten(0, -2),
            weight,
            labels.flatten(),
            temperature=temperature,
            outputs=("logps", "entropy"),
        )
        return out.logps, out.entropy

    return replacement


def fused_linear_for_ppo(original):
    def replacement(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        if reason := misfit_of_hidden(hidden_states):
            args = (hidden_states, vocab_weights, input_ids, temperature)
            return declined(original, reason)(self, *args)
        out = linear_logps(
            hidden_states,
            vocab_weights,
            input_ids.long(),
            temperature=temperature,
            outputs=("logps", "entropy"),
        )
        return out.logps, out.entropy.to(hidden_states.dtype)

    return replacement


# ---- the table of seams --------------------------------------------------------------------------

FUNCTIONAL = "verl.utils.torch_functional"
FRAMEWORK = Framework(
    "verl",
    {
        "==0.9.*": (
            Seam(
                f"{FUNCTIONAL}:logprobs_from_logits",
                logprobs_from_logits,
                ("(logits, labels, inplace_backward=True)",),
            ),
            Seam(f"{FUNCTIONAL}:entropy_from_logits", entropy_from_logits, ("(logits)",)),
            Seam(
                f"{FUNCTIONAL}:entropy_from_logits_with_chunking",
                entropy_from_logits_with_chunking,
                ("(logits, chunk_size=2048)",),
            ),
            Seam(
                "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward",
                fused_linear_for_ppo,
                ("(self, hidden_states, vocab_weights, input_ids, temperature=1.0)",),
            ),
            Seam(
                "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
                linear_cross_entropy,
                (),
            ),
            *ADVANTAGES,
            *LOSSES,
        ),
    },
)
