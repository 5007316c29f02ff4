"""What the CUDA sources must not do, so that every op can be captured in a CUDA graph."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for room in ("cuda", "bindings") for p in (ROOT / "csrc" / room).iterdir())

# Everything of the CUDA runtime that may be called: none of it allocates, copies or waits.
CAPTURABLE = {
    "cudaDeviceGetAttribute",
    "cudaFuncGetAttributes",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetErrorString",
    "cudaLaunchKernelEx",
    "cudaSetDevice",
}


def runtime_calls(text: str) -> set[str]:
    code = re.sub(r"//.*", "", text)
    return set(re.findall(r"\b(cu[a-z]*[A-Z]\w*)\s*(?:<[^>]*>)?\(", code))


def test_only_calls_that_a_graph_can_capture():
    assert runtime_calls("cudaStreamSynchronize(s);") == {"cudaStreamSynchronize"}
    found = {path.name: runtime_calls(path.read_text()) for path in SOURCES}
    assert "cudaLaunchKernelEx" in set().union(*found.values())
    for name, calls in found.items():
        assert calls <= CAPTURABLE, f"{name}: {sorted(calls - CAPTURABLE)}"


def test_launches_are_on_the_callers_stream():
    """No launch besides the one in launch.cuh, which passes the stream on."""
    for path in SOURCES:
        text = path.read_text()
        assert "<<<" not in text, path.name
        assert "cudaLaunchKernel" not in text or path.name == "launch.cuh", path.name
    assert re.search(
        r"config\.stream = .*target\.stream", (ROOT / "csrc/cuda/launch.cuh").read_text()
    )


def test_python_ops_read_no_value_back():
    """`.item()` and the like would make the host wait; only the debug switch may."""
    waits = re.compile(r"\.(item|tolist|cpu|numpy|nonzero)\(\)|synchronize\(")
    for stem in ("logps", "logps_kernels", "kl", "truncation"):
        text = (ROOT / f"rlhf_fast/ops/{stem}.py").read_text()
        assert not waits.search(text), stem
