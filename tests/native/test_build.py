"""What the build does where there is no CUDA compiler."""

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

    def run(**options: str) -> subprocess.CompletedProcess:
        defines = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_IGNORE_PATH": "/usr/local/bin;/usr/local/cuda/bin",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            **options,
        }
        hidden = {"CUDA_HOME", "CUDA_PATH", "CUDACXX"}
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        return subprocess.run(
            [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"]
            + [f"-D{name}={value}" for name, value in defines.items()],
            env={**env, "PATH": "/usr/bin:/bin"},
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
