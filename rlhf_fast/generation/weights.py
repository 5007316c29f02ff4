"""What the vLLM backends share: seeds of prompts, names and files of weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from rlhf_fast.models.checkpoint import load_text_config

_SHARD_BYTES = 2 << 30


def prompt_seed(seed: int, prompt_id: str) -> int:
    """62 bits, so that seeds of different prompts are never neighbours: vLLM gives response i
    of a group the seed + i."""
    digest = hashlib.sha256(json.dumps([seed, prompt_id]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def checkpoint_names(folder: Path) -> set[str]:
    """Names of all tensors in the folder's safetensors files."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def ties_embeddings(model_path: str) -> bool:
    """Whether the model's head is its word embedding, by its configuration and its defaults."""
    return bool(getattr(load_text_config(model_path), "tie_word_embeddings", False))


def save_shards(named: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Writes tensors to safetensors files of about 2 GiB."""
    from safetensors.torch import save_file

    shard: dict[str, Tensor] = {}
    size = num_shards = 0
    for name, tensor in named:
        shard[name] = tensor.cpu().contiguous().clone()
        size += tensor.nbytes
        if size >= _SHARD_BYTES:
            save_file(shard, folder / f"shard_{num_shards}.safetensors")
            shard, size, num_shards = {}, 0, num_shards + 1
    if shard:
        save_file(shard, folder / f"shard_{num_shards}.safetensors")
