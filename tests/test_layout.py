"""The rooms of the package and who may import whom. A rule broken here is a design decision."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_fast"

# room -> rooms it may import, besides itself and the shared modules
ALLOWED = {
    "ops": set(),
    "losses": {"ops"},
    "models": {"ops"},
    "rows": set(),
    "fields": set(),
    "data": {"rows", "fields"},
    "rewards": {"ops", "models"},
    "generation": {"ops", "models"},
    "training": {"ops", "losses", "models", "data", "rows"},
    "online": {"ops", "losses", "models", "rows", "data", "rewards", "generation", "training"},
    "integrations": {"ops", "losses", "models", "training"},
    "cli": {"ops", "online", "recipes", "integrations"},
    "recipes": {"online", "training", "rewards", "generation", "rows"},
}
# plain records, exceptions and helpers that know nothing of the rooms
SHARED = set("types errors io plugins seeds process launch memory timing endpoint hub".split())
LEAVES = {"integrations": {"cli"}, "cli": set()}  # and who may import them
COMPILED = {"_cpu", "_cuda", "_emulated"}  # imported by ops.native alone


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Absolute names imported from this package, e.g. ("ops", "native")."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {tuple(n.split(".")[1:]) for n in names if n.split(".")[0] == "rlhf_fast"}
    return {name for name in found if name}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_rooms(path):
    room = room_of(path)
    if room in ("__init__", *SHARED):
        allowed = SHARED
    else:
        assert room in ALLOWED, f"no room is called {room}: say in tests/test_layout.py what it is"
        allowed = ALLOWED[room] | SHARED | {room}
    for name in imports_of(path):
        if name[0] in COMPILED:
            assert path == PACKAGE / "ops" / "native.py", f"{path} reaches past ops.native"
        elif name[0] != "__version__":
            assert name[0] in allowed, f"{room} may not import {name[0]} ({path})"


def test_leaves_are_imported_by_hardly_anybody():
    for path in modules():
        for name in imports_of(path):
            users = LEAVES.get(name[0], {room_of(path)}) | {name[0]}
            assert room_of(path) in users, f"{path} imports {name[0]}"


def test_losses_and_rewards_know_no_engine_and_no_tokenizer():
    for room, forbidden in {
        "ops": {"transformers", "vllm", "trl"},
        "losses": {"transformers", "vllm", "trl"},
        "online": {"vllm"},
    }.items():
        for path in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                assert not {n.split(".")[0] for n in names} & forbidden, path


def test_a_stem_is_one_name_in_every_room():
    root = PACKAGE.parent
    for source in (root / "csrc" / "include" / "rlhf_fast").glob("*.h"):
        stem = source.stem
        if stem == "common":
            continue
        for path in (
            f"csrc/cpu/{stem}.cpp",
            f"csrc/cuda/{stem}.cu",
            f"csrc/bindings/{stem}.cpp",
            f"rlhf_fast/ops/{stem}.py",
            f"tests/ops/test_{stem}.py",
        ):
            assert (root / path).exists(), f"the stem {stem} lacks {path}"


# torch's products around the row kernels of other ops
OPS_WITHOUT_KERNELS = {"linear_logps", "linear_policy_loss", "linear_preference_loss"}


@pytest.mark.parametrize("stem", sorted(OPS_WITHOUT_KERNELS))
def test_an_op_without_kernels_has_its_rooms(stem):
    root = PACKAGE.parent
    for path in (f"rlhf_fast/ops/{stem}.py", f"tests/ops/test_{stem}.py"):
        assert (root / path).exists(), f"{stem} lacks {path}"
    assert f"{stem}.h" not in {p.name for p in (root / "csrc/include/rlhf_fast").iterdir()}


def test_only_the_portable_header_names_the_gpu():
    """PTX and vendor headers stay in one file, or the kernels could not run without a GPU."""
    for path in (PACKAGE.parent / "csrc" / "cuda").iterdir():
        text = path.read_text()
        if path.name == "portable.cuh":
            continue
        for word in ("asm(", "asm volatile", "<<<", "cuda_bf16.h", "cooperative_groups", "cub/"):
            assert word not in text, f"{path} contains {word}"
