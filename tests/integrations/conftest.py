"""Comparisons with a framework are collected where it is installed."""

from importlib.util import find_spec

import pytest

from rlhf_fast.integrations import ACTIVE

FRAMEWORKS = ("trl", "openrlhf", "verl", "llamafactory", "liger_kernel")
collect_ignore_glob = [f"test_{name}_*.py" for name in FRAMEWORKS if find_spec(name) is None]


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    left = list(ACTIVE.values())
    for handle in left:
        handle.undo()
