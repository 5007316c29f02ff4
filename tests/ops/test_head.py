"""What the fused heads share: how logits are cut, that both cuts agree, what memory they take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rlhf_fast.ops import linear_logps, linear_policy_loss, linear_preference_loss
from rlhf_fast.ops.head import FEWEST_ROWS, Head, rows_per_chunk
from rlhf_fast.ops.head_columns import slices
from rlhf_fast.ops.head_inputs import HeadSettings, prepare
from rlhf_fast.ops.logps_ref import OUTPUTS
from tests.ops.heads import Allocations, make
from tests.ops.test_linear_logps import DTYPES, FROZEN, check


def head_of(problem):
    p = problem
    rows = prepare("test", p.hidden, p.weight, p.labels, p.bias, p.mask, HeadSettings())
    args = rows.labels, rows.row_temperatures, rows.scalars, 0, rows.logits_dtype
    return Head.in_dtype_of_hidden(rows.hidden, rows.weight, rows.bias, *args)


def test_chunks_are_even_and_small():
    for on_cuda in (False, True):
        for num_rows in (0, 1, 127, 129, 2048, 8192, 100_000):
            rows = rows_per_chunk(num_rows, 98304, on_cuda)
            assert 1 <= rows <= 4096
            num_chunks = -(-num_rows // rows)
            assert num_chunks * rows - num_rows < max(num_chunks, 1) * 16
    assert rows_per_chunk(2048, 196608, False, 2048 * 196608) == 512
    assert rows_per_chunk(2048, 196608, False, 2048 * 196608, whole=True) == 2048
    assert rows_per_chunk(8192, 256512, True) == 4096
    assert rows_per_chunk(10**6, 1048576, True) * 1048576 <= 2 << 30


def test_chunks_without_a_budget_are_a_sixteenth():
    sizes = {n: rows_per_chunk(n, 98304, False) for n in (1024, 2048, 8192, 10_000)}
    assert sizes == {1024: 64, 2048: 128, 8192: 512, 10_000: 512}
    # A float32 sum as large as 800 rows is avoided by larger chunks, but not by ones larger still.
    assert [rows_per_chunk(n, 98304, False, sum_rows=800) for n in (10_000, 40_000)] == [640, 512]


def test_chunks_hold_a_unit_if_they_can():
    budget = 400 * 196608
    sizes = [rows_per_chunk(1000, 196608, False, budget, unit=n) for n in (1, 390, 401)]
    assert sizes == [336, 400, 336]


def test_slices_cover_the_vocabulary_once():
    for num_rows, vocab in ((1, 63), (300, 333), (9000, 5000)):
        head = head_of(make(num_rows, vocab, width=3))
        found, labelled, size = [], 0, 0
        for piece in slices(head):
            found += range(*piece.columns.indices(vocab))
            labelled += (~piece.is_elsewhere).sum().item()
            size = max(size, piece.buffer.numel())
        assert found == list(range(vocab)) and labelled == num_rows
        assert size <= max(num_rows * vocab // 20, 64 * num_rows)


def test_rows_are_cut_where_chunks_are_large_enough(monkeypatch):
    head = head_of(make(40, 5000))
    assert head.takes_columns() and head.takes_columns(39) and not head.takes_columns(40)
    large = head_of(make(1000, 333))
    assert large.takes_columns(FEWEST_ROWS - 1) and not large.takes_columns(FEWEST_ROWS)
    assert large.takes_columns(FEWEST_ROWS, num_products=2)
    monkeypatch.setattr("rlhf_fast.ops.head.SMALL_BYTES", large.num_rows * large.row_bytes)
    assert not large.takes_columns()


@pytest.mark.parametrize("budget", [0, 70_000], ids=["none", "part"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_by_rows_as_on_a_gpu(frozen, dtype, budget, monkeypatch):
    monkeypatch.setattr(Head, "takes_columns", lambda *args, **options: False)
    problem = make(dtype=dtype, masked=True, bias=True, frozen=frozen)
    check(problem, budget, ("entropy", "logps", "lse"))


SETTINGS = [{}, {"temperature": 0.7, "logit_scale": 1.5, "softcap": 5.0}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "softcap"])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trainable", "frozen_head"])
def test_every_output_by_columns(hardware, frozen, settings):
    check(make(bias=True, frozen=frozen, device=hardware), outputs=OUTPUTS, **settings)
    if settings:
        return
    rows = torch.linspace(0.5, 2.0, 300, device=hardware)
    check(make(frozen=frozen, device=hardware), outputs=OUTPUTS, temperature=rows)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trainable", "frozen_head"])
def test_words_that_cannot_occur(hardware, frozen):
    """Whole slices of logits are -inf."""
    problem = make(bias=True, frozen=frozen, device=hardware)
    problem.bias[60:270] = -torch.inf
    problem.labels = torch.where(problem.labels < 270, problem.labels % 60, problem.labels)
    check(problem, outputs=OUTPUTS)
    with torch.no_grad():
        none = linear_logps(
            problem.hidden, problem.weight, problem.labels.fill_(100), bias=problem.bias
        )
    assert (none.logps == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["trainable", "frozen_head"])
def test_almost_certain_labels(hardware, frozen, dtype):
    """Gradients are small differences of large numbers there."""
    problem = make(width=64, dtype=dtype, frozen=frozen, device=hardware)
    norms = problem.weight.float().square().sum(1)[problem.labels]
    closeness = torch.linspace(4, 18, 300, device=hardware)[:, None] / norms[:, None]
    problem.hidden = (problem.weight[problem.labels].float() * closeness).to(dtype)
    check(problem)


def test_a_nan_stays_in_its_row():
    problem = make()
    problem.hidden[7, 3] = torch.nan
    for frozen in ((), ("weight",)):
        problem.frozen = frozen
        leaves = problem.leaves()
        found = linear_logps(leaves.hidden, leaves.weight, leaves.labels, logits_budget_bytes=0)
        assert found.logps.isnan().nonzero().flatten().tolist() == [7]
        found.logps.sum().backward()
        assert leaves.hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [7]


def losses(num_rows, hidden, weight, labels):
    """A tenth of a batch's rows, or all, through each of the heads without a budget."""
    h, y, budget = hidden[:num_rows], labels[:num_rows], {"logits_budget_bytes": 0}
    yield "logps", lambda: linear_logps(h, weight, y, **budget).logps.sum()
    short = h.view(-1, 8, h.shape[1]), weight, y.view(-1, 8), None
    advantages = torch.linspace(-1, 1, num_rows // 8)
    yield "policy_loss", lambda: linear_policy_loss(*short, advantages, **budget).loss
    zeros, starts = torch.zeros(1), torch.arange(3) * (num_rows // 2)
    pairs = h, weight, y, starts, zeros, zeros
    yield "preference_loss", lambda: linear_preference_loss(*pairs, **budget).loss


HEADS = {"trainable": True, "frozen": False}
LOSSES = ("logps", "policy_loss", "preference_loss")


def test_labels_may_lie_apart(device):
    hidden, weight = torch.randn(64, 4, device=device), torch.randn(9, 4, device=device)
    labels = torch.randint(9, (64, 3), device=device)[:, 1]
    starts, advantage = torch.arange(3, device=device) * 32, torch.ones(1, device=device)
    results = []
    for y in (labels, labels.contiguous()):
        h = hidden.requires_grad_()
        results.append(linear_logps(h, weight, y).logps)
        results.append(linear_policy_loss(h[None], weight, y[None], None, advantage).loss)
        results.append(linear_preference_loss(h, weight, y, starts, loss_type="cpo").loss)
    for apart, dense in zip(results[:3], results[3:]):
        assert torch.equal(apart, dense)
        grads = (torch.autograd.grad(x.sum(), hidden)[0] for x in (apart, dense))
        assert torch.equal(*grads)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("what", LOSSES)
def test_values_without_a_graph(what, mode):
    hidden, weight = torch.randn(160, 4), torch.randn(9, 4, requires_grad=True)
    loss = dict(losses(160, hidden, weight, torch.randint(9, (160,))))[what]
    with mode():
        got = loss()
    torch.testing.assert_close(got, loss().detach())


def run_one(what, head, dtype, num_rows, vocab, width):
    """Makes inputs; returns forward and backward, their inputs' gradients being there already.

    Logits are small: of a pair that is far apart the gradient is exactly 0, and nothing is done.
    """
    hidden = torch.randn(num_rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) / width).to(dtype).requires_grad_(HEADS[head])
    labels = torch.randint(vocab, (num_rows,))
    loss = dict(losses(num_rows, hidden, weight, labels))[what]

    def run():
        hidden.grad = weight.grad = None
        loss().backward()

    run()
    return run


@pytest.mark.parametrize("num_rows", [400, 1304])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("what", LOSSES)
def test_allocations_stay_below_a_tenth_of_the_logits(what, head, dtype, num_rows):
    """Beyond gradients. Few rows go by columns, many by rows where a loss permits."""
    vocab, width = 32000, 256
    run = run_one(what, head, dtype, num_rows, vocab, width)
    with Allocations() as allocations:
        run()
    gradients = (num_rows + HEADS[head] * vocab) * width
    assert 0.02 < (allocations.peak / dtype.itemsize - gradients) / (num_rows * vocab) < 0.1


MEMORY = """
import sys, torch
from benchmarks.harness import peak_extra_bytes
from tests.ops.test_head import run_one
what, head, dtype = *sys.argv[1:3], getattr(torch, sys.argv[3])
run = run_one(what, head, dtype, 8192, 20000, 16)
a, b, chunk = (torch.ones(shape, dtype=dtype) for shape in ((512, 16), (16, 20000), (512, 20000)))
def product():
    torch.mm(a, b, out=chunk)
product()
for peak in peak_extra_bytes(run), peak_extra_bytes(product):
    print(peak / (8192 * 20000 * dtype.itemsize))
"""


@pytest.mark.parametrize(
    "case",
    ["logps frozen float32", "policy_loss trainable bfloat16", "preference_loss trainable float32"],
)
def test_a_process_grows_by_less_than_a_tenth_of_the_logits(case):
    """With what the system's allocator takes, and the matrix products; but a processor without
    bfloat16 instructions makes a chunk's logits in float32 first, twice as much as they take."""
    command = [sys.executable, "-c", MEMORY, *case.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, product = map(float, done.stdout.split())
    assert 0.0 < total < 0.1 + (product if product > 0.1 else 0.0)
