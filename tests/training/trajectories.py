"""Twenty optimiser steps of every task on a tiny model, by this package and by the textbook."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.training.fit import FitOptions, OptimizerConfig
from rlhf_fast.training.optimizer import data_order
from rlhf_fast.training.preference import DPOConfig, train_preference
from rlhf_fast.training.reward import RewardTrainingConfig, train_reward_model
from rlhf_fast.training.sft import train_sft
from rlhf_fast.training.unpaired import UnpairedConfig, mismatched, train_unpaired
from tests.tiny import tiny_model, tiny_reward_model, tiny_tokenizer
from tests.training.examples import make_pairs

TASKS = ("sft", "dpo", "kto", "reward")
STEPS, BATCH, SEED, BETA, NLL = 20, 8, 7, 0.1, 0.5
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, num_epochs=10, batch_size=BATCH, schedule="constant", max_grad_norm=1.0
)
LABELS = [[True, False]] * BATCH + [[False, False], [True, True]] * (BATCH // 2)
"""Of the responses in `groups`, for kto."""
Rows = list[dict[str, float]]


def groups() -> list[TokenGroup]:
    """Two batches of (chosen, rejected); supervised tuning learns both."""
    return [
        TokenGroup(p.chosen.prompt_token_ids, [p.chosen.token_ids, p.rejected.token_ids])
        for p in make_pairs(2 * BATCH)
    ]


def make(task: str, **options) -> Backbone:
    """The wrapped model that `train` starts from."""
    options = {"precision": "fp32"} | options
    if task == "reward":
        return RewardModel(reward_model(), tiny_tokenizer(), **options)
    return LanguageModel(tiny_model(), pad_token_id=3, **options)


def reward_model() -> torch.nn.Module:
    model = tiny_reward_model()
    model.base_model.load_state_dict(tiny_model().base_model.state_dict())
    return model.eval()


def train(
    task: str,
    model: Backbone,
    *,
    options: FitOptions | None = None,
    on_step: Callable[[dict[str, float], int], None] = lambda row, total: None,
) -> Rows:
    """This package's rows of metrics."""
    common = {"seed": SEED, "options": options, "on_step": on_step}
    if task == "sft":
        return train_sft(model, groups(), config=OPTIMIZER, **common)
    if task == "dpo":
        config = DPOConfig(beta=BETA, nll_weight=NLL, optimizer=OPTIMIZER)
        return train_preference(model, groups(), config=config, **common)
    if task == "kto":
        config = UnpairedConfig(beta=BETA, undesirable_weight=1.5, optimizer=OPTIMIZER)
        return train_unpaired(model, groups(), LABELS, config=config, **common)
    rows: Rows = []  # what train_reward_model returns is about the whole run
    common["on_step"] = lambda row, total: rows.append(row) or on_step(row, total)
    config = RewardTrainingConfig(holdout_share=0.0, optimizer=OPTIMIZER)
    train_reward_model(model, groups(), config=config, **common)
    return rows


def textbook(task: str, precision: str) -> Rows:
    """Full logits, one row per response, nothing padded, packed, shared or kept from before."""
    model = reward_model() if task == "reward" else tiny_model()
    model = model.double() if precision == "fp64" else model
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    data, rows = groups(), []
    for batch in data_order(len(data), OPTIMIZER, SEED):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = _loss(task, model, reference, data, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rows.append({"loss": loss.item(), "grad_norm": norm.item()})
    return rows


def _loss(task: str, model, reference, data: list[TokenGroup], indices: list[int]) -> Tensor:
    if task == "kto":
        return _kto(model, reference, data, indices)
    batch = [data[i] for i in indices]
    if task == "sft":
        total = sum(_logps(model, g, k).sum() for g in batch for k in range(2))
        return -total / sum(g.num_trained for g in batch)
    losses = []
    for group in batch:
        if task == "reward":
            chosen, rejected = (_reward(model, group, k) for k in range(2))
            losses.append(-F.logsigmoid(chosen - rejected))
            continue
        chosen, rejected = (_logps(model, group, k) for k in range(2))
        with torch.no_grad():
            before = [_logps(reference, group, k).sum() for k in range(2)]
        margin = (chosen.sum() - before[0]) - (rejected.sum() - before[1])
        losses.append(-F.logsigmoid(BETA * margin) - NLL * chosen.mean())
    return torch.stack(losses).mean()


def _kto(model, reference, data: list[TokenGroup], indices: list[int]) -> Tensor:
    """arXiv 2402.01306, equations 7 and 8."""

    def log_ratios(groups: list[TokenGroup]) -> Tensor:
        places = [(group, k) for group in groups for k in range(2)]
        with torch.no_grad():
            before = torch.stack([_logps(reference, *place).sum() for place in places])
        return torch.stack([_logps(model, *place).sum() for place in places]) - before

    others = mismatched(data)
    kl = log_ratios([others[i] for i in indices]).mean().detach().clamp(min=0)
    gain = BETA * (log_ratios([data[i] for i in indices]) - kl)
    is_desirable = torch.tensor([label for i in indices for label in LABELS[i]])
    return torch.where(is_desirable, 1 - gain.sigmoid(), 1.5 * (1 - (-gain).sigmoid())).mean()


def _logps(model, group: TokenGroup, k: int) -> Tensor:
    ids = torch.tensor([group.prompt_ids + group.responses[k]])
    start = len(group.prompt_ids)
    logits = model(input_ids=ids).logits[0, start - 1 : -1]
    logps = logits.log_softmax(-1)
    return logps.gather(1, ids[0, start:, None])[:, 0]


def _reward(model, group: TokenGroup, k: int) -> Tensor:
    ids = torch.tensor([group.prompt_ids + group.responses[k]])
    return model.score(model.model(input_ids=ids).last_hidden_state[0, -1])[0]
