"""vLLM inside the trainer's process: environment, defaults by platform, and what must be undone."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rlhf_fast.errors import UserError

_ENVIRONMENT = {
    # The engine in this process: weights arrive from memory and starting takes seconds.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # Binding would pin the trainer's threads too: they live in the same process.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# The engine's own default, 0.92, leaves no memory to the trainer beside it.
_CPU_OPTIONS = {
    "gpu_memory_utilization": 0.4,
    "enforce_eager": True,
    # A seeded request whose prompt is split over two steps rewinds its generator, which torch
    # does not offer on a CPU: generation dies with "CPU Generator does not use offset".
    "enable_chunked_prefill": False,
}
_GPU_OPTIONS = {"gpu_memory_utilization": 0.4}


def import_vllm() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"vllm: the package must be importable, got {error}; `pip install rlhf-fast[vllm]` "
            "on a GPU machine, `make quickstart GENERATOR=vllm` for the CPU build, "
            "or take the hf generator"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"vllm: the package must be importable, got {error}; if this names torchvision, "
            "`pip uninstall torchvision torchaudio torchcodec` (they were built for another torch)"
        ) from error
    return vllm


def platform_defaults() -> dict[str, Any]:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return _GPU_OPTIONS
    for name, value in _CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return _CPU_OPTIONS


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """Undo what the in-process engine does to its process.

    It reseeds all generators when it starts and draws from torch's global one at every step, so
    the trainer's randomness would depend on the generator; on a CPU it also replaces
    ``torch.set_num_threads`` by a function that does nothing.
    """
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    try:
        with torch.random.fork_rng(devices=_initialised_cuda_devices()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = threads


def _initialised_cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def process_group_exists() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
