"""Liger's fused linear preference losses: its classes and results, on our fused head.

Drop-in for `liger_kernel.chunked_loss`: same constructors, same order of arguments, same tuple of
results. `compiled` and `chunk_size` tune Liger's implementation and have no effect on ours. What is
returned beside the loss carries no gradient (Liger's carries one that its backward ignores).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlhf_fast.ops import (
    PairData,
    PreferenceParams,
    linear_logps,
    preference_loss,
    unpaired_preference_loss,
)


class _PairLoss(nn.Module):
    """What the losses of pairs share: target (2B, T) holds the chosen half, then the rejected."""

    ignore_index: int
    beta: float
    compute_nll_loss: bool
    alpha: float = 1.0
    average_log_prob: bool = True

    def _logps(self, hidden, weight, target, bias) -> tuple[Tensor, Tensor]:
        """(log-probs of tokens [2B, T], 0 where ignored; of sequences [2B])."""
        return _sequence_logps(
            hidden, weight, target, bias, self.ignore_index, self.average_log_prob
        )

    def _nll(self, tokens, hidden, weight, target, bias, nll_target) -> Tensor:
        if not self.compute_nll_loss:
            return tokens.new_zeros(())
        half = len(target) // 2
        if nll_target is None:
            return -tokens[:half].sum() / (target[:half] != self.ignore_index).sum()
        labels = nll_target[:half]
        out = linear_logps(hidden[:half], weight, labels, bias=bias, ignore_index=self.ignore_index)
        return -out.logps.sum() / (labels != self.ignore_index).sum()

    def _result(self, loss, logps, nll, hidden, weight, bias, *aux):
        half = len(logps) // 2
        means = (_mean_logit(h, weight, bias) for h in (hidden[:half], hidden[half:]))
        metrics = (logps[:half], logps[half:], *means, nll, *aux)
        return loss + self.alpha * nll, tuple(t.detach() for t in metrics)


class FusedLinearDPOLoss(_PairLoss):
    """Stands for `LigerFusedLinearDPOLoss`: (loss, (chosen_logps, rejected_logps,
    chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards, rejected_rewards)).

    Source of each loss_type: `rlhf_fast.ops.preference_loss`. `ipo` is refused as in Liger.
    """

    LOSS_TYPES = (
        "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
        "apo_down", "discopop",
    )  # fmt: skip

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        if loss_type not in self.LOSS_TYPES:
            raise ValueError(
                f"FusedLinearDPOLoss: loss_type must be one of {self.LOSS_TYPES}, "
                f"got {loss_type!r}; ops.linear_preference_loss knows more"
            )
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.use_ref_model = compute_nll_loss, use_ref_model
        self.average_log_prob, self.loss_type = average_log_prob, loss_type
        own = {
            "exo_pair": {"label_smoothing": label_smoothing},
            "robust": {"label_smoothing": label_smoothing},
            "discopop": {"discopop_tau": discopop_tau},
        }
        self.params = PreferenceParams(**own.get(loss_type, {}))

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ):
        tokens, logps = self._logps(_input, lin_weight, target, bias)
        ref_logps = torch.zeros_like(logps)
        if self.use_ref_model:
            with torch.no_grad():
                _, ref_logps = self._logps(ref_input, ref_weight, target, ref_bias)
        half = len(target) // 2
        out = preference_loss(
            *(logps[:half], logps[half:], ref_logps[:half], ref_logps[half:]),
            loss_type=self.loss_type,
            beta=self.beta,
            params=self.params,
        )
        nll = self._nll(tokens, _input, lin_weight, target, bias, None)
        rewards = self.beta * (logps - ref_logps)
        rewards = (rewards[:half], rewards[half:])
        return self._result(out.loss, logps, nll, _input, lin_weight, bias, *rewards)


class _PairLossWithoutReference(_PairLoss):
    """ORPO, CPO, SimPO: the loss of sequence log-probs, and the chosen responses' mean NLL."""

    loss_type: str
    params = PreferenceParams()

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ):
        tokens, logps = self._logps(_input, lin_weight, target, bias)
        half = len(target) // 2
        ones = torch.ones_like(logps[:half])  # these log-probs are means already, where they are
        lengths = PairData(ones, ones) if self.average_log_prob else PairData()
        out = preference_loss(
            logps[:half],
            logps[half:],
            loss_type=self.loss_type,
            beta=self.beta,
            params=self.params,
            data=lengths,
        )
        nll = self._nll(tokens, _input, lin_weight, target, bias, nll_target)
        aux = (self.beta * logps[:half], self.beta * logps[half:], *self._more(logps))
        return self._result(out.loss, logps, nll, _input, lin_weight, bias, *aux)

    def _more(self, logps: Tensor) -> tuple[Tensor, ...]:
        return ()


