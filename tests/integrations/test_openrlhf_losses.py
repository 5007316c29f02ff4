"""OpenRLHF's losses and advantages, patched and not."""

from __future__ import annotations

import ast
import types
from pathlib import Path

import pytest
import torch
from openrlhf import models
from openrlhf.models import loss as losses

from rlhf_fast.integrations import declining, openrlhf, openrlhf_losses
from rlhf_fast.integrations.patching import signature_of

pytestmark = pytest.mark.peers
ROWS, LENGTH = 5, 8


def both(call):
    expected = call()
    with openrlhf.patch():
        got = call()
    assert len(got) == len(expected)
    for i, (ours, theirs) in enumerate(zip(got, expected)):
        if theirs is None:
            assert ours is None, i
            continue
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, i=i: f"result {i}: {m}"
        )


@pytest.mark.parametrize("where", [models, losses], ids=["models", "models.loss"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"label_smoothing": 0.6}, {"ipo": True}]
)
def test_dpo_loss(where, options):
    logps = [torch.randn(ROWS) * 20 for _ in range(4)]

    def call():
        chosen, rejected = (t.clone().requires_grad_() for t in logps[:2])
        out = where.DPOLoss(0.1, **options)(chosen, rejected, *logps[2:])
        out[0].backward()
        return *(t.detach() for t in out), chosen.grad, rejected.grad

    both(call)


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1)])
def test_pairwise_loss(with_margin, shape):
    rewards, margin = torch.randn(2, *shape) * 3, torch.rand(shape)

    def call():
        chosen, rejected = (t.clone().requires_grad_() for t in rewards)
        loss = models.PairWiseLoss()(chosen, rejected, margin if with_margin else None)
        loss.backward()
        return loss.detach(), chosen.grad, rejected.grad

    both(call)


POLICY = [
    {},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 2.0},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo"},
    {"is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_mode": "clip"},
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.1)},
    {
        "is_correction_level": "token",
        "is_correction_gating": "tv",
        "is_correction_threshold": (0.0, 0.2),
    },
    {"policy_loss_type": "gspo", "is_correction_level": "token"},
]

WHOLE = {"dp_size": 2, "batch_num_tokens": 77.0, "global_batch_size": 13.0}


@pytest.mark.parametrize("options", POLICY, ids=str)
@pytest.mark.parametrize(
    "totals", [{}, {"dp_size": 2, "batch_num_tokens": 77.0, "global_batch_size": 13.0}]
)
def test_policy_loss(options, totals, caplog, monkeypatch):
    monkeypatch.setattr(declining, "told", set())
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[1, 3:] = False
    old = -torch.rand(ROWS, LENGTH) * 3
    start = old + 0.6 * torch.randn(ROWS, LENGTH)
    rollout = old + 0.5 * torch.randn(ROWS, LENGTH)
    advantages = torch.randn(ROWS, LENGTH)

    def call():
        logps = start.clone().requires_grad_()
        function = models.PolicyLoss(**options)
        out = function(logps, old, advantages, mask, rollout, **totals)
        out[0].backward()
        return *(None if t is None else t.detach() for t in out), logps.grad

    both(call)
    left = ["is_correction_gating must be ratio" in text for text in caplog.messages]
    assert left == [True] * ("is_correction_gating" in options)


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("clip", [None, 0.2, 0.0])
@pytest.mark.parametrize("totals", [{}, WHOLE], ids=["local", "whole batch"])
@pytest.mark.parametrize("masked", [True, False])
def test_value_loss(token_level, clip, totals, masked):
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2] = False
    start, old, returns = torch.randn(3, ROWS, LENGTH)
    if not masked:
        totals, token_level = {}, True

    def call():
        values = start.clone().requires_grad_()
        loss = models.ValueLoss(clip, token_level)
        out = loss(values, old, returns, mask if masked else None, **totals)
        out.backward()
        return out.detach(), values.grad

    both(call)


