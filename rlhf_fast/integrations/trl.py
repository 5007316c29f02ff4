"""TRL: the log-probs, entropies and fused head of its trainers.

`patch()` replaces, in `trl.trainer.utils` and wherever TRL has imported them by name, the few
functions that touch logits. Trainers, losses, metrics and normalisers stay TRL's own.
"""

from __future__ import annotations

from rlhf_fast.integrations import trl_replacements as ours
from rlhf_fast.integrations.patching import Framework, Handle, Seam


def patch() -> Handle:
    """Gives the installed TRL our kernels; `undo()` of the result takes them back.

    Raises:
        PatchRefused: if TRL is missing, of a version that this was not written for, or other than
            expected at a seam.
    """
    return FRAMEWORK.patch()


# ---- the table of seams --------------------------------------------------------------------------

UTILS = "trl.trainer.utils"
ENTROPY = ("(logits, chunk_size=128)",)
FROM_LOGITS_OLD = (
    Seam(
        f"{UTILS}:selective_log_softmax",
        ours.selective_log_softmax_in_logits_dtype,
        ("(logits, index)",),
    ),
    Seam(f"{UTILS}:entropy_from_logits", ours.entropy_in_logits_dtype, ENTROPY),
)
FROM_LOGITS = (
    Seam(
        f"{UTILS}:selective_log_softmax",
        ours.selective_log_softmax,
        ("(logits, index, temperature=1.0, row_mask=None)",),
    ),
    Seam(f"{UTILS}:entropy_from_logits", ours.entropy_from_logits, ENTROPY),
    Seam(
        f"{UTILS}:selective_log_softmax_and_entropy",
        ours.selective_log_softmax_and_entropy,
        ("(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",),
    ),
)

HEAD = f"{UTILS}:_ChunkedLogProbFunction"
HEAD_WITHOUT_BIAS = Seam(
    HEAD,
    ours.fused_head_without_bias,
    (
        "forward(ctx, last_hidden, weight, targets, temperature, chunk_size, "
        "final_logit_softcapping=None, logit_scale=1.0)",
    ),
)
HEAD_PAIR = Seam(
    HEAD,
    ours.fused_head_pair,
    (
        "forward(ctx, last_hidden, weight, bias, targets, temperature, chunk_size, "
        "final_logit_softcapping=None, logit_scale=1.0)",
    ),
)
FUSED_HEAD = Seam(
    HEAD,
    ours.fused_head,
    (
        "forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, "
        "final_logit_softcapping=None, logit_scale=1.0, "
        "outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'))",
    ),
)
LIVE_POSITIONS = Seam(f"{UTILS}:_use_triton", ours.score_live_positions, ("(device)",), alone=True)


def _deferring(
    method: str, replace=ours.with_deferred_heads, signature="(self, model, ...)"
) -> Seam:
    return Seam(f"trl.{method}", replace, (signature,), if_importable=True)


def _per_token_logps(name: str) -> Seam:
    module = f"trainer.{name.lower()}_trainer:{name}Trainer"
    return _deferring(f"{module}._get_per_token_logps_and_entropies")


def _loss(name: str) -> Seam:
    return _deferring(
        f"trainer.{name.lower()}_trainer:{name}Trainer._compute_loss",
        ours.with_deferred_heads_in_training,
        "(self, model, inputs, return_outputs)",
    )


CHUNKED_NLL = Seam(
    "trl.trainer.sft_trainer:_chunked_cross_entropy_loss",
    ours.chunked_cross_entropy,
    (
        "(hidden_states, lm_head_weight, chunk_size, labels=None, shift_labels=None, "
        "num_items_in_batch=None, logit_scale=1.0, final_logit_softcapping=None, "
        "lm_head_bias=None)",
    ),
    if_importable=True,
)
SAMPLING = (_per_token_logps("GRPO"), _per_token_logps("RLOO"))
ONLINE_DPO = _deferring("experimental.online_dpo.online_dpo_trainer:OnlineDPOTrainer._forward")


def _pairs(folder: str, batch_logps: str) -> tuple[Seam, ...]:
    """ORPO and CPO: the log-probs and the NLL of one call, in `folder` of each."""
    found = []
    for name in ("ORPO", "CPO"):
        trainer = f"{folder.format(name.lower())}.{name.lower()}_trainer:{name}Trainer"
        seam = f"trl.{trainer}.get_batch_logps"
        found += [
            _deferring(f"{trainer}.concatenated_forward", signature="(self, model, batch)"),
            Seam(seam, ours.get_batch_logps, (batch_logps,), if_importable=True),
        ]
    return tuple(found)


PAIRS = _pairs(
    "experimental.{}", "(logits, labels, average_log_prob=False, is_encoder_decoder=False)"
)
OF_0_24 = (
    *SAMPLING,
    *_pairs(
        "trainer",
        "(logits, labels, average_log_prob=False, label_pad_token_id=-100, "
        "is_encoder_decoder=False)",
    ),
    _deferring("trainer.dpo_trainer:DPOTrainer.concatenated_forward"),
    _deferring("trainer.kto_trainer:KTOTrainer.forward"),
    _deferring("trainer.online_dpo_trainer:OnlineDPOTrainer._forward"),
)
LOGITS = (*FROM_LOGITS_OLD, *SAMPLING, _loss("DPO"), ONLINE_DPO, *PAIRS)

FRAMEWORK = Framework(
    "trl",
    {
        "==0.24.*": (*FROM_LOGITS_OLD, *OF_0_24),
        ">=0.29,<1.6": LOGITS,
        ">=1.6,<1.8": (*LOGITS, HEAD_WITHOUT_BIAS, CHUNKED_NLL),
        ">=1.8,<1.14": (*LOGITS, HEAD_WITHOUT_BIAS, CHUNKED_NLL, _loss("KTO")),
        "==1.14.*": (*FROM_LOGITS, HEAD_PAIR, CHUNKED_NLL, ONLINE_DPO, *PAIRS),
        "==1.15.*": (*FROM_LOGITS, FUSED_HEAD, ONLINE_DPO, *PAIRS),
        "==1.16.*": (*FROM_LOGITS, FUSED_HEAD, LIVE_POSITIONS, ONLINE_DPO, *PAIRS),
    },
)
