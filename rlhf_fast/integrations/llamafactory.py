"""LLaMA-Factory: the log-probs of its DPO and KTO trainers, and its heads.

Its DPO and KTO stages run on TRL 0.24 with losses of its own; they take logits in float32 for the
log-probs of labels alone. With the patch the head is fused and those logits do not exist.
"""

from __future__ import annotations

from rlhf_fast.integrations.declining import declined
from rlhf_fast.integrations.deferred_heads import deferred_heads
from rlhf_fast.integrations.from_logits import LiveLogits, misfit
from rlhf_fast.integrations.patching import Framework, Handle, Seam


def patch() -> Handle:
    """Gives the installed LLaMA-Factory our kernels; `undo()` of the result takes them back.

    Raises:
        PatchRefused: if LLaMA-Factory is missing, of a version that this was not written for, or
            other than expected at a seam.
    """
    return FRAMEWORK.patch()


def get_batch_logps(original):
    """The original: only its gather from the log-softmax, over tokens that count, is ours."""

    def replacement(logits, labels, label_pad_token_id=-100, ld_alpha=None):
        reason = misfit(logits, labels)
        if logits.shape[:-1] != labels.shape:  # which the original refuses
            reason = "logits and labels must have the same batch and length"
        if reason:
            return declined(original, reason)(logits, labels, label_pad_token_id, ld_alpha)
        logits = LiveLogits.labelled(logits, labels, label_pad_token_id)
        return original(logits, labels, label_pad_token_id, ld_alpha)

    return replacement


def with_deferred_heads(original):
    """A method whose first argument is the model: its logits wait for what is asked of them."""

    def replacement(self, model, *args, **kwargs):
        with deferred_heads(model):
            return original(self, model, *args, **kwargs)

    return replacement


# ---- the table of seams --------------------------------------------------------------------------

FRAMEWORK = Framework(
    "llamafactory",
    {
        ">=0.9.3,<0.10": (
            Seam(
                "llamafactory.train.trainer_utils:get_batch_logps",
                get_batch_logps,
                ("(logits, labels, label_pad_token_id=-100, ld_alpha=None)",),
            ),
            Seam(
                "llamafactory.train.dpo.trainer:CustomDPOTrainer.concatenated_forward",
                with_deferred_heads,
                ("(self, model, batch, is_ref_model=False)",),
            ),
            Seam(
                "llamafactory.train.kto.trainer:CustomKTOTrainer.forward",
                with_deferred_heads,
                ("(self, model, batch, prefix='')",),
            ),
        ),
    },
)
