"""kl: as a node of torch's graphs, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops import kl, kl_ref, kl_top_k, kl_with_grad_
from tests.ops.test_kl import NAMES, SETTINGS, make


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
