"""Gradients in bf16 of a step that has one micro-batch: the same numbers in less memory."""

import pytest
import torch

from rlhf_fast.models.adapters import LoraConfig, add_lora
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training import engine
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.gradients import Gradients, used_once
from rlhf_fast.training.preference import DPOConfig, train_dpo
from tests.tiny import tiny_model
from tests.training.examples import make_pairs

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have their weight's dtype"
)


def make(precision="bf16", **options):
    return LanguageModel(tiny_model(), pad_token_id=3, precision=precision, **options)


def train(monkeypatch, *, narrow, max_grad_norm, **options):
    """Metrics, weights, and the dtypes of the gradients before every optimiser step."""
    policy, dtypes = make(**options), []
    with monkeypatch.context() as patch:
        if not narrow:
            patch.setattr(Gradients, "expect", lambda self, num_micro_batches: None)
        step = engine.Engine.step

        def watched(self, learning_rate):
            dtypes.append({p.grad.dtype for p in self.parameters})
            step(self, learning_rate)
            assert all(p.grad is None for p in self.parameters)

        patch.setattr(engine.Engine, "step", watched)
        optimizer = OptimizerConfig(
            learning_rate=1e-3, num_epochs=3, batch_size=8, max_grad_norm=max_grad_norm
        )
        config = DPOConfig(optimizer=optimizer)
        rows = train_dpo(policy, None, make_pairs(16), config=config, seed=0)
    return rows, [p.detach().clone() for p in policy.model.parameters()], dtypes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_they_change_nothing(checkpointing, monkeypatch):
    options = {"max_grad_norm": 1e9, "gradient_checkpointing": checkpointing}
    wide, weights, dtypes = train(monkeypatch, narrow=False, **options)
    assert dtypes == [{torch.float32}] * 6
    narrow, same, dtypes = train(monkeypatch, narrow=True, **options)
    assert dtypes == [{torch.float32, torch.bfloat16}] * 6
    assert all(map(torch.equal, weights, same))
    assert [row["loss"] for row in wide] == [row["loss"] for row in narrow]


def test_clipping_scales_them_unrounded(monkeypatch):
    wide, weights, _ = train(monkeypatch, narrow=False, max_grad_norm=0.01)
    narrow, same, dtypes = train(monkeypatch, narrow=True, max_grad_norm=0.01)
    assert torch.bfloat16 in dtypes[0]
    for before, after in zip(wide, narrow):
        assert before["grad_norm"] > 0.01
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-5)
    for mine, own in zip(same, weights):
        torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"micro_batch_tokens": 40}, {"precision": "fp32"}], ids=["micro_batches", "fp32"]
)
def test_what_is_added_up_or_computed_in_float32_stays(options, monkeypatch):
    *_, dtypes = train(monkeypatch, narrow=True, max_grad_norm=1.0, **options)
    assert dtypes == [{torch.float32}] * 6


def test_a_weight_is_narrow_whose_gradient_is_one_product_in_bf16():
    policy = make()
    named = dict(policy.model.named_parameters())

    def found():
        some = {id(p) for p in used_once(list(named.values()), policy.try_decoder)}
        return {name for name, p in named.items() if id(p) in some}

    linear = {name for name in named if "_proj" in name}
    assert len(linear) == 14 and found() == linear

    first, second = policy.decoder.layers
    first.mlp.forward = lambda x: type(first.mlp).forward(first.mlp, x) + first.mlp.up_proj(x).sum()
    twice = "model.layers.0.mlp.up_proj.weight"
    assert found() == linear - {twice}

    def in_float32(x):
        with torch.autocast("cpu", enabled=False):
            return type(second.mlp).forward(second.mlp, x.float())

    second.mlp.forward = in_float32
    assert found() == {n for n in linear if not n.startswith("model.layers.1.mlp")} - {twice}


def test_adapters_are_narrow_and_what_they_adapt_is_not_trained():
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2))
    policy = LanguageModel(model, pad_token_id=3, precision="bf16")
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters and used_once(parameters, policy.try_decoder) == parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_adapters_alone(dtype, monkeypatch):
    """There may be no gradient but narrow ones, and none that is narrower than its weight."""

    def run(narrow):
        model = tiny_model().to(dtype)
        add_lora(model, LoraConfig(rank=4))
        policy = LanguageModel(model, pad_token_id=3, precision="bf16")
        with monkeypatch.context() as patch:
            if not narrow:
                patch.setattr(Gradients, "expect", lambda self, num_micro_batches: None)
            optimizer = OptimizerConfig(
                learning_rate=1e-2, num_epochs=2, batch_size=8, max_grad_norm=0.01
            )
            config = DPOConfig(optimizer=optimizer)
            rows = train_dpo(policy, None, make_pairs(16), config=config, seed=0)
        return rows, [p.detach() for p in model.parameters() if p.requires_grad]

    (wide, weights), (narrow, same) = run(False), run(True)
    assert [row["loss"] for row in narrow] == pytest.approx([row["loss"] for row in wide], rel=1e-3)
    for found, expected in zip(same, weights):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-4)


def test_an_interrupted_fit_leaves_nothing_to_the_next(monkeypatch):
    def first_loss_and_norm(policy):
        config = DPOConfig(optimizer=OptimizerConfig(batch_size=16))
        (row,) = train_dpo(policy, None, make_pairs(16), config=config, seed=0)
        return row["loss"], row["grad_norm"]

    def interrupted(self, max_norm):
        raise KeyboardInterrupt

    policy = make()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Gradients, "clip", interrupted)
        first_loss_and_norm(policy)
    assert {p.grad.dtype for p in policy.model.parameters()} == {torch.float32, torch.bfloat16}
    policy.micro_batch_tokens = 40
    assert first_loss_and_norm(policy) == first_loss_and_norm(make(micro_batch_tokens=40))
