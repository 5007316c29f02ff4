"""`rlhf-fast bench`: what the kernels gain on this machine, for one model's shape."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.timing import (
    Contestant,
    peak_extra_bytes,
    peak_is_known,
    processor_name,
    quantiles,
    time_all,
)


@dataclass(frozen=True)
class BenchConfig:
    """Options of `rlhf-fast bench`."""

    model: str = ""
    """A model folder: vocabulary and width come from its config.json."""
    vocab: int = 49152
    """Vocabulary."""
    width: int = 576
    """Hidden size."""
    tokens: int = 1024
    """Response tokens of a micro-batch."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    quick: bool = False
    """Fewer tokens and a second per contest: done in under two minutes."""
    compile: bool = True
    """Also race torch.compile, whose compilation takes most of the time."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        for name in ("vocab", "width", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


def with_model_shape(config: BenchConfig) -> BenchConfig:
    if not config.model:
        return config
    path = Path(config.model) / "config.json"
    if not path.is_file():
        raise UserError(f"model must be a folder with a config.json, got {config.model!r}")
    found = json.loads(path.read_text())
    found = {**found, **found.get("text_config", {})}
    if "vocab_size" not in found or "hidden_size" not in found:
        raise UserError(f"{path} must give vocab_size and hidden_size; pass --vocab, --width")
    return dataclasses.replace(config, vocab=found["vocab_size"], width=found["hidden_size"])


@dataclass
class Race:
    title: str
    inputs: list[Tensor]
    """Those that get a gradient; without any, forward alone is timed."""
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    fixed: tuple[Tensor, ...] = ()
    """Inputs without gradient, after the others."""
    compiles: bool = True
    """In seconds: a loop over time does not."""


def races(config: BenchConfig, device: str) -> list[Race]:
    dtype, tokens = getattr(torch, config.dtype), config.tokens
    hidden = torch.randn(tokens, config.width, device=device, dtype=dtype)
    weight = torch.randn(config.vocab, config.width, device=device, dtype=dtype)
    weight *= 4 / config.width**0.5
    logits = torch.randn(tokens, config.vocab, device=device).mul_(4).to(dtype)
    labels = torch.randint(config.vocab, (tokens,), device=device)

    def eager_logps(x: Tensor) -> Tensor:
        return torch.log_softmax(x.float(), -1).gather(-1, labels[:, None])[:, 0].sum()

    def our_head(h: Tensor, w: Tensor) -> Tensor:
        return ops.linear_logps(h, w, labels).logps.sum()

    def eager_head(h: Tensor, w: Tensor) -> Tensor:
        return eager_logps(F.linear(h, w))

    def our_logps(x: Tensor) -> Tensor:
        return ops.logps(x, labels).logps.sum()

    return [
        Race("log-probs of logits", [logits], our_logps, eager_logps),
        Race("head, reference model", [], our_head, eager_head, (hidden, weight)),
        Race("head, frozen (LoRA)", [hidden], our_head, eager_head, (weight,)),
        Race("head, trained", [hidden, weight], our_head, eager_head),
        *races_of_sequences(device),
    ]


def races_of_sequences(device: str, shape: tuple[int, int] = (64, 512)) -> list[Race]:
    logps = -torch.rand(shape, device=device)
    old_logps = logps + 0.1 * torch.randn_like(logps)
    advantages = torch.randn(shape[0], 1, device=device).expand(shape).contiguous()
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    rewards, values = torch.randn(2, *shape, device=device)

    def clipped(x: Tensor) -> Tensor:
        ratio = torch.exp(x - old_logps)
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -(surrogate * mask).sum() / mask.sum()

    def loop(rewards: Tensor, values: Tensor) -> Tensor:
        ahead, columns = torch.zeros_like(rewards[:, 0]), []
        for t in reversed(range(shape[1])):
            next_value = values[:, t + 1] if t + 1 < shape[1] else 0.0
            ahead = rewards[:, t] + next_value - values[:, t] + 0.95 * ahead
            columns.append(ahead)
        return torch.stack(columns, 1).square().sum()

    def scan(rewards: Tensor, values: Tensor) -> Tensor:
        return ops.gae(rewards, values, gamma=1.0, lam=0.95).advantages.square().sum()

    size = f"[{shape[0]} x {shape[1]}]"
    return [
        Race(
            f"PPO loss {size}",
            [logps],
            lambda x: ops.policy_loss(x, old_logps, advantages, mask=mask).loss,
            clipped,
        ),
        Race(f"advantages (GAE) {size}", [], scan, loop, (rewards, values), compiles=False),
    ]


QUICK_PRODUCT = 2 << 33
"""Tokens x vocabulary x width on a CPU, so that large models are quick, too."""


def quick(config: BenchConfig, device: str) -> BenchConfig:
    tokens = max(config.tokens // 4, 1)
    if device == "cpu":
        tokens = min(tokens, max(QUICK_PRODUCT // (config.vocab * config.width), 16))
    return dataclasses.replace(config, tokens=tokens)


def run(config: BenchConfig) -> None:
    config = with_model_shape(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.quick:
        config = quick(config, device)
    machine = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{config.tokens} tokens, V={config.vocab}, D={config.width}, {config.dtype}")
    memory = peak_is_known()
    print(f"median ms{' (and peak MiB beyond the inputs)' if memory else ''}; losses agree\n")
    names = ["rlhf_fast", "eager", *(["torch.compile"] if config.compile else [])]
    print(f"{'':26}" + "".join(f"{name:>20}" for name in names) + "  against the fastest other")
    gains = []
    for race in races(config, device):
        entered = names if race.compiles else names[:2]
        medians, peaks = measure(race, config, entered, memory)
        cells = [f"{medians[n]:.2f}{f' ({peaks[n]:.0f})' if peaks else ''}" for n in entered]
        cells += ["-"] * (len(names) - len(entered))
        gain = min(v for n, v in medians.items() if n != "rlhf_fast") / medians["rlhf_fast"]
        gains.append(gain)
        verdict = f"{gain:.1f}x faster" if gain > TIE else f"{1 / gain:.1f}x slower"
        verdict = "tie" if 1 / TIE <= gain <= TIE else verdict
        print(f"{race.title:26}" + "".join(f"{cell:>20}" for cell in cells) + f"  {verdict}")
    won, lost = sum(g > TIE for g in gains), sum(g < 1 / TIE for g in gains)
    print(f"\n{won} won, {len(gains) - won - lost} tied (within 10 %), {lost} lost")


TIE = 1.1


def measure(
    race: Race, config: BenchConfig, names: list[str], memory: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds, and peak MiB where it can be seen, of every contestant."""
    runners = {"rlhf_fast": race.ours, "eager": race.eager}
    if "torch.compile" in names:
        torch._dynamo.reset()
        runners["torch.compile"] = torch.compile(race.eager, dynamic=False)
    losses = {}

    def step(name: str) -> None:
        leaves = [x.detach().requires_grad_() for x in race.inputs]
        with torch.set_grad_enabled(bool(leaves)):
            loss = runners[name](*leaves, *race.fixed)
        if leaves:
            loss.backward()
        losses[name] = loss.detach()

    contestants = [Contestant(name, lambda name=name: step(name)) for name in names]
    times = time_all(contestants, 20, 1.0 if config.quick else 5.0)
    expected = losses["eager"].item()
    for name, loss in losses.items():
        # bfloat16 logits round differently in every order of a product
        if abs(loss.item() - expected) > 0.02 * abs(expected) + 1e-3:
            raise RuntimeError(f"bench: {race.title}: {name} gives {loss}, eager {expected}")
    peaks = {c.name: peak_extra_bytes(c.run) / 2**20 for c in contestants} if memory else {}
    return {name: quantiles(times[name])["median_ms"] for name in names}, peaks
