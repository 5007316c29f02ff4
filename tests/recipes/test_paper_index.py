"""docs/paper_index.md against the package: everything that a row names must exist."""

import dataclasses
import re
import types
import typing
from pathlib import Path

import pytest

from rlhf_fast import losses, ops
from rlhf_fast.losses import reward_model
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.merging import MergeConfig
from rlhf_fast.online.stages import STAGES
from rlhf_fast.recipes import METHODS, RECIPES
from rlhf_fast.training.__main__ import KINDS

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "paper_index.md").read_text().split("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| id ")
]
FIRST = (
    *(172, 64, 27, 135, 122, 188, 46, 26, 31, 84, 173, 102, 25, 130, 9, 73),  # losses
    *(89, 57, 104, 170, 124),  # references and merging
    *(126, 55, 77, 54, 171, 118, 68, 8, 74, 96),  # selectors, samplers, advantages, shaping
    *(40, 13, 61, 49, 4, 157, 81, 152, 183, 39, 178, 33, 65, 142, 163),  # reward models
)
"""Numbers of the methods that must be there, as recipes or configurations, with a test."""


def test_every_row_has_four_cells():
    assert len(ROWS) > 60
    assert [row for row in ROWS if len(row) != 4] == []


@pytest.mark.parametrize("number", FIRST)
def test_a_method_that_must_be_there_is_selected_by_a_setting(number):
    rows = [row for row in ROWS if row[0] == str(number)]
    assert any("tests/" in row[3] for row in rows)
    assert any(
        code.startswith(("--method", "--recipe", "rlhf-fast ")) or is_setting(code.split(":")[0])
        for row in rows
        for code in codes(row)
    ), f"{number} is no named method, recipe, command or setting"


def codes(row):
    return re.findall(r"`([^`]+)`", row[2])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:40])
def test_what_a_row_names_exists(row):
    paths = re.findall(r"tests/[\w/]+(?:\.py)?", row[3])
    assert paths and all((ROOT / path).exists() for path in paths)
    for code in codes(row):
        assert exists(code), code


def exists(code: str) -> bool:
    if code in ARGUMENTS:
        return True
    if found := re.fullmatch(r"--method ([\w+-]+)", code):
        return found[1] in METHODS
    if found := re.fullmatch(r"--recipe ([\w-]+)", code):
        return found[1] in RECIPES
    if found := re.match(r"rlhf-fast merge --merge\.method (\w+)", code):
        return found[1] in typing.get_args(typing.get_type_hints(MergeConfig)["method"])
    if code.startswith("rlhf-fast merge "):
        return all(
            name in {f.name for f in dataclasses.fields(MergeConfig)}
            for name in re.findall(r"--merge\.(\w+)", code)
        )
    if found := re.fullmatch(r"rlhf-fast (\w+) --(\w+)", code):
        return found[2] in {f.name for f in dataclasses.fields(STAGES[found[1]])}
    if found := re.fullmatch(r"python -m rlhf_fast.training (\w+)", code):
        return found[1] in KINDS
    if found := re.fullmatch(r'"(\w+)"', code):
        return found[1] in ops.PREFERENCE_LOSSES
    if is_setting(code.split(":")[0].removesuffix(".*")):
        return True
    name = re.match(r"(?:losses\.)?(\w+)", code)[1]
    return any(hasattr(module, name) for module in (ops, losses, reward_model))


ARGUMENTS = {"dare", "loss_type", "estimator", "best_worst", "resample", '"reinforce"'} | {
    *('loss_type="ppo"', 'loss_type="remax"', 'loss_type="reinforce++"', 'loss_type="a_lol"'),
    *('f_divergence="alpha_divergence"', "segments: sentences", "per_token: true", "margin"),
}
"""Values and arguments that follow a name in their row."""


def is_setting(path: str) -> bool:
    """Whether `a.b.c` leads to a field of the run's configuration."""
    kinds = [OnlineConfig]
    for name in path.split("."):
        hints = {}
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                hints |= typing.get_type_hints(kind)
        if name not in hints:
            return False
        kinds = list(classes_in(hints[name]))
    return True


def classes_in(hint):
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        yield hint
    for inner in typing.get_args(hint):
        yield from classes_in(inner)
