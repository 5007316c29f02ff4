"""The online RLHF workflow with fused C++ and CUDA kernels.

    ops           kernels and their autograd: logps, linear_logps, preference_loss, gae, ...
    losses        losses built from them: dpo_loss, kto_loss, inpo_loss, ...
    integrations  the kernels under TRL, OpenRLHF, verl, LLaMA-Factory: integrations.trl.patch()
    training      SFT, reward models, DPO and policy gradients, files in, model out: training.runs
    online        the whole workflow: online.workflow.run_online

What `ops` and `losses` offer can be had from here too: `rlhf_fast.logps` is `rlhf_fast.ops.logps`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_LAZY = ("ops", "losses")  # they import torch, which `rlhf-fast --help` need not wait for


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    if not name.startswith("_"):
        for module in map(__getattr__, _LAZY):
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    public = (name for module in map(__getattr__, _LAZY) for name in module.__all__)
    return sorted({*globals(), *_LAZY, *public})
