"""logps: as a node of torch's graphs."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops import kl, logps, logps_with_grad_
from rlhf_fast.ops.logps_ref import DIFFERENTIABLE, OUTPUTS
from tests.ops.logps_cases import (
    SETTINGS,
    make,
)


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("num_labels", [None, 3])
@pytest.mark.parametrize("truncated", [False, True])
def test_opcheck(device, settings, num_labels, truncated):
    logits, labels = make(4, 60, torch.float32, device)
    if num_labels:
        labels = labels[:, None].expand(-1, num_labels).contiguous()
    temperatures = torch.full((4,), settings.get("temperature", 1.0), device=device)
    softcap, scale = settings.get("softcap", 0.0), settings.get("logit_scale", 1.0)
    settings = (temperatures if truncated else None, 0.9, softcap, scale, -100)
    options = {"row_thresholds": torch.zeros(4, device=device)} if truncated else {}
    ops = torch.ops.rlhf_fast
    outputs = [name for name in OUTPUTS if not (truncated and name == "mean_logit")]
    torch.library.opcheck(ops.logps_forward, (logits, labels, *settings, outputs), options)
    reference, log_sum, entropy, g = torch.rand(4, 4, device=device)
    grad_logps = torch.rand(labels.shape, device=device)
    grads = (reference, log_sum, entropy, grad_logps, g, g)
    torch.library.opcheck(ops.logps_backward, (logits, labels, *settings, *grads), options)
    torch.library.opcheck(ops.logps_backward_, (logits, labels, *settings, *grads), options)
    args = (logits.clone(), labels, *settings, outputs, grad_logps, g, g)
    torch.library.opcheck(ops.logps_with_grad_, args)


FORMS = {
    "every output": {"outputs": OUTPUTS},
    "in place": {"inplace_backward": True},
    "top-k": {"top_k": 7, "outputs": ("logps", "entropy")},
    "top-p": {"top_p": 0.9, "softcap": 20.0},
    "row temperatures": {"temperature": torch.tensor([0.5, 1.0, 2.0, 0.7, 0.8, 0.9])},
}


@pytest.mark.parametrize("num_labels", [None, 3])
@pytest.mark.parametrize("form", FORMS)
def test_torch_compile_without_graph_breaks(device, form, num_labels):
    torch._dynamo.reset()
    logits, labels = make(6, 200, torch.float32, device)
    if num_labels:
        labels = labels[:, None] + torch.arange(num_labels, device=device)
        labels = labels % 200
    logits.scatter_(1, labels.reshape(6, -1), 30.0)  # nothing that is asked for is cut off
    kwargs = dict(FORMS[form])
    if "temperature" in kwargs:
        kwargs["temperature"] = kwargs["temperature"].to(device)

    def loss(x, y, **options):
        out = logps(x * 2, y, **options)
        rest = [t.sum() for n, t in zip(OUTPUTS, out) if n in DIFFERENTIABLE and t is not None]
        return out.logps.square().sum() + sum(rest)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, plain = (logits.clone().requires_grad_() for _ in range(2))
    compiled(x, labels, **kwargs).backward()
    loss(plain, labels, **kwargs).backward()
    torch.testing.assert_close(x.grad, plain.grad)


def test_torch_compile_with_settings_that_change(device):
    """A number that differs between two calls becomes symbolic in the next."""
    torch._dynamo.reset()
    logits, labels = make(6, 200, torch.float32, device)

    def both(x, t):
        logps_of_x = logps(x, labels, temperature=t, softcap=30.0 * t, logit_scale=t).logps
        return logps_of_x + kl(x, x * 2, temperature=t)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for t in (1.0, 0.7, 0.5, 0.9):
        torch.testing.assert_close(compiled(logits, t), both(logits, t))


def test_torch_compile_of_the_gradient_in_the_same_pass(device):
    logits, labels = make(6, 200, torch.float32, device)
    weights = torch.linspace(-1, 1, 6, device=device)

    def scaled(x):
        x = x * 2
        out = logps_with_grad_(x, labels, weights, grad_entropy=weights, outputs=("logps", "lse"))
        return out.logps, out.lse, x

    got = torch.compile(scaled, fullgraph=True, backend="aot_eager")(logits)
    for g, w in zip(got, scaled(logits)):
        torch.testing.assert_close(g, w)


def test_cuda_graph(gpu):
    """Captured once, replayed on other logits."""
    logits, labels = make(6, 5000, torch.bfloat16, gpu)
    weights = torch.ones(6, device=gpu)

    def both():
        x = logits.clone()
        out = logps(x, labels, outputs=("logps", "entropy"))
        return *logps_with_grad_(x, labels, weights)[:1], out.entropy, x

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    logits.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for g, w in zip(got, both()):
        assert torch.equal(g, w)
