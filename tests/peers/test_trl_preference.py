"""The loss of TRL's own DPOTrainer, called as it is, against token_preference_loss."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from rlhf_fast.losses import wpo_weights
from rlhf_fast.ops import PairData, PreferenceParams, preference_loss, token_preference_loss
from rlhf_fast.ops.preference_inputs import TRAITS

pytestmark = pytest.mark.peers

LENGTHS = [5, 1, 9, 7, 4, 8]  # three chosen, three rejected
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
WITHOUT = (
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "sft",
)
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


class Model(torch.nn.Module):
    """Gives TRL's trainer the log-probs that a fused head would."""

    def __init__(self, logps, log_sum_p2):
        super().__init__()
        self.outputs = SimpleNamespace(
            log_probs=logps,
            log_sum_sq_probs=log_sum_p2,
            entropy=torch.zeros_like(logps),
            mean_logits=torch.zeros_like(logps),
            is_top1=torch.zeros_like(logps, dtype=torch.bool),
        )

    def forward(self, **_):
        return self.outputs


def accelerator():
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same)


def trl_loss(logps, mask, ref, log_sum_p2, loss_type, **settings):
    """(loss, metrics) of `DPOTrainer._compute_loss`; the mask covers one prompt token more."""
    defaults = {
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.4,
        "label_smoothing": 0.0,
        "use_weighting": False,
    }
    trainer = SimpleNamespace(
        **{**defaults, **settings},
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    prompt = torch.zeros(len(mask), 1, dtype=mask.dtype)
    ids = torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.cat((prompt, mask), 1).long(),
        "ref_chosen_logps": ref[:3],
        "ref_rejected_logps": ref[3:],
    }
    model = Model(logps, log_sum_p2)
    return DPOTrainer._compute_loss(trainer, model, inputs, False), trainer._metrics["train"]


def make():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    logps, log_sum_p2 = -torch.rand(2, 6, 9, generator=generator)
    ref = (logps * mask).sum(1) + torch.randn(6, generator=generator)
    return logps * mask, mask, ref, log_sum_p2


def compare(loss_type, **settings):
    logps, mask, ref, log_sum_p2 = make()
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    want, metrics = trl_loss(leaves[0], mask, ref, log_sum_p2, loss_type, **settings)
    weights = None
    if settings.get("use_weighting"):
        weights = wpo_weights(logps, log_sum_p2, mask=mask).view(2, -1).prod(0)
    params = PreferenceParams(
        label_smoothing=settings.get("label_smoothing", 0.0),
        ld_alpha=settings.get("ld_alpha", 1.0),
        f_divergence=settings.get("f_divergence_type", "reverse_kl"),
        alpha=0.4,
    )
    got = token_preference_loss(
        leaves[1],
        ref if "reference" in TRAITS[loss_type] else None,
        mask=mask,
        loss_type=loss_type,
        beta=0.3,
        params=params,
        data=PairData(weights=weights),
    )
    torch.testing.assert_close(got.loss, want)
    got.loss.backward()
    want.backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad * mask)
    if "reference" in TRAITS[loss_type]:
        names = ("chosen", "rejected", "accuracies", "margins")
        for name, mean in zip(names, got.means.tolist()):
            assert mean == pytest.approx(metrics[f"rewards/{name}"][0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss_type", (*WITH_DIVERGENCE, *WITHOUT, "sft"))
def test_same_loss_gradient_and_rewards(loss_type):
    compare(loss_type, label_smoothing=0.1 if loss_type == "exo_pair" else 0.0)


@pytest.mark.parametrize("loss_type", ["robust", "aot", "aot_unpaired", "exo_pair"])
def test_same_with_label_smoothing(loss_type):
    compare(loss_type, label_smoothing=0.2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", WITH_DIVERGENCE)
def test_same_under_divergences(loss_type, divergence):
    e = 0.1 if loss_type == "exo_pair" else 0.0
    compare(loss_type, f_divergence_type=divergence, label_smoothing=e)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "nca_pair"])
def test_same_when_length_desensitised_or_weighted(loss_type):
    compare(loss_type, ld_alpha=0.4)
    compare(loss_type, use_weighting=True)


@pytest.mark.parametrize("margin", [None, [0.3, 0.0, 1.0]])
@pytest.mark.parametrize("center", [None, 0.01])
def test_same_reward_model_loss(margin, center):
    rewards = torch.randn(6, 1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=center),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    inputs = {} if margin is None else {"margin": torch.tensor(margin)}
    outputs = SimpleNamespace(logits=rewards)
    want = RewardTrainer.compute_loss(trainer, lambda **_: outputs, dict(inputs))
    got = preference_loss(
        *rewards[:, 0].chunk(2),
        loss_type="bradley_terry",
        beta=1.0,
        params=PreferenceParams(center_weight=center or 0.0),
        data=PairData(margins=inputs.get("margin")),
    )
    torch.testing.assert_close(got.loss, want)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_same_simpo_alpha_po_and_cpo_loss(alpha, smoothing):
    logps, mask, *_ = make()
    means = logps.sum(1) / mask.sum(1)
    settings = {
        "loss_type": "simpo",
        "alpha": alpha,
        "beta": 2.0,
        "simpo_gamma": 0.5,
        "label_smoothing": smoothing,
        "accelerator": accelerator(),
    }
    want = CPOTrainer.cpo_loss(SimpleNamespace(**settings), *means.chunk(2))
    divergence = {"f_divergence": "alpha_divergence", "alpha": 1 - alpha} if alpha else {}
    params = PreferenceParams(margin=0.5, label_smoothing=smoothing, **divergence)
    kwargs = {"beta": 2.0, "params": params, "reduction": "none"}
    got = token_preference_loss(logps, mask=mask, loss_type="simpo", **kwargs)
    torch.testing.assert_close(got.loss, want[0])
    if not alpha:
        torch.testing.assert_close(got.chosen_rewards, want[1])
        settings["loss_type"] = "sigmoid"
        want = CPOTrainer.cpo_loss(SimpleNamespace(**settings), *logps.sum(1).chunk(2))
        params = PreferenceParams(label_smoothing=smoothing)
        kwargs["params"] = params
        got = token_preference_loss(logps, mask=mask, loss_type="cpo", **kwargs)
        torch.testing.assert_close(got.loss, want[0])


def test_same_odds_ratio_loss():
    logps, mask, *_ = make()
    means = logps.sum(1) / mask.sum(1)
    trainer = SimpleNamespace(beta=0.3, accelerator=accelerator())
    want = -ORPOTrainer.odds_ratio_loss(trainer, *means.chunk(2))[0]
    got = token_preference_loss(logps, mask=mask, loss_type="orpo", beta=0.3, reduction="none")
    torch.testing.assert_close(got.loss, want)
