"""logps and kl at the limits: of 31 bits, of a launch's rows, under autocast, on other streams."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rlhf_fast.ops import kl, kl_ref, kl_with_grad_, logps, logps_ref, logps_with_grad_
from tests.ops.logps_cases import make


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same two rows 2^31 elements from each other; memory between them is never touched."""
    first, second = rows
    memory = torch.empty(2**31 + len(second), dtype=rows.dtype, device=rows.device)
    memory[: len(first)], memory[2**31 :] = first, second
    return memory.as_strided(rows.shape, (2**31, 1))


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_offsets_beyond_31_bits(device, kind):
    logits, labels = make(2, 500, torch.bfloat16, device)
    teacher, upstream = logits.flip(1), torch.tensor([1.0, -2.0], device=device)
    distant = far_apart(logits)
    torch.testing.assert_close(logps(distant, labels).logps, logps(logits, labels).logps)
    torch.testing.assert_close(kl(distant, teacher, kind=kind), kl(logits, teacher, kind=kind))
    for write in (
        lambda x: logps_with_grad_(x, labels, upstream),
        lambda x: kl_with_grad_(x, teacher, upstream, kind=kind),
    ):
        near = logits.clone()
        distant.copy_(logits)
        write(near), write(distant)
        torch.testing.assert_close(distant, near, msg="gradient over the logits")


def test_more_rows_than_a_grid_is_high(hardware):
    logits, labels = make(70000, 5, torch.float32, hardware)
    teacher = logits.flip(1)
    torch.testing.assert_close(logps(logits, labels).logps, logps_ref(logits, labels).logps)
    for kind in ("forward", "jsd"):
        want = kl_ref(logits, teacher, kind=kind)
        torch.testing.assert_close(kl(logits, teacher, kind=kind), want, rtol=1e-5, atol=1e-6)


def test_autocast_changes_nothing(device):
    logits, labels = make(6, 300, torch.float32, device)
    teacher = logits.flip(1)
    calls = lambda: (logps(logits, labels).logps, kl(logits, teacher))  # noqa: E731
    want = calls()
    with torch.autocast(device, torch.bfloat16):
        got = calls()
    for g, w in zip(got, want):
        assert g.dtype == torch.float32 and torch.equal(g, w)


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_forward_again_in_backward(device, use_reentrant, inplace_backward):
    logits, labels = make(6, 300, torch.float32, device)

    def loss(x):
        z = torch.tanh(x)
        chosen = logps(z * 3, labels, inplace_backward=inplace_backward).logps
        return chosen.sum() + kl(z, logits.flip(1), kind="jsd").sum()

    grads = []
    for function in (loss, lambda x: checkpoint(loss, x, use_reentrant=use_reentrant)):
        x = logits.clone().requires_grad_()
        function(x).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def results(logits, labels):
    """Of every way through the kernels."""
    x, y = logits.clone(), logits.clone()
    weights = torch.ones(labels.shape, device=x.device)
    found = [logps(logits, labels).logps, kl(logits, logits.flip(1), kind="jsd")]
    found += [*logps_with_grad_(x, labels, weights)[:1], x]
    return *found, kl_with_grad_(y, logits.flip(1), weights), y


def test_two_streams_at_once(gpu):
    batches = [make(64, 32000, torch.bfloat16, gpu, seed=seed) for seed in range(2)]
    want = [results(*batch) for batch in batches]
    streams, got = [torch.cuda.Stream() for _ in batches], []
    torch.cuda.synchronize()
    for stream, batch in zip(streams, batches):
        with torch.cuda.stream(stream):
            got.append(results(*batch))
    torch.cuda.synchronize()
    for found, expected in zip(got, want):
        assert all(map(torch.equal, found, expected))


def test_a_device_that_is_not_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    batch = make(8, 32000, torch.bfloat16, gpu)
    want = results(*batch)
    got = results(*(x.to("cuda:1") for x in batch))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(g.to(gpu), w) for g, w in zip(got, want))
