"""Batches for the tests of policy_loss, and its comparison with float64 autograd."""

from __future__ import annotations

import torch

from rlhf_fast.ops import policy_loss, policy_loss_ref
from tests.ops.conftest import assert_as_accurate

PER_TOKEN = ("old_logps", "advantages", "mask", "ref_logps", "sampling_logps", "entropy")


def make(batch, length, device="cpu", seed=0, spread=0.3):
    """Arguments of a batch in which every clip happens; the mask leaves the last row empty."""
    generator = torch.Generator().manual_seed(seed + length)

    def noise():
        return torch.randn(batch, length, generator=generator)

    logps = -torch.rand(batch, length, generator=generator) * 3
    old_logps = logps + noise() * spread
    mask = torch.rand(batch, length, generator=generator) < 0.8
    mask[-1] = batch == 1
    sampling_logps = old_logps + noise() * spread
    sampling_logps.view(-1)[::7] = torch.nan
    inputs = dict(
        logps=logps,
        old_logps=old_logps,
        advantages=noise(),
        mask=mask,
        ref_logps=logps + noise() * spread,
        sampling_logps=sampling_logps,
        entropy=torch.rand(batch, length, generator=generator),
    )
    return {name: x.to(device) for name, x in inputs.items()}


def packed(inputs, lengths):
    """The first `lengths` tokens of each row, one after another, and their offsets."""
    device = inputs["logps"].device
    flat = {
        name: torch.cat([row[:n] for row, n in zip(x, lengths)]) if x.dim() == 2 else x
        for name, x in inputs.items()
    }
    return flat | {"cu_seqlens": torch.tensor([0, *lengths], device=device).cumsum(0)}


def run(function, inputs, dtype=torch.float32, **kwargs):
    """(loss, metrics by name, d logps, d entropy)"""
    inputs = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    logps = inputs.pop("logps").detach().clone().requires_grad_()
    if inputs.get("entropy") is not None:
        inputs["entropy"] = inputs["entropy"].detach().clone().requires_grad_()
    args = (logps, inputs.pop("old_logps", None), inputs.pop("advantages"))
    loss, metrics = function(*args, **inputs, **kwargs)
    loss.backward()
    entropy = inputs.get("entropy")
    metrics = metrics if isinstance(metrics, dict) else metrics._asdict()
    return loss.detach(), metrics, logps.grad, None if entropy is None else entropy.grad


def check(inputs, **kwargs):
    got = run(policy_loss, inputs, **kwargs)
    plain = run(policy_loss_ref, inputs, **kwargs)
    truth = run(policy_loss_ref, inputs, torch.float64, **kwargs)
    scale = 1.0 + float(truth[2].abs().sum())
    assert abs(got[0] - truth[0]) < 2e-6 * scale, (got[0].item(), truth[0].item())
    assert_as_accurate("d logps", got[2], plain[2], truth[2], factor=3.0)
    if truth[3] is not None:
        torch.testing.assert_close(got[3].double(), truth[3], rtol=1e-5, atol=1e-7)
    for name, want in truth[1].items():
        torch.testing.assert_close(
            got[1][name].double(), want.double(), rtol=2e-4, atol=2e-5, msg=name
        )
    return got
