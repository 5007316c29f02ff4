"""kl: the CPU kernel and the CUDA kernel (emulated, or real with a GPU) against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from rlhf_fast.ops import kl, kl_ref, kl_top_k, kl_with_grad_, native
from tests.ops.conftest import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = [
    {"kind": "forward"},
    {"kind": "reverse", "temperature": 0.7},
    {"kind": "jsd", "beta": 0.5},
    {"kind": "jsd", "beta": 0.1, "temperature": 2.0},
]
NAMES = ["forward", "reverse", "jsd", "jsd-0.1"]


def make(num_rows, vocab, dtype, device, noise=1.0):
    generator = torch.Generator().manual_seed(vocab)
    student = torch.randn(num_rows, vocab, generator=generator) * 3
    teacher = student + torch.randn(num_rows, vocab, generator=generator) * noise
    return student.to(dtype).to(device), teacher.to(dtype).to(device)


def least_error(student, kind):
    """CUDA's `lg2.approx`, for the mixture's logarithm, is off by up to 2^-22 near 1."""
    on_cpu = not student.is_cuda and native._emulated is None
    return 2.0**-22 if kind == "jsd" and not on_cpu else 2.0**-23


def gradients(function, student, teacher, **kwargs):
    student, teacher = (x.detach().clone().requires_grad_() for x in (student, teacher))
    out = function(student, teacher, **kwargs)
    upstream = torch.linspace(-1, 2, out.numel(), device=out.device).reshape(out.shape)
    return torch.autograd.grad((out * upstream).sum(), (student, teacher))


def check(student, teacher, **kwargs):
    triple = (
        f(s, t, **kwargs)
        for f, s, t in (
            (kl, student, teacher),
            (kl_ref, student, teacher),
            (kl_ref, student.double(), teacher.double()),
        )
    )
    least = least_error(student, kwargs["kind"])
    assert_as_accurate("divergence", *triple, least=least)
    got, plain, truth = (
        gradients(f, s, t, **kwargs)
        for f, s, t in (
            (kl, student, teacher),
            (kl_ref, student, teacher),
            (kl_ref, student.double(), teacher.double()),
        )
    )
    for side, *grads in zip(("student", "teacher"), got, plain, truth):
        assert grads[0].dtype == student.dtype
        assert_as_accurate(f"gradient of the {side}", *grads, factor=3.0)


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab", [1, 33, 1000, 49152])
def test_values_and_gradients_match_float64(device, vocab, dtype, settings):
    check(*make(3 if vocab > 1000 else 20, vocab, dtype, device), **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_close_and_distant_distributions(device, settings):
    for noise in (1e-3, 0.1, 10.0):
        check(*make(8, 515, torch.float32, device, noise), **settings)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_no_less_accurate_than_plain_pytorch(kind):
    """Of float32, where a divergence is a small difference of large logarithms."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        student, noise = torch.randn(2, 32, 4096, generator=generator)
        student *= 3
        teacher = student + noise
        truth = kl_ref(student.double(), teacher.double(), kind=kind)
        got, plain = (
            (f(student, teacher, kind=kind) - truth).square().mean().sqrt() for f in (kl, kl_ref)
        )
        assert got <= plain, f"RMS error {got:.2e}, plain PyTorch {plain:.2e}"


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_equal_logits_have_no_divergence_and_no_gradient(device, settings):
    student, _ = make(4, 1000, torch.float32, device)
    assert kl(student, student.clone(), **settings).abs().max() < 1e-6
    for grad in gradients(kl, student, student.clone(), **settings):
        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab", [1, 33, 1003, 49152])
def test_gradient_in_the_same_pass(device, vocab, dtype, settings):
    num_rows = 2 if vocab > 1003 else 9
    base, teachers = make(num_rows, vocab + 3, dtype, device)
    upstream = torch.linspace(-1, 2, num_rows, device=device)
    least = least_error(base, settings["kind"])
    for cut in (slice(0, vocab), slice(1, vocab + 1)):
        for teacher in (teachers[:, cut], teachers[:, cut].contiguous()):  # aligned alike or not
            want, plain = (
                gradients(kl_ref, base[:, cut].to(d), teacher.to(d), **settings)[0]
                for d in (torch.float64, dtype)
            )
            whole = base.clone()
            rows = whole[:, cut]
            got = kl_with_grad_(rows, teacher, upstream, **settings)
            triple = (
                got,
                kl_ref(base[:, cut], teacher, **settings),
                kl_ref(base[:, cut].double(), teacher.double(), **settings),
            )
            assert_as_accurate("divergence", *triple, least=least)
            assert_as_accurate("gradient", rows, plain, want, factor=3.0)
            for neighbours in (slice(0, cut.start), slice(cut.stop, None)):
                assert torch.equal(whole[:, neighbours], base[:, neighbours])


def test_jsd_is_bounded_and_symmetric_at_one_half(device):
    student, teacher = make(6, 300, torch.float32, device, noise=30.0)
    forth, back = kl(student, teacher, kind="jsd"), kl(teacher, student, kind="jsd")
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=1e-6)
    assert (forth <= math.log(2) + 1e-6).all()


def test_either_side_alone(device):
    student, teacher = make(4, 77, torch.float32, device)
    both = gradients(kl, student, teacher)
    for i in range(2):
        pair = [student.clone(), teacher.clone()]
        pair[i].requires_grad_()
        (grad,) = torch.autograd.grad(
            (kl(*pair) * torch.linspace(-1, 2, 4, device=device)).sum(), pair[i]
        )
        assert torch.equal(grad, both[i])


