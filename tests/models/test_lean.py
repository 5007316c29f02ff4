"""Fused parts of decoder layers: the values and gradients of the modules they stand for."""

import contextlib

import pytest
import torch
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama

from rlhf_fast.models import fused
from rlhf_fast.models.adapters import LoraConfig, add_lora
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.models.lean import LeanForward
from tests.tiny import tiny_model

GROUPS = [TokenGroup([10, 11, 12 + i], [[20 + i, 21, 3], [22, 23 + i]]) for i in range(6)]


def rms(x):
    return x.double().square().mean().sqrt().item()


def compare(mine, theirs, truth, inputs, upstream):
    """Errors of values and gradients against float64, by the error of the module's own."""
    for tensors in inputs:
        for t in tensors:
            t.grad = None
    outputs = [f(*tensors) for f, tensors in zip((mine, theirs, truth), inputs)]
    grads = []
    for output, tensors in zip(outputs, inputs):
        grads.append(torch.autograd.grad(output, tensors, upstream.to(output.dtype)))
    for m, t, exact in zip(*([o, *g] for o, g in zip(outputs, grads))):
        assert rms(m - exact) <= 2 * rms(t - exact) + 1e-8 * rms(exact)


def leaves(*shapes):
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(shape, generator=generator) for shape in shapes]
    return [
        [t.to(dtype).clone().requires_grad_() for t in first]
        for dtype in (torch.float32, torch.float32, torch.float64)
    ]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    def own(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight + offset)

    upstream = torch.randn(3, 5, 64)
    inputs = leaves((3, 5, 64), (64,))
    compare(lambda x, w: fused.rms_norm(x, w, 1e-5, offset), own, own, inputs, upstream)


def test_rotate():
    cos, sin = torch.randn(2, 1, 1, 5, 16)

    def own(x):
        return x * cos.to(x) + modeling_llama.rotate_half(x) * sin.to(x)

    upstream = torch.randn(2, 3, 5, 16)
    compare(lambda x: fused.rotate(x, cos, sin), own, own, leaves((2, 3, 5, 16)), upstream)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_joint_linear(autocast, biased):
    linear = torch.nn.functional.linear

    def with_autocast(f):
        def run(*args):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return f(*args)

        return run

    def mine(x, a, b, *biases):
        return torch.cat(fused.joint_linear(x, [a, b], list(biases) or [None, None]), -1)

    def own(x, a, b, *biases):
        return torch.cat([linear(x, w, v) for w, v in zip((a, b), biases or (None, None))], -1)

    shapes = [(2, 9, 32), (16, 32), (8, 32)] + ([(16,), (8,)] if biased else [])
    upstream = torch.randn(2, 9, 24)
    compare(with_autocast(mine), with_autocast(own), own, leaves(*shapes), upstream)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.nn.GELU(approximate="tanh")])
def test_gated_mlp(autocast, activation):
    linear = torch.nn.functional.linear

    def mine(*args):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return fused.gated_mlp(*args, activation)

    def truth(x, gate, up, down):
        return linear(activation(linear(x, gate)) * linear(x, up), down)

    def own(*args):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return truth(*args)

    inputs = leaves((2, 9, 32), (48, 32), (48, 32), (32, 48))
    compare(mine, own, truth, inputs, torch.randn(2, 9, 32))


def run(model, lean, precision="fp32"):
    language_model = LanguageModel(model, pad_token_id=3, precision=precision)
    if not lean:
        language_model.lean = torch.enable_grad
    kept = {}

    def count(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        hidden = language_model.hidden_states(language_model.collate(GROUPS))
    hidden.float().square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return hidden.detach(), gradient, sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("architecture", "all_of_it"),
    [("llama", True), ("qwen2", True), ("qwen3", True), ("gemma", True), ("gpt2", False)],
)
def test_a_model_gives_the_same_and_keeps_less(architecture, all_of_it, precision):
    model = tiny_model(architecture)
    lean = LeanForward(model.base_model)
    names = {type(module).__name__.lower() for module, _ in lean.forwards}
    if all_of_it:
        assert any("rmsnorm" in name for name in names), names
        assert any("mlp" in name for name in names) and "linear" in names and lean.functions
    else:
        assert not names and not lean.functions
    own_hidden, own_gradient, own_bytes = run(model, False, precision)
    hidden, gradient, kept_bytes = run(model, True, precision)
    bar = 1e-5 if precision == "fp32" else 2e-2
    assert rms(hidden - own_hidden) <= bar * rms(own_hidden)
    assert rms(gradient - own_gradient) <= bar * rms(own_gradient)
    if all_of_it:
        assert kept_bytes < 0.9 * own_bytes


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("read", ["source", "last"])
def test_the_last_layer_computes_what_is_read(architecture, read, monkeypatch):
    model = tiny_model(architecture)
    policy = LanguageModel(model, pad_token_id=3, precision="fp32", row_tokens=30)
    batch = policy.collate(GROUPS)
    rows = getattr(batch, read)
    seen, gated_mlp = [], fused.gated_mlp
    monkeypatch.setattr(
        fused, "gated_mlp", lambda x, *more: seen.append(x[..., 0].numel()) or gated_mlp(x, *more)
    )
    results = []
    for states in (policy.states(batch, rows), policy.hidden_states(batch)[rows]):
        model.zero_grad()
        (states * torch.linspace(-1, 2, len(states))[:, None]).square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((states.detach(), gradient))
    for mine, own in zip(*results):
        assert rms(mine - own) <= 1e-5 * rms(own)
    if architecture != "gpt2":  # it has no gated MLP
        whole = batch.input_ids.numel()
        assert seen == [whole, len(rows.unique()), whole, whole]


