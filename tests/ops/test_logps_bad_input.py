"""logps: what it refuses, and in which words."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops import logps, logps_with_grad_
from rlhf_fast.ops.logps_inputs import check_values as check_values_of
from tests.ops.logps_cases import (
    make,
)

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
