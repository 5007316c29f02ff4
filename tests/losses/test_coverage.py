"""Every loss has a hand-computed example, a twin in plain PyTorch and a source."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from rlhf_fast import losses, ops
from rlhf_fast.ops.native import GROUP_ESTIMATORS
from rlhf_fast.ops.policy_params import LOSS_TYPES
from tests.ops import (
    test_group_advantages,
    test_list_loss,
    test_policy_loss,
    test_preference_loss,
    test_reward_model_loss,
)

ROOT = Path(__file__).parents[2]
TABLES = {
    "preference": (ops.PREFERENCE_LOSSES, test_preference_loss.BY_HAND),
    "policy": (LOSS_TYPES, test_policy_loss.HAND),
    "list": (ops.LIST_LOSSES, test_list_loss.BY_HAND),
    "regression": (ops.REWARD_LOSSES, test_reward_model_loss.BY_HAND),
    "group advantage": (GROUP_ESTIMATORS, test_group_advantages.BY_HAND),
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_name_has_a_hand_computed_value(kind):
    names, by_hand = TABLES[kind]
    assert set(by_hand) == set(names)


FUNCTIONS = [name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))]


def used_by_hand() -> set[str]:
    """What tests beside this one call that compare with numbers written out."""
    used = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and re.search("by_hand|hand_computed", node.name):
                used |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return used


def test_every_function_of_losses_has_a_hand_computed_value():
    assert set(FUNCTIONS) <= used_by_hand()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_of_losses_names_its_source(name):
    assert re.search(r"arXiv \d{4}\.\d{5}", getattr(losses, name).__doc__)


OPS = [
    *("gae", "group_advantages", "kl", "linear_logps", "linear_policy_loss"),
    *("linear_preference_loss", "list_loss", "logps", "policy_loss", "preference_loss"),
    *("reward_model_loss", "reward_regression_loss", "segment_sum", "unpaired_preference_loss"),
    *("value_loss", "whiten"),
]


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_twin_in_plain_pytorch(name):
    twin = getattr(ops, f"{name}_ref")
    assert "native" not in inspect.getsource(twin)


def structs(header: str, rows: str) -> dict[str, str]:
    """The formulas that a table of csrc/include names, with the comment above each."""
    text = (ROOT / "csrc/math" / header).read_text()
    table = (ROOT / "csrc/include/rlhf_fast" / rows).read_text()
    names = set(re.findall(r"^ +X\(\w+, ([A-Z]\w+)[,)]", table, re.M))
    found = {}
    for name in names:
        above = re.search(rf"((?:^//.*\n)+)(?:template.*\n)?struct {name}\b", text, re.M)
        assert above, f"csrc/math/{header} says nothing of {name}"
        found[name] = above.group(1)
    return found


# Plain definitions, which have no paper of their own.
ELEMENTARY = {"Sft", "Huber", "Binary", "PairwiseLogistic"}


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("preference.h", "preference_loss.h"),
        ("policy.h", "policy_loss.h"),
        ("lists.h", "list_loss.h"),
        ("regression.h", "reward_model_loss.h"),
    ],
)
def test_every_formula_names_its_source(header, rows):
    found = structs(header, rows)
    assert found
    for name, comment in found.items():
        if name not in ELEMENTARY:
            assert re.search(r"arXiv\s+(//\s*)?\d{4}\.\d{5}", comment), f"{name}: {comment}"
