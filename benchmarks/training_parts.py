"""Where the time of our training step goes: each part run alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rlhf_fast import ops
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.ops import matmul
from rlhf_fast.training.engine import Engine


def parts_of_a_step(model, pairs: list[TokenGroup], config) -> dict[str, float]:
    """CPU milliseconds of the parts of a step, each run alone."""
    engine, is_reward = Engine(model, config), isinstance(model, RewardModel)
    batch = model.collate(pairs)
    with matmul.fast_float32():
        kept: dict[str, torch.Tensor] = {}

        def body() -> None:
            kept["hidden"] = model.states(batch, batch.last if is_reward else batch.source)
            kept["hidden"].sum().backward()

        def head() -> None:
            hidden = kept["hidden"].detach().requires_grad_()
            if is_reward:
                chosen, rejected = model.read(hidden.float()).view(-1, 2).unbind(1)
                ops.reward_model_loss(chosen, rejected).loss.backward()
            elif len(pairs[0].responses) == 2:
                zeros = torch.zeros(len(pairs), device=hidden.device)
                model.preference_loss(hidden, batch, zeros, zeros).loss.backward()
            else:
                model.logps_of_states(hidden, batch.labels).sum().backward()

        def optimiser() -> None:
            engine.clip(1.0)
            engine.optimizer.step()

        parts = {
            "collate": milliseconds(lambda: model.collate(pairs)),
            "body": milliseconds(body),
            "head": milliseconds(head),
            "optimiser": milliseconds(optimiser),
        }
        if len(pairs[0].responses) == 2 and not is_reward:
            parts["reference, once"] = milliseconds(lambda: model.score_groups(pairs))
        return parts


def milliseconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The least of a few runs after one that warms up, of processor or GPU."""
    times = []
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((clock() - start) * 1e3)
    return min(times[1:])
