"""logps: the CPU kernel and the CUDA kernel (emulated, or real with a GPU) against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rlhf_fast.ops import LogpsOutput, kl, logps, logps_ref, logps_with_grad_
from rlhf_fast.ops.logps_inputs import check_values as check_values_of
from rlhf_fast.ops.logps_ref import DIFFERENTIABLE, OUTPUTS
from tests.ops.conftest import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = [{}, {"temperature": 0.7, "logit_scale": 0.5}, {"softcap": 30.0, "temperature": 1.3}]


def make(num_rows, vocab, dtype, device, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed + vocab)
    logits = (torch.randn(num_rows, vocab, generator=generator) * scale).to(dtype)
    labels = torch.randint(vocab, (num_rows,), generator=generator)
    return logits.to(device), labels.to(device)


def upstream_for(out: LogpsOutput, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(getattr(out, name).shape, generator=generator)
        for name in DIFFERENTIABLE
        if getattr(out, name) is not None
    }


def gradient(function, logits, labels, upstream=None, **kwargs):
    logits = logits.detach().clone().requires_grad_()
    out = function(logits, labels, **kwargs)
    upstream = upstream or upstream_for(out)
    loss = sum((getattr(out, n) * g.to(logits.device)).sum() for n, g in upstream.items())
    (grad,) = torch.autograd.grad(loss, logits)
    return grad


def check_values(logits, labels, **kwargs):
    got = logps(logits, labels, outputs=OUTPUTS, **kwargs)
    plain = logps_ref(logits, labels, outputs=OUTPUTS, **kwargs)
    truth = logps_ref(logits.double(), labels, outputs=OUTPUTS, **kwargs)
    for name in OUTPUTS:
        triple = (getattr(o, name) for o in (got, plain, truth))
        assert_as_accurate(name, *triple)


def check_gradients(logits, labels, **kwargs):
    for outputs in (("logps",), ("logps", "entropy"), DIFFERENTIABLE):
        got, plain, truth = (
            gradient(f, x, labels, outputs=outputs, **kwargs)
            for f, x in ((logps, logits), (logps_ref, logits), (logps_ref, logits.double()))
        )
        assert got.dtype == logits.dtype
        assert_as_accurate(f"gradient of {outputs}", got, plain, truth, factor=3.0)


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


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab", [1, 7, 33, 1003, 49152, 128256])
def test_gradient_in_the_same_pass(device, vocab, dtype, settings):
    """The longer rows are kept by clusters of 1 to 8 blocks."""
    num_rows = 2 if vocab > 1003 else 11
    base, labels = make(num_rows, vocab + 3, dtype, device)
    labels = labels % vocab
    labels[1] = -100
    for logits in (base[:, :vocab].contiguous(), base[:, 1 : vocab + 1]):
        for with_entropy in (False, True):
            upstream = {"logps": torch.randn(num_rows)}
            if with_entropy:
                upstream["entropy"] = torch.randn(num_rows)
            outputs = (*upstream, "lse") if with_entropy else ("logps",)
            want, plain = (
                gradient(logps_ref, x, labels, upstream, outputs=outputs, **settings)
                for x in (logits.double(), logits)
            )
            overwritten = base.clone()[:, :vocab] if logits.is_contiguous() else base.clone()
            rows = overwritten if logits.is_contiguous() else overwritten[:, 1 : vocab + 1]
            rows.copy_(logits)
            got = logps_with_grad_(
                rows,
                labels,
                upstream["logps"].to(device),
                grad_entropy=upstream["entropy"].to(device) if with_entropy else None,
                outputs=outputs,
                **settings,
            )
            truth = logps_ref(logits.double(), labels, outputs=outputs, **settings)
            torch_own = logps_ref(logits, labels, outputs=outputs, **settings)
            for name in outputs:
                triple = (getattr(o, name) for o in (got, torch_own, truth))
                assert_as_accurate(name, *triple)
            assert_as_accurate("gradient", rows, plain, want, factor=3.0)
            if not logits.is_contiguous():  # the neighbours of each row
                assert torch.equal(overwritten[:, 0], base[:, 0])
                assert torch.equal(overwritten[:, vocab + 1 :], base[:, vocab + 1 :])


def test_gradient_in_the_same_pass_with_repeated_labels(device):
    logits, _ = make(5, 300, torch.float32, device)
    labels = torch.tensor([[7, 7, -100, 299], [0, 1, 2, 3], [5, 5, 5, 5]], device=device)[
        [0, 1, 2, 1, 0]
    ]
    upstream = {"logps": torch.randn(5, 4)}
    want = gradient(logps_ref, logits.double(), labels, upstream)
    rows = logits.clone()
    got = logps_with_grad_(rows, labels, upstream["logps"].to(device))
    torch.testing.assert_close(got.logps, logps(logits, labels).logps)
    torch.testing.assert_close(rows.double(), want, rtol=1e-5, atol=1e-6)


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


def test_gradient_of_a_shifted_view_reaches_the_base(device):
    base = make(10, 40, torch.float32, device)[0].reshape(2, 5, 40).requires_grad_()
    labels = torch.randint(40, (2, 4), device=device)
    got, want = (
        torch.autograd.grad(f(base[:, :-1], labels).logps.sum(), base)[0]
        for f in (logps, logps_ref)
    )
    assert (got[:, -1] == 0).all()
    torch.testing.assert_close(got, want)


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
    labels = torch.tensor([[0, 1], [20, 0], [49, 0]], device=device)
    got = logps(logits, labels, outputs=("is_top1",)).is_top1
    assert got.tolist() == [[True, False], [True, False], [False, True]]


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


def test_empty_and_fully_ignored_batches_stay_connected(device):
    for logits in (torch.randn(0, 7, device=device), torch.randn(4, 7, device=device)):
        labels = torch.full((len(logits),), -100, device=device)
        logits.requires_grad_()
        out = logps(logits, labels, outputs=("logps", "lse"))
        assert out.logps.shape == (len(logits),) and out.logps.sum() == 0
        out.logps.sum().backward()
        assert logits.grad.shape == logits.shape and (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_inplace_backward_writes_the_same_gradient_over_the_logits(device, dtype):
    logits, labels = make(7, 1003, dtype, device)
    want = gradient(logps, logits, labels, outputs=("logps", "entropy"))
    hidden = logits.clone().requires_grad_()
    activation = hidden * 1.0
    out = logps(activation, labels, outputs=("logps", "entropy"), inplace_backward=True)
    upstream = upstream_for(out)
    loss = sum((getattr(out, n) * g.to(device)).sum() for n, g in upstream.items())
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.grad, want)
    assert torch.equal(activation, want), "the gradient lies where the logits were"
    with pytest.raises(RuntimeError, match="backward must run once"):
        loss.backward()


def test_inplace_backward_is_noticed_by_others_who_saved_the_logits(device):
    logits, labels = make(3, 50, torch.float32, device)
    activation = logits.requires_grad_() * 1.0
    square = (activation * activation).sum()  # saves the activation
    loss = logps(activation, labels, inplace_backward=True).logps.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_second_order_gradients_are_refused(device):
    logits, labels = make(3, 50, torch.float32, device)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(
        logps(logits, labels).logps.square().sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


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


BAD = {
    "labels must be int32 or int64": lambda x, y: logps(x, y.float()),
    "labels must have shape": lambda x, y: logps(x, y[:-1]),
    "labels must be on the logits' device": lambda x, y: logps(x, y.to("meta")),
    "grad_entropy must have shape": lambda x, y: logps_with_grad_(
        x, y, torch.ones(5), grad_entropy=torch.ones(5, device="meta")
    ),
    "temperatures must be constants": lambda x, y: logps(
        x, y, temperature=torch.ones(5, requires_grad=True)
    ),
    "logits must be float32": lambda x, y: logps(x.double(), y),
    "at least one entry": lambda x, y: logps(x[:, :0], y),
    "contiguous along the vocabulary": lambda x, y: logps(x.t(), torch.zeros(30).long()),
    "temperature must be positive": lambda x, y: logps(x, y, temperature=0.0),
    "temperatures must be one number or": lambda x, y: logps(x, y, temperature=torch.ones(3)),
    "top_k must be at least 1": lambda x, y: logps(x, y, top_k=0),
    "top_p must lie in": lambda x, y: logps(x, y, top_p=1.5),
    "mean_logit must not be asked": lambda x, y: logps(x, y, top_k=3, outputs=("mean_logit",)),
    "grad_logps must have shape": lambda x, y: logps_with_grad_(x, y, torch.ones(2)),
    "constants that do not overlap": lambda x, y: logps_with_grad_(
        x[:1].expand_as(x), y, torch.ones(y.shape)
    ),
    "softcap must be positive": lambda x, y: logps(x, y, softcap=-1.0),
    "logit_scale must be positive": lambda x, y: logps(x, y, logit_scale=float("inf")),
    "outputs must name some of": lambda x, y: logps(x, y, outputs=("logp",)),
    "1 to 512 labels per row": lambda x, y: logps(x, y[:, None].expand(-1, 513)),
    "logits must not overlap": lambda x, y: logps(x[:1].expand(5, -1), y, inplace_backward=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    logits, labels = make(5, 30, torch.float32, "cpu")
    with pytest.raises(ValueError, match="logps[a-z_]*: .*got .*;"):
        BAD[message](logits, labels)
    with pytest.raises(ValueError, match=message):
        BAD[message](logits, labels)


def test_label_out_of_range():
    logits, labels = make(5, 30, torch.float32, "cpu")
    for bad in (30, -1):
        labels[3] = bad
        with pytest.raises(ValueError, match=rf"\[0, 30\).* got {bad} in row 3"):
            logps(logits, labels)


def test_temperature_tensor_must_be_positive():
    logits, labels = make(5, 30, torch.float32, "cpu")
    temperature = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    for bad in (0.0, -1.0, torch.nan):
        temperature[2] = bad
        with pytest.raises(ValueError, match="temperatures must be positive, got .* in row 2"):
            logps(logits, labels, temperature=temperature)


def test_label_out_of_range_is_safe_on_cuda_and_found_in_debug_mode(device, request, monkeypatch):
    if "cpu" in request.node.callspec.id:
        pytest.skip("the CPU always checks")
    logits, labels = make(5, 30, torch.float32, device)
    labels[3] = 30
    assert logps(logits, labels).logps[3] == 0.0
    with pytest.raises(ValueError, match="labels must lie in"):
        check_values_of(logits, labels, None, -100)  # what the debug switch calls
    if device == "cuda":
        monkeypatch.setenv("RLHF_FAST_DEBUG", "1")
        with pytest.raises(ValueError, match="labels must lie in"):
            logps(logits, labels)


@pytest.mark.parametrize("body", ["portable", "avx2", "avx512"])
def test_the_bodies_for_older_processors(body):
    """Same checks, in a process that may not use the newer instructions."""
    script = (
        "import torch; from tests.ops import test_logps as t\n"
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
