"""Attention by whole products against torch's own, and its place in a model."""

import pytest
import torch
from torch.nn import functional as F

from rlhf_fast.models import attention
from rlhf_fast.models.batches import TokenGroup, collate
from rlhf_fast.models.language_model import LanguageModel
from tests.tiny import tiny_model

GROUPS = [
    TokenGroup([5] * 7, [[6] * 9, [7] * 4]),
    TokenGroup([5] * 3, [[6] * 4] * 3),
    TokenGroup([5] * 7, [[6] * 4, [7] * 9]),
]


def inputs(dtype, heads=6, groups=2):
    batch = collate(GROUPS, pad_token_id=0, row_tokens=40)
    generator = torch.Generator().manual_seed(0)
    rows, length = batch.input_ids.shape
    shapes = [(rows, heads, length, 16), (rows, groups, length, 16), (rows, groups, length, 16)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in tensors], batch


@pytest.fixture(params=[0, 10**6], ids=["spans", "rows"])
def by(request, monkeypatch):
    """Parts are spans, or whole rows as for small batches."""
    monkeypatch.setattr(attention, "CELLS_PER_PART", request.param)


def run(tensors, batch):
    parts = attention.plan(batch)
    dummy = torch.zeros(len(batch.input_ids), 1, 1, 1)
    output, _ = attention.attention(torch.nn.Module(), *tensors, dummy, tree_parts=parts)
    return output * batch.padding_mask[:, :, None, None]


def torchs_own(tensors, batch):
    query, key, value = tensors
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    mask = batch.attention_mask
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    return output * batch.padding_mask[:, :, None, None]


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_torchs_own(dtype, by):
    tensors, batch = inputs(dtype)
    output = run(tensors, batch)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator).to(dtype)
    mine = [output, *torch.autograd.grad(output, tensors, upstream)]
    own = torchs_own(tensors, batch)
    theirs = [own, *torch.autograd.grad(own, tensors, upstream)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    truth = torchs_own(doubles, batch)
    truth = [truth, *torch.autograd.grad(truth, doubles, upstream.double())]
    for bar, m, t, exact in zip((2, 3, 3, 3), mine, theirs, truth):
        assert rms(m - exact) <= bar * rms(t - exact)


def test_exact_for_large_scores(by):
    """Scores of some models reach hundreds; rounded to bf16 they would be off by whole units."""
    tensors, batch = inputs(torch.bfloat16)
    query, key, value = (t.detach() for t in tensors)
    query *= 50
    output = run((query, key, value), batch)
    truth = torchs_own([t.double() for t in (query, key, value)], batch)
    assert rms(output - truth) <= 2 * rms(torchs_own((query, key, value), batch) - truth)


def test_spans_of_one_tree_are_never_one_part(monkeypatch):
    batch = collate(GROUPS, pad_token_id=0, row_tokens=40)
    assert len(attention.plan(batch)) == 1  # it is small
    monkeypatch.setattr(attention, "CELLS_PER_PART", 0)
    parts = attention.plan(batch)
    for part in parts:
        assert part.key.unique().numel() == part.key.numel()
    covered = torch.cat([part.query.flatten() for part in parts])
    assert sorted(covered.tolist()) == batch.padding_mask.flatten().nonzero()[:, 0].tolist()
    assert len(parts) < len(batch.spans)


def test_a_model_that_drops_the_parts_is_noticed():
    tensors, _ = inputs(torch.float32)
    with pytest.raises(NotImplementedError, match="does not pass tree_parts on"):
        attention.attention(torch.nn.Module(), *tensors, torch.zeros(1, 1, 1, 1))


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
