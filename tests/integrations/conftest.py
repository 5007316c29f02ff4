"""Comparisons with a framework are collected where it is installed."""

from importlib.util import find_spec

import pytest

from rlhf_fast.integrations import ACTIVE
from tests.integrations.standins import OPENRLHF_IMPORTS, stub_missing

FRAMEWORKS = ("trl", "openrlhf", "verl", "llamafactory", "liger_kernel")
collect_ignore_glob = [f"test_{name}_*.py" for name in FRAMEWORKS if find_spec(name) is None]

if find_spec("openrlhf") is not None:
    stub_missing(OPENRLHF_IMPORTS)
if find_spec("llamafactory") is not None:  # reads sound files only
    stub_missing({"torchaudio": ()})


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    left = list(ACTIVE.values())
    for handle in left:
        handle.undo()
