"""What the preference losses take and give, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import native

TRAITS: dict[str, list[str]] = native.table("PREFERENCE_LOSSES")
PREFERENCE_LOSSES = tuple(TRAITS)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
REDUCTIONS = ("mean", "sum", "none")
NUMBERS = (  # of PreferenceParams, as the kernel takes them
    "label_smoothing",
    "margin",
    "nll_weight",
    "center_weight",
    "alpha",
    "discopop_tau",
    "dpop_penalty",
    "chosen_weight",
    "rejected_weight",
)


def _must(condition: bool, must: str, got: object, advice: str) -> None:
    native.check(condition, "preference_loss", must, got, advice)


@dataclass(frozen=True)
class PreferenceParams:
    """Settings of single losses; a setting that the chosen loss does not know is refused."""

    label_smoothing: float = 0.0
    """Assumed share of flipped labels, in [0, 0.5): conservative DPO, robust DPO, EXO (above 0)."""
    margin: float = 0.0
    """Subtracted from beta * (chosen - rejected): SimPO's gamma, SLiC's delta."""
    nll_weight: float = 0.0
    """Weight of the chosen response's mean negative log-prob per token (arXiv 2404.19733,
    equation 2; the SFT terms of ORPO, CPO and SLiC)."""
    center_weight: float = 0.0
    """Weight of (chosen score + rejected score)^2, which centres rewards (arXiv 2312.09244)."""
    alpha: float = 0.5
    """Of the alpha-divergence."""
    discopop_tau: float = 0.05
    """Temperature of DiscoPOP's blend."""
    dpop_penalty: float = 0.0
    """DPO-Positive's lambda."""
    chosen_weight: float = 1.0
    """Of the chosen part of kto, bco_pair, apo_zero, nca_pair, sppo_hard (KTO's lambda_D)."""
    rejected_weight: float = 1.0
    """Of the rejected part (KTO's lambda_U)."""
    ld_alpha: float = 1.0
    """Weight, in [0, 1], of the tokens beyond the length of the pair's shorter response
    (length-desensitised DPO, arXiv 2409.06411); only for `token_preference_loss`."""
    f_divergence: str = "reverse_kl"
    """reverse_kl, forward_kl, js_divergence or alpha_divergence (arXiv 2309.16240)."""

    def __post_init__(self) -> None:
        e = self.label_smoothing
        _must(0 <= e < 0.5, "label_smoothing must lie in [0, 0.5)", e, "it is a share of flips")
        _must(self.discopop_tau > 0, "discopop_tau must be positive", self.discopop_tau, "try 0.05")
        _must(
            self.f_divergence in DIVERGENCES,
            f"f_divergence must be one of {DIVERGENCES}",
            repr(self.f_divergence),
            "choose one",
        )
        _must(0 <= self.ld_alpha <= 1, "ld_alpha must lie in [0, 1]", self.ld_alpha, "1 is DPO")
        for name in ("margin", "alpha"):
            value = getattr(self, name)
            _must(abs(value) < math.inf, f"{name} must be finite", value, "give a number")
        for name in (
            *(f"{n}_weight" for n in ("nll", "center", "chosen", "rejected")),
            "dpop_penalty",
        ):
            value = getattr(self, name)
            _must(0 <= value < math.inf, f"{name} must be at least 0", value, "0 turns it off")


class PairData(NamedTuple):
    """Optional numbers per pair, each [B]; none passes a gradient."""

    chosen_lengths: Tensor | None = None
    """Tokens of the chosen responses; less than 1 counts as 1."""
    rejected_lengths: Tensor | None = None
    """Tokens of the rejected responses."""
    weights: Tensor | None = None
    """Multiply a pair's whole loss (WPO)."""
    margins: Tensor | None = None
    """Added to the margin in `PreferenceParams`."""
    targets: Tensor | None = None
    """Probability that the chosen response wins: soft labels; 1 if left out."""
    baseline: Tensor | None = None
    """One number [], the log-ratio that counts as neutral: KTO's KL, BCO's delta / beta."""


class PreferenceLossOutput(NamedTuple):
    """What `preference_loss` returns; only `loss` passes a gradient."""

    loss: Tensor
    """Scalar, or [B] with reduction "none"."""
    chosen_rewards: Tensor
    """beta * log-ratio of each chosen response, [B]; without a reference, beta * its score."""
    rejected_rewards: Tensor
    """The same of the rejected responses; zeros for single responses."""
    accuracies: Tensor
    """1 where the chosen reward is greater; for single responses, where its sign is right."""
    margins: Tensor
    """chosen_rewards - rejected_rewards."""
    means: Tensor
    """[4]: means of the previous four, for logging with one copy from the device."""


DEFAULT_PARAMS = PreferenceParams()
NO_DATA = PairData()


def check(logps, is_chosen, data) -> None:
    """Refuses tensors that do not fit. `logps`: chosen, rejected, and under the reference."""
    shape, device = logps[0].shape, logps[0].device
    *columns, baseline = data
    fits = len(shape) == 1
    for t in logps:
        fits = fits and (t is None or t.dtype in native.DTYPES)
    for t in (*logps, *columns, is_chosen):
        fits = fits and (t is None or (t.shape == shape and t.device == device))
    fits = fits and (baseline is None or (baseline.dim() == 0 and baseline.device == device))
    if not fits or (is_chosen is not None and is_chosen.dtype != torch.bool):
        _refuse(logps, is_chosen, data)


