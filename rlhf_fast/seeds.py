"""Seeds derived from names, so a stage draws the same numbers whatever ran before it."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for a named use, e.g. `derive_seed(0, "iteration", 2, "generate")`."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
