"""What takes the place of TRL's functions. Each is called with the original and returns ours."""

from __future__ import annotations

import inspect
import types

from rlhf_fast.integrations.declining import declined
from rlhf_fast.integrations.deferred_heads import deferred_heads
from rlhf_fast.integrations.from_logits import (
    ONE_LABEL,
    LiveLogits,
    from_logits,
    misfit,
    misfit_of_hidden,
)
from rlhf_fast.ops import linear_logps


def selective_log_softmax(original):
    def replacement(logits, index, temperature=1.0, row_mask=None):
        if temperature <= 0:
            raise ValueError("temperature must be positive")
        if reason := misfit(logits, index):
            return declined(original, reason)(logits, index, temperature, row_mask)
        return from_logits(logits, index, temperature=temperature, row_mask=row_mask).logps

    return replacement


def selective_log_softmax_in_logits_dtype(original):
    """Before 1.14 the result has the logits' dtype, and callers write it into such tensors."""

    def replacement(logits, index):
        if reason := misfit(logits, index):
            return declined(original, reason)(logits, index)
        return from_logits(logits, index).logps.to(logits.dtype)

    return replacement


def entropy_from_logits(original):
    def replacement(logits, chunk_size=128):
        if reason := misfit(logits):
            return declined(original, reason)(logits, chunk_size)
        return from_logits(logits, outputs=("entropy",)).entropy

    return replacement


def entropy_in_logits_dtype(original):
    def replacement(logits, chunk_size=128):
        if reason := misfit(logits):
            return declined(original, reason)(logits, chunk_size)
        return from_logits(logits, outputs=("entropy",)).entropy.to(logits.dtype)

    return replacement


def selective_log_softmax_and_entropy(original):
    def replacement(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
        if temperature <= 0:
            raise ValueError("temperature must be positive")
        reason = misfit(logits, index) or (ONE_LABEL if index.dim() == logits.dim() else None)
        if reason:
            args = (logits, index, entropy_requires_grad, temperature, row_mask)
            return declined(original, reason)(*args)
        out = from_logits(
            logits,
            index,
            temperature=temperature,
            row_mask=row_mask,
            outputs=("logps", "entropy"),
        )
        return out.logps, out.entropy if entropy_requires_grad else out.entropy.detach()

    return replacement


def get_batch_logps(original):
    """ORPO and CPO: the original, but only tokens that count go through the head."""
    signature = inspect.signature(original)

    def replacement(logits, labels, *args, **kwargs):
        given = signature.bind(logits, labels, *args, **kwargs).arguments
        reason = misfit(logits, labels)
        if given.get("is_encoder_decoder"):
            reason = "the model must be a decoder alone"
        if logits.shape[:-1] != labels.shape:  # which the original refuses
            reason = "logits and labels must have the same batch and length"
        if reason:
            return declined(original, reason)(logits, labels, *args, **kwargs)
        logits = LiveLogits.labelled(logits, labels, given.get("label_pad_token_id", -100))
        return original(logits, labels, *args, **kwargs)

    return replacement


# ---- the fused head ------------------------------------------------------------------------------

NAMES = {  # TRL's names of outputs, in the order of its tuple, and ours
    "log_probs": "logps",
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_p2",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


def _misfit_of_head(hidden, weight) -> str | None:
    """Why TRL's own function has to compute this head, or None."""
    if hasattr(weight, "ds_id"):
        return "ZeRO-3 has to gather the weight again in backward"
    return misfit_of_hidden(hidden)


def _head(original, names, hidden, weight, bias, targets, temperature, softcap, logit_scale):
    """The outputs of these names, or None where TRL's own function has to compute them."""
    if reason := _misfit_of_head(hidden, weight):
        declined(original, reason)
        return None
    out = linear_logps(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        outputs=tuple(NAMES[name] for name in names),
    )
    return out._replace(sum_p2=None if out.sum_p2 is None else out.sum_p2.log())


def fused_head(original):
    """From 1.15 on: every trainer's log-probs and statistics, in a tuple of five."""

    def apply(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=tuple(NAMES)[1:],
    ):
        names = ("log_probs", *(name for name in tuple(NAMES)[1:] if name in outputs))
        settings = (temperature, final_logit_softcapping, logit_scale)
        out = _head(original, names, hidden, weight, bias, targets, *settings)
        if out is None:
            return original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, *settings[1:], outputs
            )
        return tuple(getattr(out, name) for name in NAMES.values())

    return types.SimpleNamespace(apply=apply)


def fused_head_pair(original):
    """1.14: log-probs and entropy."""

    def apply(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
    ):
        settings = (temperature, final_logit_softcapping, logit_scale)
        names = ("log_probs", "entropy")
        out = _head(original, names, hidden, weight, bias, targets, *settings)
        if out is None:
            return original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, *settings[1:]
            )
        return out.logps, out.entropy

    return types.SimpleNamespace(apply=apply)


def fused_head_without_bias(original):
    """Before 1.14: log-probs and entropy, no bias."""

    def apply(
        hidden,
        weight,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
    ):
        settings = (temperature, final_logit_softcapping, logit_scale)
        names = ("log_probs", "entropy")
        out = _head(original, names, hidden, weight, None, targets, *settings)
        if out is None:
            return original.apply(hidden, weight, targets, temperature, chunk_size, *settings[1:])
        return out.logps, out.entropy

    return types.SimpleNamespace(apply=apply)


def score_live_positions(original):
    """From 1.16 on TRL drops masked positions before the head on CUDA only; we do it everywhere."""
    return lambda device: True


def with_deferred_heads(original):
    """A method whose first argument is the model: its logits wait for what is asked of them."""

    def replacement(self, model, *args, **kwargs):
        with deferred_heads(model, getattr(self, "ref_model", None)):
            return original(self, model, *args, **kwargs)

    return replacement


def with_deferred_heads_in_training(original):
    """`return_outputs` hands the logits to the evaluation loop, which wants them as they are."""

    def replacement(self, model, inputs, return_outputs):
        models = () if return_outputs else (model, getattr(self, "ref_model", None))
        with deferred_heads(*models):
            return original(self, model, inputs, return_outputs)

    return replacement


def chunked_cross_entropy(original):
    """SFT's default loss before 1.15: loss, number right, sum of entropies, number of labels."""

    def replacement(
        hidden_states,
        lm_head_weight,
        chunk_size,
        labels=None,
        shift_labels=None,
        num_items_in_batch=None,
        logit_scale=1.0,
        final_logit_softcapping=None,
        lm_head_bias=None,
    ):
        hidden, targets = hidden_states, shift_labels
        if targets is None and labels is not None:
            hidden, targets = hidden_states[..., :-1, :], labels[..., 1:]
        reason = _misfit_of_head(hidden, lm_head_weight)
        if targets is None:  # which the original refuses
            reason = "labels or shift_labels must be given"
        if reason:
            args = (labels, shift_labels, num_items_in_batch, logit_scale)
            args = (*args, final_logit_softcapping, lm_head_bias)
            return declined(original, reason)(hidden_states, lm_head_weight, chunk_size, *args)
        out = linear_logps(
            hidden,
            lm_head_weight,
            targets,
            bias=lm_head_bias,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            outputs=("logps", "entropy", "is_top1"),
        )
        count = (targets != -100).sum()
        divisor = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if hasattr(divisor, "to"):
            divisor = divisor.to(out.logps.device)
        loss = -out.logps.sum() / divisor
        return loss, out.is_top1.sum().float(), out.entropy.detach().sum(), count

    return replacement
