"""Idle threads sleep soon, and that is settled before torch loads."""

import subprocess
import sys

import pytest

from rlhf_fast.process import bound_spinning


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_the_users_choice_stands(before, after):
    bound_spinning(before)
    assert before == after


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("rlhf_fast.cli.main", ["sft", "--help"]), ("rlhf_fast.training.__main__", ["sft", "--help"])],
)
def test_it_comes_before_torch(module, arguments):
    code = f"""
import os, sys
os.environ.pop("OMP_WAIT_POLICY", None)
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch loads with", os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch())
from {module} import main
main({arguments})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch loads with" in done.stdout
    assert "torch loads with None" not in done.stdout, done.stdout