def _refuse(logps, is_chosen, data) -> None:
    """Says which tensor does not fit."""
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    if is_chosen is not None:
        names = ("logps", "", "ref_logps", "")
        _must(is_chosen.dtype == torch.bool, "is_chosen must be bool", is_chosen.dtype,
              "compare the labels with what counts as good")  # fmt: skip
    first = logps[0]
    _must(first.dim() == 1, f"{names[0]} must have shape [B]", tuple(first.shape),
          "sum token log-probs per sequence first, with ops.segment_sum")  # fmt: skip
    named = {name: t for name, t in zip(names, logps) if t is not None}
    for name, tensor in named.items():
        _must(tensor.dtype in native.DTYPES, f"{name} must be float32, float16 or bfloat16",
              tensor.dtype, "convert it, or use preference_loss_ref")  # fmt: skip
    named |= {f"data.{name}": t for name, t in zip(data._fields, data) if t is not None}
    named |= {} if is_chosen is None else {"is_chosen": is_chosen}
    for name, tensor in named.items():
        shape = () if name == "data.baseline" else tuple(first.shape)
        _must(tensor.shape == shape, f"{name} must have shape {shape}", tuple(tensor.shape),
              "give one value per pair, and one baseline for all")  # fmt: skip
        _must(tensor.device == first.device, f"{name} must be on {first.device}", tensor.device,
              "move it")  # fmt: skip


@native.remembered
def check_settings(loss_type, beta, params, reduction, single, references, data) -> tuple:
    """Refuses settings that do not fit, and hands them over as the kernel takes them.

    `references`, `data`: which of these tensors are given; `single`: single responses. Remembered,
    since a trainer's settings are the same in every step.
    """
    _must(loss_type in TRAITS, f"loss_type must be one of {PREFERENCE_LOSSES}", repr(loss_type),
          "csrc/math/preference.h has their formulas")  # fmt: skip
    _must(reduction in REDUCTIONS, f"reduction must be one of {REDUCTIONS}", repr(reduction),
          "choose one")  # fmt: skip
    _must(0 < beta < math.inf, "beta must be positive and finite", beta, "try 0.1")
    data = PairData(*data)
    _check_presence(references, single, loss_type, params, data)
    _check_settings(single, loss_type, params, data)
    numbers = [getattr(params, name) for name in NUMBERS]
    return tuple(map(float, (DIVERGENCES.index(params.f_divergence), beta, *numbers)))


def _check_presence(references, single, loss_type, params, data) -> None:
    traits = TRAITS[loss_type]
    with_reference = "reference" in traits
    others = [name for name in TRAITS if ("reference" in TRAITS[name]) != with_reference]
    names = ("ref_logps",) if single else ("ref_chosen_logps", "ref_rejected_logps")
    for name, given in zip(names, references):
        _must(
            given == with_reference,
            f"{name} must be {'given' if with_reference else 'left out'} for {loss_type!r}",
            "a tensor" if given else "None",
            f"it is otherwise for {', '.join(others)}",
        )
    by_length = "lengths" in traits
    for name, needed in (
        ("chosen_lengths", by_length or params.nll_weight != 0),
        ("rejected_lengths", by_length and loss_type != "sft"),
    ):
        _must(
            not needed or getattr(data, name),
            f"data.{name} must be given for {loss_type!r}" + (" with nll_weight" * (not by_length)),
            "None",
            "pass the number of tokens of each response",
        )


def _check_settings(single, loss_type, params, data) -> None:
    """A setting that the loss would leave unread is refused."""
    given = {
        "params.f_divergence": ("divergence", params.f_divergence != "reverse_kl"),
        "params.label_smoothing": ("smoothing", params.label_smoothing != 0),
        "margins": ("margin", params.margin != 0 or data.margins),
        "data.targets": ("targets", data.targets),
        "data.baseline": ("baseline", data.baseline),
        "params.chosen_weight": ("unpaired", params.chosen_weight != 1),
        "params.rejected_weight": ("unpaired", params.rejected_weight != 1),
        "is_chosen": ("unpaired", single),
    }
    for name, (trait, is_given) in given.items():
        takers = ", ".join(loss for loss in TRAITS if trait in TRAITS[loss])
        _must(
            not is_given or trait in TRAITS[loss_type],
            f"{name} must be left out for {loss_type!r}",
            "a value",
            f"{takers} take it",
        )
    _must(
        params.dpop_penalty == 0 or loss_type == "dpop",
        f"params.dpop_penalty must be left out for {loss_type!r}",
        params.dpop_penalty,
        "dpop takes it",
    )
    _must(
        params.label_smoothing > 0 or loss_type != "exo_pair",
        "params.label_smoothing must be positive for 'exo_pair'",
        params.label_smoothing,
        "its target gives the rejected response that probability",
    )
    _must(
        params.ld_alpha == 1,
        "params.ld_alpha must be left out for sums of log-probs",
        params.ld_alpha,
        "token_preference_loss takes it",
    )
    extras = params.nll_weight or params.center_weight or data.weights
    _must(
        not extras or "sorted" not in TRAITS[loss_type],
        f"data.weights, nll_weight and center_weight must be left out for {loss_type!r}",
        "a value",
        "it sorts the halves of the batch, which takes pairs apart",
    )
    _must(
        not single or not params.center_weight,
        "params.center_weight must be 0 for single responses",
        params.center_weight,
        "it ties the two responses of a pair",
    )
