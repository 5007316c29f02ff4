"""Our kernels inside TRL, OpenRLHF, verl and LLaMA-Factory, with one line each.

from rlhf_fast.integrations import trl
handle = trl.patch()   # ... handle.undo(), or: with trl.patch(): ...
"""

from rlhf_fast.integrations.patching import ACTIVE, Handle, PatchRefused

__all__ = ["ACTIVE", "Handle", "PatchRefused"]
