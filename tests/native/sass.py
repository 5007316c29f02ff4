"""What the compiler made of each CUDA kernel: registers, stack, shared memory, memory instructions.

`python -m tests.native.sass` prints a table; tests/native/test_sass.py holds the budgets. Reads the
built module with cuobjdump and nvdisasm, from the CUDA toolkit or from the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "rlhf_fast"


@dataclass
class Kernel:
    name: str
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    instructions: Counter = field(default_factory=Counter)

    def count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))


def find_tools() -> dict[str, str] | None:
    """An environment in which cuobjdump runs and finds nvdisasm, or None."""
    folders = [str(p) for p in Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    if not all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")):
        return None
    return {**os.environ, "PATH": path}


def find_module() -> Path | None:
    return next(PACKAGE.glob("_cuda.*.so"), None)


def read(module: Path, arch: str, env: dict[str, str]) -> list[Kernel]:
    def dump(option: str) -> str:
        command = [shutil.which("cuobjdump", path=env["PATH"]), "-arch", arch, option, str(module)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    kernels: dict[str, Kernel] = {}
    for symbol, usage in re.findall(r"Function (\S+):\s*\n\s*(REG:\d+.*)", dump("-res-usage")):
        use = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        kernels[symbol] = Kernel(symbol, use["REG"], use["STACK"], use["SHARED"])
    current = None
    for line in dump("-sass").splitlines():
        if found := re.search(r"Function : (\S+)", line):
            current = kernels[found[1]]
        elif current and (
            found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
        ):
            current.instructions[found[1]] += 1
    names = subprocess.run(["c++filt", *kernels], capture_output=True, text=True, check=True)
    for kernel, name in zip(kernels.values(), names.stdout.splitlines()):
        name = name.split("(rlhf_fast")[0].replace("rlhf_fast::gpu::", "")
        kernel.name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return sorted(kernels.values(), key=lambda k: k.name)


def main() -> None:
    env, module = find_tools(), find_module()
    if env is None or module is None:
        raise SystemExit("needs a build with CUDA, cuobjdump and nvdisasm")
    print(f"{'kernel':58} regs stack shared instr LDG.128 LDG STG.128 STG local MUFU")
    for k in read(module, "sm_90", env):
        counts = (
            k.count(r"LDG.*\.128"),
            k.count(r"LDG(?!.*\.128)"),
            k.count(r"STG.*\.128"),
            k.count(r"STG(?!.*\.128)"),
            k.count(r"LDL|STL"),
            k.count("MUFU"),
        )
        row = (k.registers, k.stack_bytes, k.shared_bytes, sum(k.instructions.values()), *counts)
        print(f"{k.name:58}" + " ".join(f"{n:5d}" for n in row))


if __name__ == "__main__":
    main()
