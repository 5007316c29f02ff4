"""Hands the native modules to CMake; everything else is in pyproject.toml and CMakeLists.txt.

Environment: RLHF_FAST_CUDA=AUTO|ON|OFF, RLHF_FAST_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST,
RLHF_FAST_EMULATE=ON, MAX_JOBS, CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# With their defaults, so that an earlier build's choice does not linger in CMake's cache.
OPTIONS = {
    "RLHF_FAST_CUDA": "AUTO",
    "RLHF_FAST_CUDA_ARCHS": "",
    "RLHF_FAST_EMULATE": "OFF",
    "RLHF_FAST_STRICT": "OFF",
}


class CMakeBuild(build_ext):
    """Configures, builds and installs all modules at once, into the wheel or into the tree."""

    def run(self):
        import pybind11

        build = Path(self.build_temp).resolve()
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        defines = {
            "CMAKE_BUILD_TYPE": "Release",
            # Said anew each time: the one in pip's build environment lives for one build.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            **{name: os.environ.get(name) or default for name, default in OPTIONS.items()},
        }
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in defines.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", jobs])
        subprocess.check_call(
            ["cmake", "--install", str(build), "--prefix", str(prefix), "--strip"]
        )

    def get_outputs(self):
        return [str(p) for p in Path(self.build_lib, "rlhf_fast").glob("_*.so")]

    def get_source_files(self):
        return []


# One stand-in for all modules: it makes the wheel platform-specific and calls CMake.
setup(ext_modules=[Extension("rlhf_fast._cpu", [])], cmdclass={"build_ext": CMakeBuild})
