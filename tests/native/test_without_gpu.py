"""The CUDA module on a machine without a GPU: it can be imported, and says why nothing runs."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.cli import environment
from rlhf_fast.ops import native

cuda = pytest.importorskip("rlhf_fast._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("op", [ops.gae, ops.whiten])
def test_ops_say_why_they_cannot_run(op, monkeypatch):
    monkeypatch.setattr(native, "target", lambda tensor: (cuda, 0, 0))
    monkeypatch.setattr(native, "ticket", lambda tensor: torch.zeros((), dtype=torch.int32))
    with pytest.raises(RuntimeError, match="a CUDA kernel must start, got CUDA error .*; update"):
        op(torch.randn(2, 3))


def test_env_says_that_they_are_built():
    assert environment.cuda_kernels() == "built; no GPU to run on"