# ---- adversarial inputs --------------------------------------------------------------------------


@pytest.mark.parametrize("options", POLICY, ids=str)
@pytest.mark.parametrize("case", ["ratios of e to the 30", "an empty row", "on policy"])
def test_policy_loss_on_adversarial_inputs(options, case):
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2] = case != "an empty row"
    old = -torch.rand(ROWS, LENGTH) * 3
    far = 30.0 if case.startswith("ratios") else 0.0
    start = old + far * torch.randn(ROWS, LENGTH).sign() * torch.rand(ROWS, LENGTH).round()
    if options.get("policy_loss_type") == "gspo":
        start = old + (start - old) / LENGTH  # which has no bound of its own
    rollout = old.clone()
    advantages = torch.tensor([-2.0, 3.0, 1.0, 0.0, 1e-3])[:, None].expand(ROWS, LENGTH)

    def call():
        logps = start.clone().requires_grad_()
        out = models.PolicyLoss(**options)(logps, old, advantages, mask, rollout)
        out[0].backward()
        return *(None if t is None else t.detach() for t in out), logps.grad

    both(call)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"ipo": True}], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_pairs_on_adversarial_inputs(options, scale):
    """All equal; nearly equal; so far apart that a sigmoid is 0 or 1."""
    logps = [torch.full((ROWS,), -50.0) + scale * torch.randn(ROWS) for _ in range(4)]

    def call():
        chosen, rejected = (t.clone().requires_grad_() for t in logps[:2])
        out = models.DPOLoss(0.1, **options)(chosen, rejected, *logps[2:])
        pairwise = models.PairWiseLoss()(chosen, rejected)
        (out[0] + pairwise).backward()
        found = (*out, pairwise, chosen.grad, rejected.grad)
        return [t.detach() / max(1.0, t.detach().abs().max().item()) for t in found]

    both(call)


def test_losses_built_before_the_patch_have_it_too(caplog, monkeypatch):
    monkeypatch.setattr(declining, "told", set())
    losses_of = [models.DPOLoss(0.1, label_smoothing=0.6), models.ValueLoss(0.0)]
    given = (torch.randn(4, ROWS), torch.randn(3, ROWS, LENGTH))
    with openrlhf.patch():
        for function, tensors in zip(losses_of, given):
            function(*tensors)
    names = ("DPOLoss.forward", "ValueLoss.forward")
    assert [name in text for name, text in zip(names, caplog.messages)] == [True, True]


def maker_of_experience():
    """Its methods, from the installed source: the module itself needs Ray, vLLM and DeepSpeed."""
    path = Path(models.__file__).parents[1] / "trainer" / "ppo_utils" / "experience_maker.py"
    tree = ast.parse(path.read_text())
    names = ("get_advantages_and_returns", "get_cumulative_returns")
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
    scope = {"torch": torch, "Tuple": tuple}
    exec(compile(ast.Module(found, []), str(path), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def test_advantages():
    maker = maker_of_experience()
    mask = torch.ones(ROWS, LENGTH)
    mask[0, 4:] = 0
    values, rewards = torch.randn(2, ROWS, LENGTH)
    ours = openrlhf_losses.advantages_and_returns(None)
    theirs = maker.get_advantages_and_returns
    for name, seam in zip(vars(maker), openrlhf_losses.TOKENS):
        assert signature_of(getattr(maker, name)) in seam.signatures
    for got, expected in zip(
        ours(None, values, rewards, mask, 0.9, 0.8), theirs(None, values, rewards, mask, 0.9, 0.8)
    ):
        torch.testing.assert_close(got * mask, expected * mask, rtol=1e-4, atol=1e-5)
    got = openrlhf_losses.cumulative_returns(None)(None, rewards, mask, 0.9)
    expected = maker.get_cumulative_returns(None, rewards, mask, 0.9)
    torch.testing.assert_close(got * mask, expected * mask, rtol=1e-4, atol=1e-5)
