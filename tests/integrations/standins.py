"""Helpers of the integration tests: stand-ins for packages, and a tolerance.

The stand-ins have the names and signatures of the real packages, so that patching can always be
tested. What they compute is written plainly; that they look like the real ones is checked where
those are installed (tests marked `peers`).
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch

TRL_UTILS = """
import torch


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    logps = (logits / temperature).log_softmax(-1)
    logps = logps.gather(-1, index[..., None])[..., 0]
    return logps if row_mask is None else logps.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: torch.Tensor, chunk_size: int = 128) -> torch.Tensor:
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def selective_log_softmax_and_entropy(
    logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
):
    entropy = entropy_from_logits(logits / temperature)
    return selective_log_softmax(logits, index, temperature, row_mask), entropy


class _ChunkedLogProbFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):
        raise NotImplementedError


def _use_triton(device: torch.device) -> bool:
    return False


def fused_forward(hidden, weight, bias, targets, **settings):
    return _ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 32768, **settings)
"""
TRL_TRAINER = """
from trl.trainer.utils import selective_log_softmax


def loss(logits, index):
    return -selective_log_softmax(logits, index).mean()
"""
TRL_ONLINE_DPO = """
import torch


class OnlineDPOTrainer:
    def _forward(
        self, model, prompt_ids, prompt_mask, completion_ids, completion_mask, vision_inputs=None
    ):
        logits = model(torch.cat((prompt_ids, completion_ids), dim=1)).logits
        logits = logits[:, prompt_ids.size(1) - 1 : -1]
        return torch.take_along_dim(
            logits.log_softmax(dim=-1), completion_ids.unsqueeze(-1), dim=2
        ).squeeze(-1)
"""
TRL = {
    "trl/__init__.py": "",
    "trl/trainer/__init__.py": "",
    "trl/trainer/utils.py": TRL_UTILS,
    "trl/trainer/dpo_trainer.py": TRL_TRAINER,
    "trl/trainer/late_trainer.py": TRL_TRAINER,
    "trl/experimental/__init__.py": "",
    "trl/experimental/online_dpo/__init__.py": "",
    "trl/experimental/online_dpo/online_dpo_trainer.py": TRL_ONLINE_DPO,
}


def install(folder: Path, package: str, version: str, files: dict[str, str]) -> None:
    """Lays the package out as pip does, with the metadata that says its version."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    metadata = folder / f"{package}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def stub_missing(modules: dict[str, tuple[str, ...]]) -> None:
    """Empty modules for those not installed, so that what imports them at its top can be loaded."""
    for name, attributes in modules.items():
        top = name.partition(".")[0]
        if top in sys.modules or importlib.util.find_spec(top) is not None:
            if getattr(sys.modules.get(top), "__file__", "installed") is not None:
                continue
        stub = ModuleType(name)
        stub.__spec__, stub.__path__, stub.__file__ = ModuleSpec(name, None), [], None
        for attribute in attributes:
            setattr(stub, attribute, None)
        sys.modules[name] = stub


def assert_near(name, got, expected):
    """Sums in another order: what is near 0 beside large neighbours differs by their spacing."""
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(
        got, expected, rtol=1e-4, atol=1e-6 * scale, msg=lambda text: f"{name}: {text}"
    )
