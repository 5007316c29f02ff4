"""Budgets for the compiled CUDA kernels, read from the machine code: no GPU needed."""

from __future__ import annotations

import pytest

from tests.native import sass

MAX_REGISTERS = 64  # four blocks of 512 threads need at most 32, two at most 64


@pytest.fixture(scope="module")
def kernels():
    env, module = sass.find_tools(), sass.find_module()
    if env is None or module is None:
        pytest.skip("needs a build with CUDA, cuobjdump and nvdisasm")
    found = sass.read(module, "sm_90", env)
    if not found:
        pytest.skip("the build holds no sm_90 code")
    return found


def test_no_kernel_uses_local_memory(kernels):
    for k in kernels:
        assert k.stack_bytes == 0 and k.count(r"LDL|STL") == 0, k.name


def test_registers(kernels):
    for k in kernels:
        assert k.registers <= MAX_REGISTERS, f"{k.name}: {k.registers}"


def test_rows_are_moved_16_bytes_at_a_time(kernels):
    for k in kernels:
        if "logps" not in k.name or "is_top1" in k.name:  # only rows of logits are that long
            continue
        assert k.count(r"LDG.*\.128") >= 2, k.name
        assert "backward" not in k.name or k.count(r"STG.*\.128") >= 2, k.name


def test_no_global_atomics(kernels):
    for k in kernels:
        assert k.count(r"ATOM|RED") == k.count(r"REDUX"), k.name
