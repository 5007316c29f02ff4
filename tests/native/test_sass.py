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
        of_logits = ("logps" in k.name or "kl_" in k.name) and "is_top1" not in k.name
        if not of_logits:  # only these rows are that long
            continue
        assert k.count(r"LDG.*\.128") >= 2, k.name
        stores = {"backward": 2, "with_grad": 1, "resident": 2}
        least = max(n if word in k.name else 0 for word, n in stores.items())
        assert k.count(r"STG.*\.128") >= least, k.name


TICKETED = ("policy_loss", "value_loss", "whiten_statistics", "token_preference_loss")


def test_no_global_atomics_but_one_ticket(kernels):
    """Sums come in a fixed order; a ticket only says which block ends last and adds them up."""
    for k in kernels:
        draws = any(word in k.name for word in TICKETED)
        assert k.count(r"ATOM|RED") - k.count(r"REDUX") == int(draws), k.name


def test_what_may_be_overwritten_is_not_read_as_constant(kernels):
    """Gradients may lie over the logits: the read-only cache would not see them change."""
    for k in kernels:
        assert k.count(r"LDG.*CONSTANT") == 0, k.name


def test_blocks_that_read_each_other_wait_for_each_other(kernels):
    """Once before they read, and once before any may write there again or end."""
    for k in kernels:
        in_clusters = "resident" in k.name or "with_grad" in k.name
        barriers = k.count("UCGABAR_ARV"), k.count("UCGABAR_WAIT")
        assert barriers[0] == barriers[1] and (barriers[0] >= 2) == in_clusters, k.name


def test_the_last_block_sees_what_the_others_have_written(kernels):
    """A fence of the whole GPU drops what the L1 cache holds, before the sums are read."""
    for k in kernels:
        if any(word in k.name for word in TICKETED):
            assert k.count("MEMBAR") == 2 and k.count("CCTL.IVALL") == 2, k.name
