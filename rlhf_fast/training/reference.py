"""Log-probabilities of the reference model, computed once per data set and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_file_atomic
from rlhf_fast.models.adapters import adapters_off, describe_adapters, has_adapters
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.engine import share_out

if TYPE_CHECKING:
    from accelerate import Accelerator


def reference_logps(
    reference: LanguageModel,
    groups: Sequence[TokenGroup],
    *,
    cache: Path | None = None,
    with_adapters: bool = False,
    accelerator: Accelerator | None = None,
) -> list[list[float]]:
    """Log-probability of every response under `reference`, by default without its adapters.

    Of a response's tokens those that are learned count. Groups with the same prompt share its
    computation. With `cache`, a directory, the result is
    kept there in a file named by the fingerprint of model and data, and read if it is there.
    """
    merged = _merge(groups)
    name = _fingerprint(reference, merged, with_adapters) if cache else ""
    path = cache / f"reference-{name}.safetensors" if cache else None
    rows = _read(path, merged) if path else None
    if not _all_have(rows, accelerator):
        is_bare = with_adapters or not has_adapters(reference.model)
        off = contextlib.nullcontext if is_bare else adapters_off
        with off(reference.model):
            rows = shared_scores(reference, merged, accelerator)
        if path and (accelerator is None or accelerator.is_main_process):
            flat = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
            write_file_atomic(path, lambda partial: save_file({"logps": flat}, partial))
    logps = {tuple(group.prompt_ids): iter(row) for group, row in zip(merged, rows)}
    return [[next(logps[tuple(group.prompt_ids)]) for _ in group.responses] for group in groups]


def _merge(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """One group per prompt."""
    alike: dict[tuple[int, ...], list[TokenGroup]] = {}
    for group in groups:
        alike.setdefault(tuple(group.prompt_ids), []).append(group)
    return [_joined(members) for members in alike.values()]


def _joined(groups: Sequence[TokenGroup]) -> TokenGroup:
    """The responses of groups with the same prompt as one group."""
    responses = [response for group in groups for response in group.responses]
    trained = None
    if any(group.trained for group in groups):
        masks = (g.trained or [[True] * len(r) for r in g.responses] for g in groups)
        trained = list(itertools.chain.from_iterable(masks))
    return TokenGroup(groups[0].prompt_ids, responses, trained)


def shared_scores(
    model: LanguageModel, groups: Sequence[TokenGroup], accelerator: Accelerator | None
) -> list[list[float]]:
    """`model.score_groups`, each process of a launch a share of them; all get all."""
    if accelerator is None or accelerator.num_processes == 1:
        return model.score_groups(groups)
    sizes = [model.num_tokens(group) for group in groups]
    shares = share_out(sizes, accelerator.num_processes)
    ours = model.score_groups([groups[i] for i in shares[accelerator.process_index]])
    found: list = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(found, ours)
    rows: list[list[float]] = [[] for _ in groups]
    for share, values in zip(shares, found):
        for index, row in zip(share, values):
            rows[index] = row
    return rows


def _all_have(rows: list[list[float]] | None, accelerator: Accelerator | None) -> bool:
    """Whether every process has read its rows; else all compute, since that takes all of them.

    The file may come between one's look and another's, from another launch, or lie on one machine.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return rows is not None
    found: list = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(found, rows is not None)
    return all(found)


def _read(path: Path, groups: Sequence[TokenGroup]) -> list[list[float]] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            values = iter(file.get_tensor("logps").tolist())
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); remove it") from error
    return [[next(values) for _ in group.responses] for group in groups]


def _fingerprint(
    reference: LanguageModel, groups: Sequence[TokenGroup], with_adapters: bool
) -> str:
    """Of everything that the log-probabilities depend on: weights, their use, and the tokens."""
    digest = hashlib.sha256()
    config = reference.model.config.to_dict()
    where = ("_name_or_path", "transformers_version")
    config = {key: value for key, value in config.items() if key not in where}
    digest.update(json.dumps([reference.precision, config], sort_keys=True, default=str).encode())
    if with_adapters and has_adapters(reference.model):
        digest.update(describe_adapters(reference.model).encode())
    for name, parameter in reference.model.named_parameters():
        if with_adapters or not (".lora_" in name or ".modules_to_save." in name):
            digest.update(f"{name.replace('.base_layer', '')} {parameter.dtype}".encode())
            data = parameter.detach().cpu().contiguous()
            digest.update(data.view(-1).view(torch.uint8).numpy())
    for group in groups:
        learned = [group.trained] if group.trained else []
        digest.update(json.dumps([group.prompt_ids, group.responses, *learned]).encode())
    return digest.hexdigest()[:20]