def test_strided_logits(device):
    student, teacher = (x.reshape(3, 4, 101) for x in make(12, 101, torch.float32, device))
    for view in (lambda x: x[:, :-1], lambda x: x[..., 1:-2], lambda x: x.transpose(0, 1)):
        s, t = view(student), view(teacher)
        torch.testing.assert_close(kl(s, t), kl(s.contiguous(), t.contiguous()))
        got = gradients(kl, s, t)
        for g, w in zip(got, gradients(kl, s.contiguous(), t.contiguous())):
            torch.testing.assert_close(g, w)
    for kind in ("forward", "jsd"):  # rows with different alignment
        mixed = kl(student[..., 1:], teacher[..., 1:].contiguous(), kind=kind)
        want = kl_ref(student[..., 1:], teacher[..., 1:], kind=kind)
        torch.testing.assert_close(mixed, want, rtol=1e-5, atol=1e-6)


def test_rows_that_no_cluster_can_keep(device):
    check(*make(1, 300001, torch.float32, device), kind="jsd")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_logits_far_from_zero(device, dtype):
    student, teacher = make(6, 3000, dtype, device)
    for x in (student, teacher):
        x[0] += 3000
        x[1, 2000:] += 200
        x[2] = torch.finfo(dtype).min
        x[3, :2999] = torch.finfo(dtype).min
    teacher[4] -= 3000
    for settings in SETTINGS:  # plain PyTorch gives NaN in some
        got = kl(student, teacher, **settings)
        want = kl_ref(student.double(), teacher.double(), **settings)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        found = gradients(kl, student, teacher, **settings)
        exact = gradients(kl_ref, student.double(), teacher.double(), **settings)
        for g, w in zip(found, exact):
            rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            torch.testing.assert_close(g.double(), w, rtol=rounding, atol=1e-6)


def test_all_rows_without_upstream_gradient(device):
    student, teacher = make(3, 40, torch.float32, device)
    student.requires_grad_()
    (kl(student, teacher) * 0.0).sum().backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_upstream_gradient_get_zeros_whatever_they_hold(device, dtype, value):
    student, teacher = make(4, 1003, dtype, device)
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.0], device=device)
    masked = upstream == 0.0
    damaged = [x.masked_fill(masked[:, None], value) for x in (student, teacher)]
    for settings in SETTINGS:
        for of in (slice(0, 1), slice(1, 2), slice(0, 2)):
            got, want = (
                through([x.clone() for x in pair], of, upstream, settings)
                for pair in (damaged, (student, teacher))
            )
            for a, b in zip(got, want, strict=True):
                assert (a[masked] == 0.0).all() and torch.equal(a, b), settings
        rows = damaged[0].clone()
        kl_with_grad_(rows, damaged[1], upstream, **settings)
        assert (rows[masked] == 0.0).all() and (rows[~masked] != 0.0).any()


def through(pair, of, upstream, settings):
    inputs = [x.requires_grad_() for x in pair[of]]
    return torch.autograd.grad(kl(*pair, **settings), inputs, upstream)


def test_infinite_and_nan_logits(device):
    student, teacher = make(4, 200, torch.float32, device)
    student[0, :50] = teacher[0, :50] = -torch.inf  # neither has these: no contribution
    student[1, 7] = -torch.inf  # the teacher has what the student excludes
    teacher[2, 7] = -torch.inf
    student[3, 7] = torch.nan
    for settings in SETTINGS:
        got = kl(student, teacher, **settings)
        want = kl_ref(student.double(), teacher.double(), **settings)
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5, atol=1e-6, equal_nan=True, msg=str(settings)
        )
    for grad in gradients(kl, student[:1], teacher[:1]):
        assert grad.isfinite().all() and (grad[0, :50] == 0).all()


def test_empty_batch_stays_connected(device):
    student = torch.randn(0, 9, device=device, requires_grad=True)
    kl(student, torch.randn(0, 9, device=device)).sum().backward()
    assert student.grad.shape == (0, 9)
    empty, none = student.detach(), torch.ones(0, device=device)
    assert kl_with_grad_(empty, empty.clone(), none).shape == (0,)


def test_top_k_teacher_is_the_top_part_of_the_sum(device):
    student, teacher = make(5, 400, torch.float32, device)
    log_q = torch.log_softmax(teacher, -1)
    top = log_q.topk(400, dim=-1)
    whole = kl_top_k(student, top.indices[:, :400], top.values[:, :400], temperature=1.0)
    torch.testing.assert_close(whole, kl(student, teacher), rtol=1e-4, atol=1e-5)
    indices, values = top.indices[:, :3].clone(), top.values[:, :3].clone()
    indices[0, 2] = -100
    logits = student.clone().requires_grad_()
    part = kl_top_k(logits, indices, values)
    log_p = torch.log_softmax(student.double(), -1)
    terms = values.double().exp() * (values - log_p.gather(-1, indices.clamp(min=0)))
    terms[0, 2] = 0.0
    torch.testing.assert_close(part.double(), terms.sum(-1), rtol=1e-5, atol=1e-6)
    part.sum().backward()
    assert logits.grad.isfinite().all()


def test_repeatable(device):
    student, teacher = make(9, 3001, torch.bfloat16, device)
    assert torch.equal(kl(student, teacher), kl(student, teacher))


@pytest.mark.parametrize("body", ["portable", "avx2", "avx512"])
def test_the_bodies_for_other_processors(body):
    script = (
        "from tests.ops import test_kl as t\n"
        "for dtype in t.DTYPES:\n"
        "  for vocab in (1, 33, 1001):\n"
        "    for settings in t.SETTINGS:\n"
        "      t.check(*t.make(6, vocab, dtype, 'cpu'), **settings)\n"
        "      t.test_gradient_in_the_same_pass('cpu', vocab, dtype, settings)\n"
        "t.test_infinite_and_nan_logits('cpu')\n"
    )
    env = {**os.environ, "RLHF_FAST_CPU": body}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
