"""The `rlhf-fast` command."""

from rlhf_fast.cli.main import main

__all__ = ["main"]
