"""TRL's functions called from the installed package, patched and not, on awkward inputs."""

from __future__ import annotations

import pytest
import torch
import trl
from packaging.version import Version
from trl.trainer import utils

from rlhf_fast.integrations import trl as integration
from rlhf_fast.ops import linear_logps_ref, logps_ref
from tests.ops.conftest import assert_as_accurate

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="other signatures"),
]
NAMES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ROWS, WIDTH, VOCAB, CHUNK = 23, 16, 301, 128


def inputs(dtype=torch.float32, rows=ROWS, scale=1.0, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden, weight = draw(rows, WIDTH) * scale, draw(VOCAB, WIDTH)
    tensors = [hidden.to(dtype), weight.to(dtype), draw(VOCAB).to(dtype) if bias else None]
    return tensors, torch.randint(VOCAB, (rows,), generator=generator)


def head(tensors, targets, *settings, outputs=NAMES[1:], through=NAMES[:2], frozen=()):
    """Outputs and gradients of whatever `_ChunkedLogProbFunction` is now, or of float64."""
    leaves = [
        None if t is None else t.detach().clone().requires_grad_(i not in frozen)
        for i, t in enumerate(tensors)
    ]
    float64 = leaves[0].dtype == torch.float64
    apply = truth if float64 else utils._ChunkedLogProbFunction.apply
    out = dict(zip(NAMES, apply(*leaves, targets, *settings, outputs)))
    parts = [out[name] for name in through if out[name] is not None]
    if len(targets):
        weights = torch.linspace(-1, 2, len(targets), dtype=parts[0].dtype)
        sum((p * weights).sum() for p in parts).backward()
    else:
        sum(p.sum() for p in parts).backward()
    grads = {f"d{i}": t.grad for i, t in enumerate(leaves) if t is not None}
    return out | grads


def truth(hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs):
    out = linear_logps_ref(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=scale,
        outputs=("logps", "entropy", "sum_p2", "mean_logit", "is_top1"),
    )
    return out.logps, out.entropy, out.sum_p2.log(), out.mean_logit, out.is_top1


def compare(tensors, targets, *settings, **options):
    plain = head(tensors, targets, *settings, **options)
    double = [None if t is None else t.double() for t in tensors]
    exact = head(double, targets, *settings, **options)
    with integration.patch():
        ours = head(tensors, targets, *settings, **options)
    assert {k for k, v in ours.items() if v is None} == {k for k, v in plain.items() if v is None}
    for name, got in ours.items():
        if got is None:
            continue
        assert got.dtype == plain[name].dtype, name
        assert got.requires_grad == plain[name].requires_grad, name
        if name == "is_top1":
            assert torch.equal(got, plain[name])
        else:
            factor = 3.0 if name.startswith("d") else 2.0
            assert_as_accurate(name, got, plain[name], exact[name], factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings",
    [(1.0, CHUNK, None, 1.0), (0.7, CHUNK, None, 0.25), (1.3, CHUNK, 5.0, 2.0)],
    ids=["plain", "scaled", "softcapped"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_fused_head(dtype, settings, bias):
    compare(*inputs(dtype, bias=bias), *settings)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_flat_and_peaked(scale):
    compare(*inputs(scale=scale), 1.0, CHUNK, None, 1.0)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2)])
def test_frozen_parts_get_no_gradient(frozen):
    compare(*inputs(), 0.9, CHUNK, None, 1.0, frozen=frozen)


@pytest.mark.parametrize("through", [("log_probs",), ("entropy",)])
def test_gradient_of_either_output_may_be_missing(through):
    compare(*inputs(), 0.9, CHUNK, None, 1.0, through=through)


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("is_top1", "entropy"), ("mean_logits",)])
def test_only_what_is_asked_for(outputs):
    compare(*inputs(), 0.9, CHUNK, None, 1.0, outputs=outputs)


