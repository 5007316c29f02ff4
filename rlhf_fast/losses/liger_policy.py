"""Liger's fused linear GRPO loss: its class and results, on our fused head."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from rlhf_fast.ops import PolicyLossParams, linear_logps, policy_loss

# Liger's and TRL's name -> ours, and how token losses are summed
LOSS_TYPES = {
    "grpo": ("grpo", "seq-mean-token-mean"),
    "sapo": ("sapo", "seq-mean-token-mean"),
    "bnpo": ("ppo", "token-mean"),
    "dapo": ("ppo", "token-sum"),
    "dr_grpo": ("ppo", "token-sum"),
    "cispo": ("cispo", "token-sum"),
    "vespo": ("vespo", "token-sum"),
    "luspo": ("gspo", "seq-mean-token-sum"),
}


class FusedLinearGRPOLoss(nn.Module):
    """Stands for `LigerFusedLinearGRPOLoss`: (loss, (mean KL if beta != 0, share clipped)).

    Same constructor and order of arguments as in `liger_kernel.chunked_loss`; `compiled` and
    `chunk_size` have no effect. The formulas are those of `rlhf_fast.ops.policy_loss`, the
    normalisers TRL's. Masked tokens do not go through the head.

    Refused are luspo at token level, with a KL or with sampling ratios of tokens, where Liger
    counts masked tokens, vespo with one sampling ratio per sequence, and cispo with Liger's default
    `epsilon_high`, which would cut every ratio to 0.2.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        self.beta, self.use_ref_model, self.temperature = beta, use_ref_model, temperature
        self.loss_type, self.max_completion_length = loss_type, max_completion_length
        self._check(importance_sampling_level)
        if loss_type == "cispo":  # only an upper bound, and not relative to 1
            highest = "epsilon_high of cispo, the highest ratio itself, must be at least 1"
            _must(epsilon_high >= 1, highest, epsilon_high)
            epsilon_low, epsilon_high = 1.0, epsilon_high - 1
        level = {"token": "token", "sequence": "sequence-mean"}[importance_sampling_level]
        self.params = PolicyLossParams(
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            dual_clip=delta,
            ratio_level=None if loss_type == "vespo" else level,
            log_ratio_bound=float("inf"),
            aggregation=LOSS_TYPES[loss_type][1],
            kl_coef=beta,
            kl_correction="importance" if use_bias_correction_kl else "none",
            sampling_high=float("inf"),
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
        )

    def _check(self, level: str) -> None:
        names, levels = tuple(LOSS_TYPES), ("token", "sequence")
        kind = self.loss_type
        _must(kind in names, f"loss_type must be one of {names}", repr(kind))
        _must(level in levels, f"importance_sampling_level must be one of {levels}", repr(level))
        token_only = ("cispo", "sapo", "vespo")
        _must(
            level == "token" or kind not in token_only,
            f"importance_sampling_level must be 'token' for {token_only}",
            f"{level!r} with {kind!r}",
        )
        _must(
            kind != "luspo" or (level == "sequence" and self.beta == 0),
            "luspo must be at sequence level and without a KL",
            f"{level!r} with beta {self.beta}",
        )
        _must(
            kind != "dr_grpo" or self.max_completion_length is not None,
            "dr_grpo must be told max_completion_length",
            None,
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ):
        mask = attention_mask.bool()
        logps = self._logps(_input, lin_weight, selected_token_ids, mask, bias)
        ref_logps = None
        if self.use_ref_model and self.beta != 0:
            ref_logps = ref_per_token_logps
            if ref_logps is None:
                with torch.no_grad():
                    args = (ref_input, ref_weight, selected_token_ids, mask, ref_bias)
                    ref_logps = self._logps(*args)
        loss, metrics = policy_loss(
            logps,
            old_per_token_logps,
            advantages,
            mask=mask,
            loss_type=LOSS_TYPES[self.loss_type][0],
            params=self.params,
            ref_logps=logps.detach() if ref_logps is None and self.beta != 0 else ref_logps,
            sampling_logps=self._sampling_logps(logps, old_per_token_logps, vllm_is_ratio),
            normalizer=self._normalizer(mask, num_items_in_batch),
        )
        clipped = metrics.clip_low + metrics.clip_high
        if self.loss_type == "cispo" and old_per_token_logps is not None:
            clipped = self._clipped(logps - old_per_token_logps, advantages, mask)
        return loss, (metrics.ref_kl, clipped) if self.beta != 0 else (clipped,)

    @torch.no_grad()
    def _clipped(self, log_ratio, advantages, mask) -> Tensor:
        """Of cispo Liger counts only tokens of positive advantage."""
        clipped = (log_ratio.exp() > 1 + self.params.epsilon_high) & (advantages > 0)[:, None]
        return (clipped & mask).sum() / mask.sum().clamp(min=1)

    def _logps(self, hidden, weight, labels, mask, bias) -> Tensor:
        settings = {"bias": bias, "mask": mask, "temperature": self.temperature}
        return linear_logps(hidden, weight, labels, **settings).logps

    def _sampling_logps(self, logps, old_logps, ratio) -> Tensor | None:
        """The sampler's log-probs that give this ratio, which `policy_loss` forms itself."""
        if ratio is None:
            return None
        by_token = ratio.shape == logps.shape
        _must(
            by_token or self.loss_type != "vespo",
            f"vllm_is_ratio must have shape {tuple(logps.shape)} for vespo",
            tuple(ratio.shape),
        )
        _must(
            not by_token or self.loss_type != "luspo",
            f"vllm_is_ratio must have shape {(len(logps), 1)} for luspo",
            tuple(ratio.shape),
        )
        old = logps.detach() if old_logps is None else old_logps
        return old - ratio.clamp(min=torch.finfo(torch.float32).tiny).log()

    def _normalizer(self, mask: Tensor, num_items: float | Tensor | None) -> float | Tensor | None:
        if self.loss_type == "dr_grpo":
            return float(len(mask) * self.max_completion_length)
        if self.loss_type in ("dapo", "cispo", "vespo"):
            ranks = distributed.get_world_size() if distributed.is_initialized() else 1
            if num_items is None:
                num_items = mask.sum()
                if ranks > 1:
                    distributed.all_reduce(num_items)
            return torch.as_tensor(num_items / ranks, device=mask.device).clamp(min=1.0)
        return None if self.loss_type == "bnpo" else float(len(mask))


def _must(condition: bool, must: str, got: object) -> None:
    if not condition:
        raise ValueError(f"FusedLinearGRPOLoss: {must}, got {got}; see its documentation")
