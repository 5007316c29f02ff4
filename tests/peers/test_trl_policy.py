"""The loss of TRL's own GRPOTrainer, called as it is, against policy_loss."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from rlhf_fast.losses import keep_high_entropy, mask_off_policy_sequences
from rlhf_fast.ops import PolicyLossParams, policy_loss

pytestmark = pytest.mark.peers

BATCH, LENGTH = 6, 30
ARGS = dict(
    delta=None,
    use_bias_correction_kl=False,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
    steps_per_generation=1,
)


def make():
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(BATCH, LENGTH, generator=generator)
    noise = 0.2 * torch.randn(3, BATCH, LENGTH, generator=generator)
    lengths = torch.tensor([30, 1, 12, 25, 7, 19])
    mask = torch.arange(LENGTH) < lengths[:, None]
    advantages = torch.randn(BATCH, generator=generator)
    return logps, logps + noise[0], advantages, mask, logps + noise[1], noise[2].abs()


def trainer(logps, entropy, loss_type, level="token", beta=0.0, **kwargs):
    """What GRPOTrainer._compute_loss reads of its trainer."""
    accelerator = SimpleNamespace(num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=5.0 if loss_type == "cispo" else 0.28,
        args=SimpleNamespace(**ARGS | kwargs),
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        current_gradient_accumulation_steps=1,
        max_completion_length=40,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )


def compare(loss_type, params, level="token", beta=0.0, **kwargs):
    logps, old_logps, advantages, mask, ref_logps, entropy = make()
    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    inputs = dict(
        prompt_ids=torch.zeros(BATCH, 1).long(),
        prompt_mask=torch.ones(BATCH, 1).long(),
        completion_ids=torch.zeros(BATCH, LENGTH).long(),
        completion_mask=mask.long(),
        advantages=advantages,
        old_per_token_logps=old_logps,
        ref_per_token_logps=ref_logps,
        num_items_in_batch=mask.sum(),
    )
    theirs = trainer(leaves[0], entropy, loss_type, level, beta, **kwargs)
    want = GRPOTrainer._compute_loss(theirs, SimpleNamespace(training=True), inputs)
    want.backward()
    ref = ref_logps if beta else None
    got = policy_loss(
        leaves[1], old_logps, advantages, mask=mask, loss_type=loss_type, params=params,
        ref_logps=ref, entropy=entropy,
    )  # fmt: skip
    got.loss.backward()
    torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-7)
    metrics = theirs._metrics["train"]
    torch.testing.assert_close(got.metrics.entropy.item(), metrics["entropy"][0])
    if beta and not kwargs:
        torch.testing.assert_close(got.metrics.ref_kl.item(), metrics["kl"][0])
    if level == "token" and loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        torch.testing.assert_close(got.metrics.clip_low.item(), metrics["clip_ratio/low_mean"][0])
        torch.testing.assert_close(got.metrics.clip_high.item(), metrics["clip_ratio/high_mean"][0])


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo", "cispo"])
def test_same_loss_of_tokens(loss_type, beta):
    cispo = (
        loss_type == "cispo"
    )  # there, epsilon_high is the bound itself and there is no lower one
    params = PolicyLossParams(
        epsilon_low=1.0 if cispo else 0.2,
        epsilon_high=4.0 if cispo else 0.28,
        kl_coef=beta,
        max_length=40,
        log_ratio_bound=float("inf"),
    )
    compare(loss_type, params, beta=beta)


@pytest.mark.parametrize("loss_type", ["grpo", "luspo"])
def test_same_loss_of_sequences(loss_type):
    params = PolicyLossParams(epsilon_high=0.28, ratio_level="sequence-mean")
    compare(loss_type, params, level="sequence")


def test_two_sided_clip_is_dual_clip():
    compare("grpo", PolicyLossParams(epsilon_high=0.28, dual_clip=1.4), delta=1.4)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_same_unbiased_kl(level):
    params = PolicyLossParams(
        epsilon_high=0.28,
        kl_coef=0.1,
        kl_correction="importance",
        ratio_level="sequence-mean" if level == "sequence" else "token",
    )
    compare("grpo", params, level=level, beta=0.1, use_bias_correction_kl=True)


def test_same_off_policy_mask():
    logps, old_logps, advantages, mask, *_ = make()
    old_logps[:, 3] = float("nan")
    for threshold in (0.0, 0.02, 1.0):
        args = (advantages[:, None], logps, old_logps, mask.float(), threshold)
        want = advantages * GRPOTrainer.get_off_policy_mask(*args)[:, 0]
        got = mask_off_policy_sequences(advantages, logps, old_logps, mask, threshold=threshold)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_same_tokens_of_high_entropy(share):
    logps, _, advantages, mask, *_ = make()
    alone = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    trainer = SimpleNamespace(accelerator=alone)
    entropy = logps.abs()
    theirs = GRPOTrainer.get_high_entropy_mask(trainer, entropy, mask.float(), 1 - share)
    want = (advantages[:, None] * mask).masked_fill(~theirs, 0.0)
    torch.testing.assert_close(keep_high_entropy(advantages, entropy, mask, share), want)
    assert theirs.sum() < mask.sum() or share == 1.0
