"""What the build does where there is no CUDA compiler, and for which GPUs it compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pybind11 = pytest.importorskip("pybind11")


@pytest.fixture
def configure(tmp_path):
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if not cmake or not ninja:
        pytest.skip("needs cmake and ninja")
    if Path("/usr/bin/nvcc").exists():
        pytest.skip("nvcc cannot be hidden here")

    def run(environment=None, **options: str) -> subprocess.CompletedProcess:
        defines = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_IGNORE_PATH": "/usr/local/bin;/usr/local/cuda/bin",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            **options,
        }
        hidden = {"CUDA_HOME", "CUDA_PATH", "CUDACXX", "TORCH_CUDA_ARCH_LIST"}
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        return subprocess.run(
            [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"]
            + [f"-D{name}={value}" for name, value in defines.items()],
            env={**env, "PATH": "/usr/bin:/bin", **(environment or {})},
            capture_output=True,
            text=True,
        )

    return run


def test_without_nvcc_the_cpu_kernels_are_built_and_it_is_said(configure):
    done = configure()
    assert done.returncode == 0, done.stderr
    assert "no nvcc in CUDACXX, CUDA_HOME, PATH" in done.stdout
    assert "building the CPU kernels only" in done.stdout


def test_cuda_kernels_that_were_asked_for_are_not_left_out(configure):
    done = configure(RLHF_FAST_CUDA="ON")
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "RLHF_FAST_CUDA=ON needs nvcc, got none" in said and "install the CUDA toolkit" in said


def test_the_list_that_torch_extensions_go_by_is_kept(configure):
    """As far as it goes without a compiler, which is asked for its version next."""
    environment = {"CUDACXX": "/absent/nvcc", "TORCH_CUDA_ARCH_LIST": "8.0 9.0a;native 12.0+PTX"}
    done = configure(environment)
    want = "TORCH_CUDA_ARCH_LIST asks for CUDA architectures 80-real;90a-real;native;120\n"
    assert want in done.stdout
    assert "/absent/nvcc" in done.stderr


def test_our_own_list_comes_first(configure):
    environment = {"CUDACXX": "/absent/nvcc", "TORCH_CUDA_ARCH_LIST": "Hopper"}
    done = configure(environment, RLHF_FAST_CUDA_ARCHS="90-real")
    assert "/absent/nvcc" in done.stderr and "Hopper" not in done.stdout + done.stderr


def test_what_the_list_cannot_mean_is_named(configure):
    done = configure({"CUDACXX": "/absent/nvcc", "TORCH_CUDA_ARCH_LIST": "8.0;Hopper"})
    assert done.returncode != 0
    assert "8.0;9.0+PTX, or native, got Hopper; write numbers" in " ".join(done.stderr.split())
