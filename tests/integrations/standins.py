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

from tests.integrations import trl_generations

TRL_TRAINER = """
from trl.trainer.utils import selective_log_softmax


def loss(logits, index):
    return -selective_log_softmax(logits, index).mean()
"""
TRL = trl_generations.FILES["1.16.0"] | {
    "trl/trainer/dpo_trainer.py": TRL_TRAINER,
    "trl/trainer/late_trainer.py": TRL_TRAINER,
}
OPENRLHF_IMPORTS = {
    "deepspeed": (),
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
}
"""What it imports at the top of its modules: without a GPU these cannot be installed."""


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
