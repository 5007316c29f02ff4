"""TRL: the log-probs, entropies and fused head of its trainers.

`patch()` replaces, in `trl.trainer.utils` and wherever TRL has imported them by name, the few
functions that touch logits. Trainers, losses, metrics and normalisers stay TRL's own.
"""

from __future__ import annotations

import types

from rlhf_fast.integrations.deferred import deferred_heads
from rlhf_fast.integrations.from_logits import fits, from_logits
from rlhf_fast.integrations.patching import Framework, Handle, Seam
from rlhf_fast.ops import linear_logps, native


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


# ---- the fused head ------------------------------------------------------------------------------

NAMES = {  # TRL's names of outputs, in the order of its tuple, and ours
    "log_probs": "logps",
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_p2",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


def _head(original, names, hidden, weight, bias, targets, temperature, softcap, logit_scale):
    """The outputs of these names, or None where TRL's own function has to compute them."""
    if hidden.dtype not in native.DTYPES or hasattr(weight, "ds_id"):  # ZeRO-3 gathers in backward
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
        out = _head(original, ("log_probs", "entropy"), hidden, weight, None, targets, *settings)
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

HEAD = f"{UTILS}:_ChunkedLogProbFunction"
HEAD_WITHOUT_BIAS = Seam(
    HEAD,
    fused_head_without_bias,
    (
        "forward(ctx, last_hidden, weight, targets, temperature, chunk_size, "
        "final_logit_softcapping=None, logit_scale=1.0)",
    ),
)
HEAD_PAIR = Seam(
    HEAD,
    fused_head_pair,
    (
        "forward(ctx, last_hidden, weight, bias, targets, temperature, chunk_size, "
        "final_logit_softcapping=None, logit_scale=1.0)",
    ),
)
FUSED_HEAD = Seam(
    HEAD,
    fused_head,
    (
        "forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, "
        "final_logit_softcapping=None, logit_scale=1.0, "
        "outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'))",
    ),
)
LIVE_POSITIONS = Seam(f"{UTILS}:_use_triton", score_live_positions, ("(device)",), alone=True)


def _deferring(method: str, replace=with_deferred_heads, signature="(self, model, ...)") -> Seam:
    return Seam(f"trl.{method}", replace, (signature,), if_importable=True)


def _per_token_logps(name: str) -> Seam:
    module = f"trainer.{name.lower()}_trainer:{name}Trainer"
    return _deferring(f"{module}._get_per_token_logps_and_entropies")


def _loss(name: str) -> Seam:
    return _deferring(
        f"trainer.{name.lower()}_trainer:{name}Trainer._compute_loss",
        with_deferred_heads_in_training,
        "(self, model, inputs, return_outputs)",
    )


SAMPLING = (_per_token_logps("GRPO"), _per_token_logps("RLOO"))
ONLINE_DPO = _deferring("experimental.online_dpo.online_dpo_trainer:OnlineDPOTrainer._forward")
OF_0_24 = (
    *SAMPLING,
    _deferring("trainer.dpo_trainer:DPOTrainer.concatenated_forward"),
    _deferring("trainer.kto_trainer:KTOTrainer.forward"),
    _deferring("trainer.online_dpo_trainer:OnlineDPOTrainer._forward"),
)
LOGITS = (*FROM_LOGITS_OLD, *SAMPLING, _loss("DPO"), ONLINE_DPO)

TRL = Framework(
    "trl",
    {
        "==0.24.*": (*FROM_LOGITS_OLD, *OF_0_24),
        ">=0.29,<1.6": LOGITS,
        ">=1.6,<1.8": (*LOGITS, HEAD_WITHOUT_BIAS),
        ">=1.8,<1.14": (*LOGITS, HEAD_WITHOUT_BIAS, _loss("KTO")),
        "==1.14.*": (*FROM_LOGITS, HEAD_PAIR, ONLINE_DPO),
        "==1.15.*": (*FROM_LOGITS, FUSED_HEAD, ONLINE_DPO),
        "==1.16.*": (*FROM_LOGITS, FUSED_HEAD, LIVE_POSITIONS, ONLINE_DPO),
    },
)
