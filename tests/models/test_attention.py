"""Attention by whole products against torch's own, and its place in a model."""

import pytest
import torch
from torch.nn import functional as F

from rlhf_fast.models import attention
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from tests.tiny import tiny_model


def inputs(dtype, heads=6, groups=2, length=40):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, 16), (2, groups, length, 16), (2, groups, length, 16)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    mask = torch.rand(2, 1, length, length, generator=generator) < 0.5
    mask |= torch.eye(length, dtype=torch.bool)
    return [t.requires_grad_() for t in tensors], mask


def torchs_own(tensors, mask):
    query, key, value = tensors
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False])
def test_as_accurate_as_torchs_own(dtype, kept, monkeypatch):
    monkeypatch.setattr(attention, "KEEP_BYTES", 1 << 30 if kept else 0)
    tensors, mask = inputs(dtype)
    additive = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    upstream = torch.randn(2, 40, 6, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    output, _ = attention.attention(torch.nn.Module(), *tensors, additive)
    mine = [output, *torch.autograd.grad(output, tensors, upstream)]
    own = torchs_own(tensors, mask)
    theirs = [own, *torch.autograd.grad(own, tensors, upstream)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    truth = torchs_own(doubles, mask)
    truth = [truth, *torch.autograd.grad(truth, doubles, upstream.double())]
    for bar, m, t, exact in zip((2, 3, 3, 3), mine, theirs, truth):
        assert rms(m - exact) <= bar * rms(t - exact)


def test_used_on_a_cpu_and_exact_for_large_scores():
    """Scores of some models reach hundreds; rounded to bf16 they would be off by whole units."""
    tensors, mask = inputs(torch.bfloat16)
    query, key, value = (t.detach() for t in tensors)
    query *= 50
    additive = torch.zeros(mask.shape, dtype=query.dtype)
    additive.masked_fill_(~mask, torch.finfo(query.dtype).min)
    output, _ = attention.attention(torch.nn.Module(), query, key, value, additive)
    truth = torchs_own([t.double() for t in (query, key, value)], mask)
    assert rms(output - truth) <= 2 * rms(torchs_own((query, key, value), mask) - truth)


def test_saved_configuration_does_not_name_it(tmp_path):
    model = tiny_model()
    LanguageModel(model, pad_token_id=3, precision="fp32")
    assert model.config._attn_implementation == attention.PRODUCTS
    model.save_pretrained(tmp_path)
    assert attention.PRODUCTS not in (tmp_path / "config.json").read_text()


def test_bf16_log_probs_are_as_close_to_fp32_as_with_torchs_own():
    groups = [TokenGroup([10, 11, 12 + i], [[20 + i, 21, 22], [23, 24 + i, 3]]) for i in range(20)]
    model = tiny_model()
    results = {}
    for name in ("fp32", "bf16"):
        language_model = LanguageModel(model, pad_token_id=3, precision=name)
        results[name] = torch.tensor(language_model.score_groups(groups))
    model.set_attn_implementation("sdpa")
    own = torch.tensor(language_model.score_groups(groups))
    assert rms(results["bf16"] - results["fp32"]) <= 2 * rms(own - results["fp32"])
