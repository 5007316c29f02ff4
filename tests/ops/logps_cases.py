"""Rows of logits with labels, and how log-probs of them are judged."""

from __future__ import annotations

import torch

from rlhf_fast.ops import LogpsOutput, logps, logps_ref
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
