"""Our kernels inside TRL, OpenRLHF, verl and LLaMA-Factory, with one line each.

    from rlhf_fast.integrations import trl
    handle = trl.patch()   # ... handle.undo(), or: with trl.patch(): ...

See docs/integrations.md.
"""

from importlib import import_module

from rlhf_fast.integrations.patching import ACTIVE, Handle, PatchRefused

FRAMEWORKS = ("trl", "openrlhf", "verl", "llamafactory")

__all__ = ["ACTIVE", "FRAMEWORKS", "Handle", "PatchRefused", "describe"]


def describe() -> list[str]:
    """One line per framework: its version, and what `patch()` replaces or has replaced in it."""
    modules = (import_module(f"{__name__}.{name}") for name in FRAMEWORKS)
    return [line for module in modules for line in module.FRAMEWORK.describe()]
