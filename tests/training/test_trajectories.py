"""20 steps of loss and gradient norm: whatever the layout, split, processes or kernels, the same.

Truth is the textbook in float64. A trajectory may miss it by as much as the textbook in float32
(or under bf16 autocast) does: RMS error at most twice that for losses, three times for norms.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from rlhf_fast import ops
from tests.ops.conftest import assert_as_accurate
from tests.training.launched import LAUNCHERS, result_of
from tests.training.trajectories import BATCH, STEPS, TASKS, make, textbook, train

pytestmark = pytest.mark.parametrize("task", TASKS)
expected = functools.cache(textbook)


def assert_follows(task, rows, precision="fp32"):
    truth, plain = expected(task, "fp64"), expected(task, precision)
    assert len(rows) == len(truth) == STEPS
    assert truth[-1]["loss"] < 0.9 * truth[0]["loss"]  # something is learned on the way
    for name, factor in (("loss", 2.0), ("grad_norm", 3.0)):
        columns = (torch.tensor([r[name] for r in t]).double() for t in (rows, plain, truth))
        assert_as_accurate(f"{task} {name}", *columns, factor=factor)


LAYOUTS = {
    "padded": (False, {}),
    "packed": (False, {"row_tokens": 100}),
    "prefix_shared": (True, {}),
    "prefix_shared_and_packed": (True, {"row_tokens": 100}),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_packed_and_prefix_shared_rows(task, layout, precision):
    shares, options = LAYOUTS[layout]
    model = make(task, precision=precision, **options)
    if not shares:
        collate, model.shares_prompts = model.collate, False
        if options:  # rows of several trees, each of one response
            model.shares_prompts = True
            model.collate = lambda groups: collate([s for g in groups for s in g.split()])
    assert_follows(task, train(task, model), precision)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_accumulation(task, size):
    """8 x 1, 2 x 4 and 1 x 8 pairs."""
    model = make(task)
    collate, seen = model.collate, []
    model.micro_batches = lambda sizes: [p.tolist() for p in torch.arange(len(sizes)).split(size)]
    model.collate = lambda groups: seen.append(len(groups)) or collate(groups)
    rows = train(task, model)
    assert seen.count(size) >= STEPS * BATCH // size
    assert_follows(task, rows)


def test_fused_ops_and_their_references(task, monkeypatch):
    """The fused trajectory is every other test's; here the same trainer runs on plain PyTorch."""
    names = ("linear_logps", "linear_preference_loss", "segment_sum", "reward_model_loss")
    names += ("unpaired_preference_loss",)
    called = []
    for name in names:
        plain = getattr(ops, f"{name}_ref")

        def reference(*args, name=name, plain=plain, **options):
            called.append(name)
            return plain(*args, **options)

        monkeypatch.setattr(ops, name, reference)
    model = make(task)
    model.lean = contextlib.nullcontext
    model.model.set_attn_implementation("sdpa")
    rows = train(task, model)
    wanted = {
        "sft": "linear_logps",
        "dpo": "linear_preference_loss",
        "kto": "unpaired_preference_loss",
        "reward": "reward_model_loss",
    }
    assert called.count(wanted[task]) >= STEPS
    assert_follows(task, rows)


@pytest.fixture(scope="module", params=LAUNCHERS)
def two_processes(request, tmp_path_factory):
    """Rows of all tasks, trained by two processes over gloo, as replicas or under FSDP2."""
    return result_of(",".join(TASKS), tmp_path_factory.mktemp("two"), LAUNCHERS[request.param])


def test_two_processes(task, two_processes):
    assert_follows(task, two_processes[task]["rows"])
