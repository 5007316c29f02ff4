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


@pytest.mark.parametrize("jsd", [False, True])
def test_opcheck(device, jsd):
    a, b = make(4, 60, torch.float32, device)
    torch.library.opcheck(torch.ops.rlhf_fast.kl_forward, (a, b, 1.0, jsd, 0.3))
    _, stats = torch.ops.rlhf_fast.kl_forward(a, b, 1.0, jsd, 0.3)
    upstream = torch.rand(4, device=device)
    for need in ((True, True), (False, True), (True, False)):
        args = (a, b, 1.0, jsd, 0.3, stats, upstream, *need)
        torch.library.opcheck(torch.ops.rlhf_fast.kl_backward, args)
    for reverse in (False, not jsd):
        args = (a.clone(), b, upstream, reverse, 1.0, jsd, 0.3)
        torch.library.opcheck(torch.ops.rlhf_fast.kl_with_grad_, args)


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_torch_compile_without_graph_breaks(device, settings):
    torch._dynamo.reset()
    student, teacher = make(4, 60, torch.float32, device)

    def loss(s, t, function=kl):
        return function(s * 2, t * 2, **settings).square().sum()

    got = [x.clone().requires_grad_() for x in (student, teacher)]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*got).backward()
    want = [x.clone().requires_grad_() for x in (student, teacher)]
    loss(*want, function=kl_ref).backward()
    for g, w in zip(got, want):
        torch.testing.assert_close(g.grad, w.grad, rtol=1e-4, atol=1e-5)


def test_torch_compile_of_the_gradient_in_the_same_pass(device):
    student, teacher = make(4, 60, torch.float32, device)
    upstream = torch.linspace(-1, 1, 4, device=device)

    def scaled(x):
        x = x * 2
        return kl_with_grad_(x, teacher, upstream, kind="jsd"), x

    got = torch.compile(scaled, fullgraph=True, backend="aot_eager")(student)
    for g, w in zip(got, scaled(student)):
        torch.testing.assert_close(g, w)


def test_torch_compile_of_a_top_k_teacher(device):
    student, teacher = make(4, 60, torch.float32, device)
    top = torch.log_softmax(teacher, -1).topk(5)

    def loss(s):
        return kl_top_k(s * 2, top.indices, top.values).sum()

    x, plain = (student.clone().requires_grad_() for _ in range(2))
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(plain).backward()
    torch.testing.assert_close(x.grad, plain.grad)


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_cuda_graph(gpu, kind):
    student, teacher = make(4, 5000, torch.bfloat16, gpu)
    kl(student, teacher, kind=kind)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kl(student, teacher, kind=kind)
    student.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, kl(student, teacher, kind=kind))


BAD = {
    "teacher_logits must match": lambda s, t: kl(s, t[:, :-1]),
    "teacher_logits must match the logits, torch.float32": lambda s, t: kl(s, t.half()),
    "teacher_logits must match .* on meta": lambda s, t: kl(s, t.to("meta")),
    "at least one entry": lambda s, t: kl(s[:, :0], t[:, :0]),
    "grad must have shape": lambda s, t: kl_with_grad_(s, t, torch.ones(4)),
    "constants that do not overlap": lambda s, t: kl_with_grad_(
        s.requires_grad_(), t, torch.ones(5)
    ),
    "must lie in other memory": lambda s, t: kl_with_grad_(s, s, torch.ones(5)),
    "kind must be one of": lambda s, t: kl(s, t, kind="backwards"),
    "beta must lie between 0 and 1": lambda s, t: kl(s, t, kind="jsd", beta=1.0),
    "temperature must be positive": lambda s, t: kl(s, t, temperature=0.0),
    "logits must be float32": lambda s, t: kl(s.double(), t.double()),
    "contiguous along the vocabulary": lambda s, t: kl(s.t(), t.t()),
    "must have the shape of teacher_indices": lambda s, t: kl_top_k(s, s[:, :2].long(), t[:, :3]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=message):
        BAD[message](*make(5, 30, torch.float32, "cpu"))


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