class FusedLinearORPOLoss(_PairLossWithoutReference):
    """Stands for `LigerFusedLinearORPOLoss`: as for DPO, then log_odds_ratio, log_odds_chosen.

    Source: arXiv 2403.07691, equations 4 to 7.
    """

    loss_type = "orpo"

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss

    def _more(self, logps: Tensor) -> tuple[Tensor, ...]:
        odds = logps - torch.log1p(-logps.exp())
        chosen, rejected = odds.view(2, -1)
        log_odds = chosen - rejected
        return nn.functional.logsigmoid(log_odds).mean(), log_odds.mean()


class FusedLinearCPOLoss(_PairLossWithoutReference):
    """Stands for `LigerFusedLinearCPOLoss`; results as for DPO. Source: arXiv 2401.08417."""

    loss_type = "cpo"

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.average_log_prob = compute_nll_loss, average_log_prob
        self.params = PreferenceParams(label_smoothing=label_smoothing)


class FusedLinearSimPOLoss(_PairLossWithoutReference):
    """Stands for `LigerFusedLinearSimPOLoss`; results as for DPO. Source: arXiv 2405.14734."""

    loss_type = "simpo"

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss = compute_nll_loss
        self.params = PreferenceParams(label_smoothing=label_smoothing, margin=gamma)


class FusedLinearKTOLoss(nn.Module):
    """Stands for `LigerFusedLinearKTOLoss`: (loss, sums of chosen_logps, rejected_logps,
    chosen_logits, rejected_logits, chosen_rewards, rejected_rewards).

    Source: arXiv 2402.01306, equation 7.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index, self.beta = ignore_index, beta
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ):
        settings = (self.ignore_index, self.average_log_prob)
        _, logps = _sequence_logps(_input, lin_weight, target, bias, *settings)
        ref_logps = torch.zeros_like(logps)
        if self.use_ref_model:
            with torch.no_grad():
                _, ref_logps = _sequence_logps(ref_input, ref_weight, target, ref_bias, *settings)
        shifted = ref_logps if kl is None else ref_logps + kl  # kl may differ between sequences
        out = unpaired_preference_loss(
            logps,
            preference_labels,
            shifted,
            beta=self.beta,
            data=PairData(baseline=logps.new_zeros(())),
        )
        rewards = self.beta * (logps - ref_logps).detach()
        means = torch.stack([_mean_logit(h[None], lin_weight, bias) for h in _input])
        sums = means * target.shape[1] * len(lin_weight)
        pairs = (t * m for t in (logps.detach(), sums, rewards) for m in _signs(preference_labels))
        return out.loss, tuple(t.sum() for t in pairs)


def _signs(preference_labels: Tensor) -> tuple[Tensor, Tensor]:
    return preference_labels, ~preference_labels


def _sequence_logps(hidden, weight, target, bias, ignore_index, average) -> tuple[Tensor, Tensor]:
    tokens = linear_logps(hidden, weight, target, bias=bias, ignore_index=ignore_index).logps
    sums = tokens.sum(-1)
    return tokens, sums / (target != ignore_index).sum(-1) if average else sums


@torch.no_grad()
def _mean_logit(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Mean over rows and vocabulary, from the means of both factors."""
    mean = hidden.float().mean((0, 1)) @ weight.mean(0, dtype=torch.float32)
    return mean if bias is None else mean + bias.mean(dtype=torch.float32)
