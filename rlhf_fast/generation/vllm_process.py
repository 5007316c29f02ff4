"""vLLM inside the trainer's process: environment, defaults by platform, and what must be undone."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.launch import several_processes
from rlhf_fast.models.checkpoint import load_text_config

logger = logging.getLogger(__name__)

_ENVIRONMENT = {
    # The engine in this process: weights arrive from memory and starting takes seconds.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Binding would pin the trainer's threads too: they live in the same process.
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_CPU_OPTIONS = {
    "enforce_eager": True,
    # A seeded request whose prompt is split over two steps rewinds its generator, which torch
    # does not offer on a CPU: generation dies with "CPU Generator does not use offset".
    "enable_chunked_prefill": False,
}
# The engine's own default, 0.92, leaves no memory to the trainer beside it.
_GPU_OPTIONS = {"gpu_memory_utilization": 0.4}
_BLOCK = 128
"""Tokens by which vLLM rounds up on a CPU."""
_CPU_SEQUENCES, _CPU_PROMPT_TOKENS = 64, 512
"""What the KV cache on a CPU is sized for: this many responses at a time, to prompts as long as
`max_model_len` lets them be, but at most this long."""


# One of several processes would lend the engine its process group, which is not the engine's.
_ENVIRONMENT_IN_A_LAUNCH = {
    **_ENVIRONMENT,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
}
_OF_A_LAUNCH = re.compile(
    r"(GROUP_|LOCAL_|ROLE_|)(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)
"""Variables by which a process knows the launch that it is one of."""


def import_vllm() -> Any:
    environment = _ENVIRONMENT_IN_A_LAUNCH if several_processes() else _ENVIRONMENT
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"vllm: the package must be importable, got {error}; `pip install rlhf-fast[vllm]` "
            "on a GPU machine, `make quickstart GENERATOR=vllm` for the CPU build, "
            "or use --generation.backend hf"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"vllm: the package must be importable, got {error}; if this names torchvision, "
            "`pip uninstall torchvision torchaudio torchcodec` (they were built for another torch)"
        ) from error
    return vllm


def platform_defaults(
    model_path: str, max_new_tokens: int, *, dtype: str, max_model_len: int | None = None
) -> dict[str, Any]:
    """Engine options for this platform; they hold unless the user's say otherwise."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return _GPU_OPTIONS
    for name, value in _CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It counts tokens above the sampled one, for nobody: not worth seconds of g++.
    current_platform.simple_compile_backend = "eager"
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return _CPU_OPTIONS
    itemsize = 4 if dtype == "float32" else 2
    size = kv_cache_bytes(
        model_path, max_new_tokens, itemsize=itemsize, max_model_len=max_model_len
    )
    return {**_CPU_OPTIONS, "kv_cache_memory_bytes": size}


def context_length(model_path: str, wanted: int | None) -> int | None:
    """`wanted`, or the model's own length where that is less."""
    declared = getattr(load_text_config(model_path), "max_position_embeddings", None)
    return min(wanted, declared) if wanted and declared else wanted


def kv_cache_bytes(
    model_path: str, max_new_tokens: int, *, itemsize: int, max_model_len: int | None = None
) -> int:
    """Keys and values of 64 responses with their prompts, and at least of one of the longest.

    In blocks of 128 tokens, as vLLM keeps them. Bounded by a quarter of the memory that is free.
    """
    import psutil  # comes with vLLM

    config = load_text_config(model_path)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * itemsize
    longest = max_model_len or config.max_position_embeddings
    each = min(max_new_tokens + _CPU_PROMPT_TOKENS, longest)
    tokens = _CPU_SEQUENCES * _BLOCK * -(-each // _BLOCK)
    wanted = per_token * max(tokens, longest + _BLOCK)
    size = min(wanted, psutil.virtual_memory().available // 4)
    logger.info(
        "vLLM: %.2f GiB of KV cache, %d tokens; VLLM_CPU_KVCACHE_SPACE (GiB) changes that",
        size / 2**30,
        size // per_token,
    )
    return size


@contextlib.contextmanager
def apart_from_launch() -> Iterator[None]:
    """Processes that are started inside know nothing of this launch and see this one's GPU."""
    changed: dict[str, str | None] = {}
    if several_processes():
        changed = {
            name: os.environ.pop(name) for name in [*filter(_OF_A_LAUNCH.fullmatch, os.environ)]
        }
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            number = torch.cuda.current_device()
            changed["CUDA_VISIBLE_DEVICES"] = visible
            os.environ["CUDA_VISIBLE_DEVICES"] = (
                visible.split(",")[number] if visible else str(number)
            )
    try:
        yield
    finally:
        for name, value in changed.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """Undo what the in-process engine does to its process.

    It reseeds all generators when it starts and draws from torch's global one at every step, so
    the trainer's randomness would depend on the generator; on a CPU it also replaces
    ``torch.set_num_threads`` by a function that does nothing, after it has set one thread where
    the environment has no OMP_NUM_THREADS.
    """
    num_threads = torch.get_num_threads()
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    try:
        with torch.random.fork_rng(devices=_initialised_cuda_devices()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = threads
        torch.set_num_threads(num_threads)


def _initialised_cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def process_group_exists() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
