"""Padded, packed and prefix-shared layouts give the model's own values and gradients."""

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from transformers.integrations import flex_attention as hf_flex

from rlhf_fast.models.batches import TokenGroup, collate, micro_batches, pack
from rlhf_fast.models.language_model import LanguageModel
from tests.tiny import tiny_model

ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mistral",
    "phi",
    "phi3",
    "gpt_neox",
    "gpt2",
    "cohere",
    "granite",
    "mixtral",
    "qwen3_moe",
]


def random_groups(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(9, 512, (length,), generator=generator).tolist()

    return [
        TokenGroup(tokens(1, 9), [tokens(1, 12) for _ in range(1 + i % 3)]) for i in range(count)
    ]


def own_logps(model, groups):
    """Each response in a row of its own, by the model's own logits."""
    result = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response])
            start = len(group.prompt_ids)
            logps = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            result.append(logps.gather(1, ids[0, start:, None]).sum())
    return torch.stack(result)


def value_and_gradient(model, logps):
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(logps)).to(logps)
    (logps * weights).sum().backward()
    # A parameter that no token reached (an expert of a MoE) has no gradient at all.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return logps.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layout_is_the_models_own(architecture):
    """The bar is the error of the model's own float32 pass against its float64 pass."""
    groups = random_groups()
    double = tiny_model(architecture).double()
    if hasattr(double.config, "num_experts_per_tok"):
        double.set_experts_implementation("eager")  # the grouped product has no float64
    truth = value_and_gradient(double, own_logps(double, groups))
    model = tiny_model(architecture)
    own = value_and_gradient(model, own_logps(model, groups))
    singles = [single for group in groups for single in group.split()]
    for layout, row_tokens in ((singles, 0), (singles, 64), (groups, 0), (groups, 64)):
        backbone = LanguageModel(model, pad_token_id=3, precision="fp32", row_tokens=row_tokens)
        assert backbone.shares_prompts
        found = value_and_gradient(model, backbone.response_logps(backbone.collate(layout)))
        for mine, theirs, exact in zip(found, own, truth):
            assert rms(mine - exact) <= 3 * rms(theirs - exact) + 1e-7 * rms(exact)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_flex_block_masks_give_the_values_of_dense_masks(architecture):
    groups = random_groups()
    model = tiny_model(architecture)
    options = {"pad_token_id": 3, "precision": "fp32"}
    dense = LanguageModel(model, **options).score_groups(groups)
    flex = LanguageModel(model, **options, attention="flex", row_tokens=4096)
    assert flex.shares_prompts
    for mine, theirs in zip(flex.score_groups(groups), dense):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_flex_block_masks_give_the_gradients_of_dense_masks(architecture, monkeypatch):
    """On a CPU torch refuses the backward pass of the fused kernel; the unfused one has it."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    unfused = torch_flex.flex_attention
    monkeypatch.setattr(hf_flex.WrappedFlexAttention, "__call__", lambda self: unfused)
    model = tiny_model(architecture)
    options = {"pad_token_id": 3, "precision": "fp32"}
    found = []
    for more in ({}, {"attention": "flex", "row_tokens": 4096}):
        backbone = LanguageModel(model, **options, **more)
        batch = backbone.collate(random_groups())
        found.append(value_and_gradient(model, backbone.response_logps(batch)))
    assert len(batch.input_ids) == 1 and batch.num_responses > 1  # one row of several trees
    for mine, theirs in zip(*found):
        assert rms(mine - theirs) <= 1e-5 * rms(theirs)


WINDOWS = {
    "mistral": {"sliding_window": 12},
    "gpt_neo": {"window_size": 12, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
}


@pytest.mark.parametrize("architecture", WINDOWS)
def test_sliding_window_shorter_than_a_response_path_gets_separate_rows(architecture):
    groups = random_groups(4)
    model = tiny_model(architecture, **WINDOWS[architecture])
    assert max(group.path_length for group in groups) > 12
    backbone = LanguageModel(model, pad_token_id=3, precision="fp32", row_tokens=64)
    batch = backbone.collate(groups)
    assert batch.is_plain and len(batch.input_ids) == sum(len(g.responses) for g in groups)
    torch.testing.assert_close(backbone.response_logps(batch), own_logps(model, groups))
    short = [TokenGroup([10, 11], [[12, 3], [13, 14, 3]]), TokenGroup([15], [[16, 3]])]
    batch = backbone.collate(short)
    assert len(batch.input_ids) == 1
    torch.testing.assert_close(backbone.response_logps(batch), own_logps(model, short))


def test_context_inside_a_response_is_not_learned():
    model = tiny_model()
    backbone = LanguageModel(model, pad_token_id=3, precision="fp32")
    response, mask = [20, 21, 22, 23, 3], [True, True, False, False, True]
    whole = backbone.token_logps(backbone.collate([TokenGroup([10, 11], [response])]))
    masked = backbone.collate([TokenGroup([10, 11], [response], [mask])])
    torch.testing.assert_close(backbone.token_logps(masked), whole[torch.tensor(mask)])
    assert masked.labels.tolist() == [20, 21, 3]


def test_rows_hold_trees_that_do_not_see_each_other():
    groups = [TokenGroup([10], [[20, 3], [21, 3]]), TokenGroup([11, 12], [[22, 3]])]
    batch = collate(groups, pad_token_id=0, row_tokens=16)
    assert batch.input_ids.tolist() == [[10, 20, 3, 21, 3, 11, 12, 22, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 1, 2, 0, 1, 2, 3]]
    assert batch.attention_mask[0, 0, 4].tolist() == [True, False, False, True, True] + [False] * 4
    assert batch.attention_mask[0, 0, 8].tolist() == [False] * 5 + [True] * 4


@pytest.mark.parametrize("row_tokens", [0, 40, 100])
def test_micro_batches_keep_to_the_budget_and_repack_the_same(row_tokens):
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 60, (200,), generator=generator).tolist()
    batches = micro_batches(sizes, 256, row_tokens=row_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        part = [sizes[i] for i in batch]
        rows = pack(part, row_tokens)
        assert len(rows) * max(sum(part[i] for i in row) for row in rows) <= 256


def test_packing_fills_rows_of_a_small_batch():
    sizes = [90, 10, 10, 30, 20, 25, 60, 35]
    cells = lambda rows: len(rows) * max(sum(sizes[i] for i in row) for row in rows)  # noqa: E731
    assert cells(pack(sizes, 0)) == 720 and cells(pack(sizes, 100)) == 300
