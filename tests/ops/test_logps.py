"""logps: the CPU kernel and the CUDA kernel (emulated, or real with a GPU) against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rlhf_fast.ops import logps, logps_ref, logps_with_grad_
from rlhf_fast.ops.logps_ref import OUTPUTS
from tests.ops.conftest import assert_as_accurate
from tests.ops.logps_cases import (
    DTYPES,
    SETTINGS,
    check_gradients,
    check_values,
    gradient,
    make,
)


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab", [1, 33, 49152, 128256])
def test_values_and_gradients_match_float64(device, vocab, dtype, settings):
    logits, labels = make(4 if vocab > 1000 else 37, vocab, dtype, device)
    labels[1] = -100
    check_values(logits, labels, **settings)
    check_gradients(logits, labels, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_flat_and_peaked_logits(device, dtype):
    for scale in (0.01, 1.0, 20.0):
        logits, labels = make(16, 1003, dtype, device, scale=scale)
        check_values(logits, labels)
        check_gradients(logits, labels)


def test_large_maximum_late_in_the_row(device):
    """The running reference is replaced, more than once."""
    logits, labels = make(3, 20000, torch.float32, device)
    logits += torch.linspace(-300, 300, 20000, device=device)
    check_values(logits, labels)
    check_gradients(logits, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_logits_far_from_zero(device, dtype):
    """Up to the ends of the dtype, and rows whose first or only finite logits come late."""
    logits, labels = make(9, 5000, dtype, device)
    logits[0] += 3000
    logits[1] -= 3000
    logits[2:4] *= torch.finfo(dtype).max / 64  # the largest takes everything
    logits[2:4, 4000] = torch.finfo(dtype).max
    labels[2] = 4000
    logits[4] = torch.finfo(dtype).min  # what masks are filled with: all the same
    logits[5, :4500] = torch.finfo(dtype).min
    logits[6, :4999] = -torch.inf
    labels[6] = 4999
    logits[7, 3000:] += 200
    logits[8] *= 100
    outputs = ("logps", "entropy", "lse", "sum_p2", "is_top1")
    got = logps(logits, labels, outputs=outputs)
    truth = logps_ref(logits.double(), labels, outputs=outputs)
    for name in outputs:
        pair = (getattr(out, name).double() for out in (got, truth))
        torch.testing.assert_close(*pair, rtol=2e-5, atol=2e-5, msg=name)
    assert torch.equal(logps(logits, labels).logps, got.logps)
    assert (got.logps[[2, 6]] == 0).all() and (got.entropy[[2, 6]] == 0).all()
    rows = [0, 1, 5, 7, 8]  # of the others float64 itself makes 1 or NaN where lse absorbs log(V)
    check_gradients(logits[rows], labels[rows])
    flat = gradient(logps, logits[4:5], labels[4:5], {"lse": torch.ones(1)}, outputs=("lse",))
    torch.testing.assert_close(
        flat.double(), torch.full_like(flat, 1 / 5000, dtype=torch.double), rtol=5e-3, atol=0
    )


TRUNCATIONS = [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.5}, {"top_k": 10**6}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=lambda t: "-".join(map(str, t.items())))
def test_truncated_distributions(device, truncation, settings):
    outputs = tuple(name for name in OUTPUTS if name != "mean_logit")
    logits, labels = make(24, 515, torch.float32, device)
    labels[::2] = logits[::2].argmax(-1)  # half of the labels are certainly kept
    kwargs = {**settings, **truncation, "outputs": outputs}
    got, plain = (f(logits, labels, **kwargs) for f in (logps, logps_ref))
    truth = logps_ref(logits.double(), labels, **kwargs)
    outside = truth.logps == -torch.inf
    assert torch.equal(got.logps == -torch.inf, outside)
    assert outside.any() == (truncation["top_k"] < 10**6 if "top_k" in truncation else True)
    for name in outputs:
        triple = (getattr(o, name) for o in (got, plain, truth))
        if name == "logps":
            triple = (x[~outside] for x in triple)
        assert_as_accurate(name, *triple)

    upstream = {"logps": torch.randn(24), "entropy": torch.randn(24)}
    kwargs["outputs"] = ("logps", "entropy")
    upstream["logps"][outside.cpu()] = 0.0  # through the reference they would pass NaN
    want, plain = (
        gradient(logps_ref, x, labels, upstream, **kwargs) for x in (logits.double(), logits)
    )
    upstream["logps"][outside.cpu()] = 7.0  # through the kernel nothing
    got = gradient(logps, logits, labels, upstream, **kwargs)
    assert_as_accurate("gradient", got, plain, want, factor=3.0)


def test_ties_at_the_cut_are_kept(device):
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]], device=device)
    got = logps(logits, torch.tensor([[0, 1, 2, 3, 4]], device=device), top_k=2).logps[0]
    want = torch.log_softmax(logits[0, :4], -1)
    torch.testing.assert_close(got[:4], want)
    assert got[4] == -torch.inf


def test_threads_share_a_row_when_rows_are_few():
    """Fewer rows than threads: the same numbers, bit for bit."""
    logits, labels = make(1, 151936, torch.bfloat16, "cpu")  # three segments
    upstream = {"logps": torch.ones(1), "entropy": torch.ones(1)}
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            out = logps(logits, labels, outputs=OUTPUTS)
            grad = gradient(logps, logits, labels, upstream, outputs=("logps", "entropy"))
            at_once = logits.clone()
            logps_with_grad_(at_once, labels, upstream["logps"], grad_entropy=upstream["entropy"])
            results.append((*out, grad, at_once))
    finally:
        torch.set_num_threads(before)
    for one, five in zip(*results):
        assert torch.equal(one, five)


def strided_cases(base):
    """Views that hold the same kind of rows in other places: name, view."""
    batch, length, _ = base.shape
    yield "shifted", base[:, :-1]
    yield "every other row", base[:, ::2]
    yield "transposed", base.transpose(0, 1)
    yield "unaligned and padded", base[..., 1:-2]
    yield "expanded", base[:, :1].expand(batch, length, -1)
    yield "one row", base[0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_strided_logits_are_read_where_they_lie(device, dtype):
    base = make(15, 515, dtype, device)[0].reshape(3, 5, 515)
    for name, view in strided_cases(base):
        labels = torch.randint(view.shape[-1], view.shape[:-1], device=device)
        dense = view.contiguous()
        # An unaligned row is summed in another order on CUDA.
        torch.testing.assert_close(
            logps(view, labels).logps, logps(dense, labels).logps, rtol=1e-6, atol=2e-6, msg=name
        )
        logits = view.detach().requires_grad_()
        (grad,) = torch.autograd.grad(logps(logits, labels).logps.sum(), logits)
        want = gradient(logps, dense, labels, {"logps": torch.ones(())})
        torch.testing.assert_close(grad, want, rtol=2e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_label_dtypes_and_ignored_labels(device, index_dtype):
    logits, labels = make(6, 100, torch.float32, device)
    labels[2] = -100
    labels[4] = 7
    labels = labels.to(index_dtype)
    out = logps(logits, labels)
    assert out.logps[2] == 0.0 and out.entropy is None
    grad = gradient(logps, logits, labels)
    assert (grad[2] == 0).all() and (grad[4] != 0).any()
    assert logps(logits, labels, ignore_index=7).logps[4] == 0.0 if labels[2] >= 0 else True


def test_many_labels_per_row(device):
    logits, _ = make(5, 300, torch.float32, device)
    labels = torch.randint(300, (5, 9), device=device)
    labels[:, 3] = labels[:, 4]  # the same label twice
    labels[2, 1] = -100
    check_values(logits, labels)
    check_gradients(logits, labels)
    assert logps(logits, labels).logps.shape == (5, 9)


def test_temperature_per_row(device):
    logits, labels = make(6, 1000, torch.float32, device)
    temperature = torch.linspace(0.3, 2.0, 6, device=device)
    check_values(logits, labels, temperature=temperature)
    check_gradients(logits, labels, temperature=temperature)


def test_first_of_equal_maxima_is_top1(device):
    logits = torch.zeros(3, 50, device=device)
    logits[1, 20] = 1.0
    logits[2, [30, 40]] = torch.inf
    labels = torch.tensor([[0, 1], [20, 0], [30, 0]], device=device)
    got = logps(logits, labels, outputs=("is_top1",)).is_top1
    assert got.tolist() == [[True, False]] * 3


def test_infinite_and_nan_logits(device):
    logits, labels = make(5, 700, torch.float32, device)
    logits[0, 5:400] = -torch.inf
    logits[1, :] = -torch.inf  # no distribution: NaN, as in PyTorch
    logits[2, 100] = torch.nan
    logits[3, 100] = torch.inf
    logits[4, labels[4]] = -torch.inf
    labels[0] = 3
    out = logps(logits, labels, outputs=("logps", "entropy", "lse"))
    truth = logps_ref(logits.double(), labels, outputs=("logps", "entropy", "lse"))
    for name in ("logps", "lse", "entropy"):
        got, want = getattr(out, name)[[0, 1, 2, 4]], getattr(truth, name)[[0, 1, 2, 4]]
        torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert out.logps[3].isnan()
    grad = gradient(logps, logits[:1], labels[:1], outputs=("logps", "entropy"))
    want = gradient(logps_ref, logits[:1], labels[:1])
    assert grad.isfinite().all() and (grad[0, 5:400] == 0).all()
    torch.testing.assert_close(gradient(logps, logits[:1], labels[:1]), want)


def test_bitwise_repeatable_and_independent_of_threads_and_batch(device):
    logits, labels = make(9, 5003, torch.bfloat16, device)
    first = logps(logits, labels, outputs=("logps", "entropy"))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            again = logps(logits, labels, outputs=("logps", "entropy"))
            assert torch.equal(first.logps, again.logps)
            assert torch.equal(first.entropy, again.entropy)
    finally:
        torch.set_num_threads(threads)
    alone = logps(logits[4:5], labels[4:5]).logps
    assert torch.equal(alone, first.logps[4:5])


@pytest.mark.parametrize("body", ["portable", "avx2", "avx512"])
def test_the_bodies_for_older_processors(body):
    """Same checks, in a process that may not use the newer instructions."""
    script = (
        "from tests.ops import test_logps as t\n"
        "for dtype in t.DTYPES:\n"
        "  for vocab in (1, 33, 3001):\n"
        "    for settings in t.SETTINGS:\n"
        "      x, y = t.make(9, vocab, dtype, 'cpu')\n"
        "      t.check_values(x, y, **settings); t.check_gradients(x, y, **settings)\n"
        "t.test_infinite_and_nan_logits('cpu')\n"
    )
    env = {**os.environ, "RLHF_FAST_CPU": body}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
