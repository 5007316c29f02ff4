"""verl's own functions, patched and not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from verl.utils import torch_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy as kernel

from rlhf_fast.integrations import verl
from rlhf_fast.ops import linear_logps_ref, logps_ref
from tests.ops.conftest import assert_as_accurate

pytestmark = pytest.mark.peers
DTYPES = [torch.float32, torch.bfloat16]


def make(dtype, rows=(3, 7), vocab=301, scale=6.0):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(*rows, vocab, generator=generator) * scale).to(dtype)
    return logits, torch.randint(vocab, rows, generator=generator)


def with_gradient(function, logits, *args):
    leaf = logits.clone().requires_grad_()
    out = function(leaf, *args)
    out.double().square().sum().backward()
    return out, leaf.grad


def check(name, plain, truth, ours):
    for part, *triple in zip(("values", "gradient"), ours, plain, truth):
        assert triple[0].dtype == triple[1].dtype
        assert_as_accurate(f"{part} of {name}", *triple, factor=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 6.0, 40.0])
def test_logprobs_from_logits(dtype, scale):
    logits, labels = make(dtype, scale=scale)
    call = lambda x: with_gradient(torch_functional.logprobs_from_logits, x, labels)  # noqa: E731
    plain, truth = call(logits), call(logits.double())
    with verl.patch():
        check("logprobs_from_logits", plain, truth, call(logits))
        for got, expected in zip(call(logits.double()), truth):  # which the kernel does not take
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
def test_entropy(name, dtype):
    logits, _ = make(dtype, rows=(21,))
    plain = with_gradient(getattr(torch_functional, name), logits)
    reference = lambda x: logps_ref(x, labels, outputs=("entropy",)).entropy  # noqa: E731
    labels = torch.zeros(21, dtype=torch.long)
    truth = with_gradient(reference, logits.double())
    with verl.patch():
        ours = with_gradient(getattr(torch_functional, name), logits)
    check(name, plain, truth, ours)


def test_entropy_compiles_as_verl_compiles_it():
    logits, _ = make(torch.float32, rows=(21,))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    with verl.patch():
        compiled = torch.compile(torch_functional.entropy_from_logits, dynamic=True)
        torch.testing.assert_close(compiled(logits), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(21,), (3, 7)])
@pytest.mark.parametrize("asked", ["both", "log_probs", "entropy"])
def test_fused_linear_for_ppo(dtype, rows, asked):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*rows, 16, generator=generator).to(dtype)
    weight = torch.randn(301, 16, generator=generator).to(dtype)
    ids = torch.randint(301, rows, generator=generator)

    def call(head, dtype):
        h, w = (t.to(dtype).clone().requires_grad_() for t in (hidden, weight))
        logps, entropy = head(h, w)
        parts = {"both": (logps, entropy), "log_probs": (logps,), "entropy": (entropy,)}[asked]
        sum(p.double().square().sum() for p in parts).backward()
        return logps, entropy, h.grad, w.grad

    def reference(h, w):
        out = linear_logps_ref(h, w, ids, temperature=0.8, outputs=("logps", "entropy"))
        return out.logps, out.entropy

    theirs = lambda h, w: FusedLinearForPPO()(h, w, ids, temperature=0.8)  # noqa: E731
    plain = call(theirs, dtype)
    truth = call(reference, torch.float64)
    with verl.patch():
        ours = call(theirs, dtype)
    for name, *triple in zip(("logps", "entropy", "d hidden", "d weight"), ours, plain, truth):
        assert triple[0].dtype == triple[1].dtype, name
        assert_as_accurate(name, *triple, factor=3.0)


def test_linear_cross_entropy():
    """verl's own needs Triton on a GPU, so here ours is compared with plain PyTorch alone."""
    hidden, weight = torch.randn(3, 7, 16), torch.randn(301, 16)
    labels = torch.randint(301, (3, 7))
    original = kernel.linear_cross_entropy
    with verl.patch():
        logps, entropy = kernel.linear_cross_entropy(hidden, weight, labels, 0.8, "none")
    assert kernel.linear_cross_entropy is original
    assert logps.shape == entropy.shape == (21,)  # verl flattens
    out = linear_logps_ref(hidden, weight, labels, temperature=0.8, outputs=("logps", "entropy"))
    torch.testing.assert_close(logps, out.logps.flatten())
    torch.testing.assert_close(entropy, out.entropy.flatten())


def test_backward_overwrites_logits_only_where_verl_would(monkeypatch):
    logits, labels = make(torch.float32)
    for flash in (False, True):
        with monkeypatch.context() as m, verl.patch():
            m.setattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", flash)
            leaf = logits.clone().requires_grad_()
            given = leaf * 1
            torch_functional.logprobs_from_logits(given, labels).sum().backward()
            assert torch.equal(given, logits) is not flash


def test_verl_patches_itself_from_an_environment_variable():
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "rlhf_fast.integrations.patch_verl"}
    code = (
        "import verl\n"
        "from verl.utils.torch_functional import logprobs_from_logits as f\n"
        "from rlhf_fast.integrations import ACTIVE\n"
        "print(len(ACTIVE['verl'].swaps), f.__module__)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout.split()[-2:] == ["28", "rlhf_fast.integrations"], result.stderr