def test_no_rows_stay_connected():
    tensors, targets = inputs(rows=0)
    with integration.patch():
        out = head(tensors, targets, 1.0, CHUNK, None, 1.0)
    assert out["log_probs"].shape == (0,)
    for name in ("d0", "d1", "d2"):
        assert torch.equal(out[name], torch.zeros_like(out[name]))


def test_autocast_sets_the_dtype_of_the_product():
    tensors, targets = inputs()
    rounded = [t.bfloat16().double() for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = head(tensors, targets, 1.0, CHUNK, None, 1.0)
        with integration.patch():
            ours = head(tensors, targets, 1.0, CHUNK, None, 1.0)
    exact = head(rounded, targets, 1.0, CHUNK, None, 1.0)
    for name in (*NAMES[:4], "d0", "d1", "d2"):
        assert ours[name].dtype == plain[name].dtype == torch.float32
        assert_as_accurate(name, ours[name], plain[name], exact[name], 3.0)


def test_first_of_equals_is_top1():
    hidden, weight = torch.ones(4, 2), torch.ones(6, 2)
    targets = torch.tensor([0, 1, 5, 0])
    with integration.patch():
        out = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK)
    assert out[-1].tolist() == [True, False, False, True]


def test_float64_stays_with_trl():
    tensors, targets = inputs(torch.float64)
    with integration.patch():
        out = utils._ChunkedLogProbFunction.apply(*tensors, targets, 1.0, CHUNK)
    assert out[0].grad_fn is None and out[0].shape == (ROWS,)


# ---- from logits ---------------------------------------------------------------------------------


def selected(logits, *args, **kwargs):
    leaf = logits.clone().requires_grad_()
    out = utils.selective_log_softmax(leaf, *args, **kwargs)
    out.double().square().sum().backward()
    return out, leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels", [None, 5], ids=["one label", "five labels"])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax(dtype, labels, masked):
    logits = (torch.randn(3, 7, VOCAB) * 6).to(dtype)
    index = torch.randint(VOCAB, (3, 7) if labels is None else (3, 7, labels))
    settings = {"temperature": 0.7}
    if masked:
        settings["row_mask"] = torch.rand(index.shape) < 0.5
    plain, exact = selected(logits, index, **settings), selected(logits.double(), index, **settings)
    with integration.patch():
        ours = selected(logits, index, **settings)
    for name, *triple in zip(("values", "gradient"), ours, plain, exact):
        assert_as_accurate(name, *triple, factor=3.0)


def test_a_temperature_of_zero_is_refused_as_before():
    with integration.patch(), pytest.raises(ValueError, match="temperature must be positive"):
        utils.selective_log_softmax(torch.randn(2, 3), torch.zeros(2).long(), temperature=0.0)


def test_labels_outside_the_vocabulary_are_refused_as_before():
    logits, index = torch.randn(2, 3), torch.tensor([0, -100])
    with pytest.raises(RuntimeError, match="out of bounds"):
        utils.selective_log_softmax(logits, index)
    with integration.patch(), pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        utils.selective_log_softmax(logits, index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_from_logits(dtype):
    logits = (torch.randn(3, 7, VOCAB) * 6).to(dtype)
    plain = utils.entropy_from_logits(logits)
    index = torch.zeros(3, 7).long()
    exact = logps_ref(logits.double(), index, outputs=("entropy",)).entropy
    with integration.patch():
        assert_as_accurate("entropy", utils.entropy_from_logits(logits), plain, exact)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_both_in_one_pass(with_gradient):
    logits = (torch.randn(3, 7, VOCAB) * 6).requires_grad_()
    index, mask = torch.randint(VOCAB, (3, 7)), torch.rand(3, 7) < 0.5
    args = (logits, index, with_gradient, 0.7, mask)
    plain = utils.selective_log_softmax_and_entropy(*args)
    with integration.patch():
        ours = utils.selective_log_softmax_and_entropy(*args)
    for got, expected in zip(ours, plain):
        assert got.requires_grad == expected.requires_grad
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