def test_everything_is_put_back_even_after_an_error():
    model = tiny_model()
    lean = LeanForward(model.base_model)
    original = modeling_llama.apply_rotary_pos_emb
    layer = model.base_model.layers[0]
    with pytest.raises(RuntimeError, match="inside"), lean():
        assert "forward" in vars(layer.mlp)
        assert modeling_llama.apply_rotary_pos_emb is not original
        raise RuntimeError("inside")
    assert modeling_llama.apply_rotary_pos_emb is original
    assert not any("forward" in vars(module) for module in model.modules())
    assert modeling_gemma.apply_rotary_pos_emb is not original


def test_what_differs_hooked_or_adapted_layers_stay():
    model = tiny_model()
    first, second = model.base_model.layers
    first.self_attn.q_proj.register_forward_hook(lambda *args: None)
    second.mlp.act_fn = torch.nn.Dropout(0.5)  # random: not the same twice
    second.mlp.train()
    replaced = {module for module, _ in LeanForward(model.base_model).forwards}
    assert first.mlp in replaced and second.mlp not in replaced
    assert first.self_attn.q_proj not in replaced and second.self_attn.q_proj in replaced
    other = tiny_model()
    other.base_model.layers[0].self_attn.q_proj = torch.nn.Identity()
    replaced = {module for module, _ in LeanForward(other.base_model).forwards}
    assert other.base_model.layers[0].self_attn.k_proj not in replaced


@pytest.mark.parametrize("added", ["before", "after"])
def test_adapters_of_every_layer_count(added):
    model = tiny_model("llama")
    before = LanguageModel(model, pad_token_id=0, precision="fp32") if added == "after" else None
    add_lora(model, LoraConfig(rank=2))
    policy = before or LanguageModel(model, pad_token_id=0, precision="fp32")
    for name, parameter in model.named_parameters():  # fresh adapters change nothing
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = policy.collate(GROUPS)
    hidden = policy.hidden_states(batch)
    policy.lean = contextlib.nullcontext
    torch.testing.assert_close(hidden, policy.hidden_states(batch))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("by", ["backbone", "user"])
def test_checkpointing_repeats_the_same_forward(precision, by, monkeypatch):
    seen, gated_mlp = [], fused.gated_mlp
    monkeypatch.setattr(
        fused, "gated_mlp", lambda x, *more: seen.append(x[..., 0].numel()) or gated_mlp(x, *more)
    )
    results, calls = [], []
    for checkpoints in (False, True):
        model = tiny_model()
        if checkpoints and by == "user":
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        policy = LanguageModel(
            model,
            pad_token_id=3,
            precision=precision,
            row_tokens=30,
            gradient_checkpointing=checkpoints and by == "backbone",
        )
        model.train()  # as torch's checkpoints want it
        batch = policy.collate(GROUPS)
        seen.clear()
        states = policy.states(batch, batch.last)
        loss = (states * torch.linspace(-1, 2, len(states))[:, None]).square().sum()
        loss.backward(retain_graph=True)
        calls.append(list(seen))
        loss.backward()  # the forward is repeated once more
        results.append(torch.cat([p.grad.flatten() for p in model.base_model.parameters()]))
    whole, read = batch.input_ids.numel(), len(batch.last.unique())
    assert calls == [[whole, read], [whole, read, read, whole]]
    assert torch.equal(*results)
