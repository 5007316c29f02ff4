"""The prompts of a run: those trained on, those held out, and what does not fit the model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from rlhf_fast.data import load_prompts
from rlhf_fast.errors import UserError
from rlhf_fast.models.chat import ChatFormat, load_tokenizer
from rlhf_fast.models.checkpoint import check_known, load_text_config
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.rows import RowReport
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import Prompt


def load_all_prompts(
    config: OnlineConfig, report: RowReport | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts in seeded order, held-out prompts); `report` as in `RowOptions`."""
    data = config.data
    prompts = load_prompts(data.prompts, **data.reading(report))
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "prompts"))
    prompts = [prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()]
    if data.evaluation_prompts:
        held_out = load_prompts(data.evaluation_prompts, **data.reading(report))
        return prompts, _named_apart(held_out, prompts)
    rows: dict[str, list[Prompt]] = {}  # of one conversation: all of them are held out, or none
    for prompt in prompts:
        rows.setdefault(json.dumps(prompt.messages), []).append(prompt)
    parts = list(rows.values()) if len(rows) > 1 else [[prompt] for prompt in prompts]
    count = min(200, max(1, round(len(parts) * data.evaluation_share)))
    if count >= len(parts):
        raise UserError(
            f"{data.prompts}: {len(parts)} prompts are too few to hold some out; give more, or "
            f"--data.evaluation-prompts"
        )
    return _flat(parts[:-count]), _flat(parts[-count:])


def _flat(parts: Sequence[list[Prompt]]) -> list[Prompt]:
    return [prompt for part in parts for prompt in part]


def trained_on(held_out: Sequence[Prompt], prompts: Sequence[Prompt]) -> int:
    """How many held-out prompts are training prompts too."""
    known = {json.dumps(prompt.messages) for prompt in prompts}
    return sum(json.dumps(prompt.messages) in known for prompt in held_out)


def _named_apart(held_out: list[Prompt], prompts: Sequence[Prompt]) -> list[Prompt]:
    """Rows without an id are numbered in each file: no two prompts of the run share one."""
    known = {prompt.id: prompt.messages for prompt in prompts}
    if all(known.get(prompt.id, prompt.messages) == prompt.messages for prompt in held_out):
        return held_out
    return [replace(prompt, id=f"evaluation-{prompt.id}") for prompt in held_out]


def fitting_prompts(
    prompts: Sequence[Prompt], config: OnlineConfig, chat: ChatFormat, model_path: str
) -> list[Prompt]:
    """The prompts of at most `data.max_prompt_tokens`; all must leave room for a response."""
    tokens = [chat.prompt_ids(prompt.messages) for prompt in prompts]
    lengths = list(map(len, tokens))
    settings = load_text_config(model_path)
    check_known(max(itertools.chain.from_iterable(tokens)), settings)
    limit, new = config.data.max_prompt_tokens, config.generation.sampling.max_new_tokens
    kept = [p for p, length in zip(prompts, lengths) if limit is None or length <= limit]
    if not kept:
        raise UserError(
            f"data.max_prompt_tokens {limit} leaves no prompt: they have {min(lengths)} tokens and "
            f"more"
        )
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is None:
        return kept
    over = sum(positions - new < length <= (limit or length) for length in lengths)
    if over:
        others = f", or leave them out with --data.max-prompt-tokens {positions - new}"
        raise UserError(
            f"{over} of {len(prompts)} prompts, the longest of {max(lengths)} tokens, do not fit "
            f"into the model's {positions} positions with max_new_tokens={new}: lower "
            f"--generation.sampling.max-new-tokens{others if over < len(prompts) else ''}"
        )
    return kept


def too_long_for_rewards(
    prompts: Sequence[Prompt], config: OnlineConfig, model_path: str
) -> Iterator[str]:
    """What to say of each reward model that a prompt with its longest response does not fit into.

    Responses may stay shorter, and models of relative positions go on beyond theirs, so it is no
    error here; one with learned positions refuses the first response that is too long.
    """
    reward, new = config.reward, config.generation.sampling.max_new_tokens
    models = reward.model_names() | {"evaluation.reward_model": config.evaluation.reward_model}
    voters = [name for name in models if ".vote." in name]  # they read the pairs alone
    if reward.trains and reward.compares:
        models["reward.training.objective pairwise"] = model_path
    for argument, name in models.items():
        if not name or argument in voters:
            continue
        positions = getattr(load_text_config(name), "max_position_embeddings", None)
        chat, responses = ChatFormat(load_tokenizer(name)), 2 if "pairwise" in argument else 1
        longest = max(len(chat.prompt_ids(prompt.messages)) for prompt in prompts)
        if positions is not None and (needed := longest + responses * new) > positions:
            yield (
                f"{argument}: {name} has {positions} positions, but a prompt of {longest} tokens "
                f"and {responses} x max_new_tokens={new} are {needed}: it may refuse or misjudge "
                f"the longest; lower generation.sampling.max_new_tokens or data.max_prompt_tokens"
            )
