"""`rlhf-fast bench`: what the kernels gain on this machine, for one model's shape."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.timing import Contestant, quantiles, time_all


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
    """A quarter of the tokens and a second per contest: done in under two minutes."""
    compile: bool = True
    """Also race torch.compile, whose compilation takes most of the time."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(
                f"bench: dtype must be float32, bfloat16 or float16, got {self.dtype!r}"
            )
        for name in ("vocab", "width", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"bench: {name} must be at least 1, got {getattr(self, name)}")


def with_model_shape(config: BenchConfig) -> BenchConfig:
    if not config.model:
        return config
    path = Path(config.model) / "config.json"
    if not path.is_file():
        raise UserError(f"bench: model must be a folder with a config.json, got {config.model!r}")
    found = json.loads(path.read_text())
    found = {**found, **found.get("text_config", {})}
    if "vocab_size" not in found or "hidden_size" not in found:
        raise UserError(
            f"bench: {path} must give vocab_size and hidden_size; pass --vocab, --width"
        )
    return dataclasses.replace(config, vocab=found["vocab_size"], width=found["hidden_size"])


@dataclass
class Race:
    title: str
    inputs: list[Tensor]
    """Those that get a gradient."""
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]


def races(config: BenchConfig, device: str) -> list[Race]:
    dtype, tokens = getattr(torch, config.dtype), config.tokens
    hidden = torch.randn(tokens, config.width, device=device, dtype=dtype)
    weight = torch.randn(config.vocab, config.width, device=device, dtype=dtype)
    weight *= 4 / config.width**0.5
    logits = torch.randn(tokens, config.vocab, device=device).mul_(4).to(dtype)
    labels = torch.randint(config.vocab, (tokens,), device=device)
    logps = -torch.rand(64, 512, device=device)
    old_logps = logps + 0.1 * torch.randn_like(logps)
    advantages = torch.randn(64, 1, device=device).expand(64, 512).contiguous()
    mask = torch.ones(64, 512, dtype=torch.bool, device=device)

    def eager_logps(x: Tensor) -> Tensor:
        return torch.log_softmax(x.float(), -1).gather(-1, labels[:, None])[:, 0]

    def clipped(x: Tensor) -> Tensor:
        ratio = torch.exp(x - old_logps)
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -(surrogate * mask).sum() / mask.sum()

    return [
        Race(
            "log-probs of logits",
            [logits],
            lambda x: ops.logps(x, labels).logps.sum(),
            lambda x: eager_logps(x).sum(),
        ),
        Race(
            "head and log-probs",
            [hidden, weight],
            lambda h, w: ops.linear_logps(h, w, labels).logps.sum(),
            lambda h, w: eager_logps(F.linear(h, w)).sum(),
        ),
        Race(
            "PPO loss [64 x 512]",
            [logps],
            lambda x: ops.policy_loss(x, old_logps, advantages, mask=mask).loss,
            clipped,
        ),
    ]


def run(config: BenchConfig) -> None:
    config = with_model_shape(config)
    if config.quick:
        config = dataclasses.replace(config, tokens=max(config.tokens // 4, 1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    shape = f"{config.tokens} tokens, V={config.vocab}, D={config.width}, {config.dtype}"
    table = Table(title=f"{shape}, {name}: forward and backward, median ms")
    for column in ("", "rlhf_fast", "eager", "torch.compile", "faster than the better"):
        table.add_column(column, justify="right" if column else "left")
    for race in races(config, device):
        table.add_row(race.title, *measure(race, config))
    Console().print(table)


def measure(race: Race, config: BenchConfig) -> list[str]:
    runners = {"rlhf_fast": race.ours, "eager": race.eager}
    if config.compile:
        torch._dynamo.reset()
        runners["torch.compile"] = torch.compile(race.eager, dynamic=False)
    losses = {}

    def step(name: str) -> None:
        leaves = [x.detach().requires_grad_() for x in race.inputs]
        loss = runners[name](*leaves)
        loss.backward()
        losses[name] = loss.item()

    contestants = [Contestant(name, lambda name=name: step(name)) for name in runners]
    times = time_all(contestants, 20, 1.0 if config.quick else 5.0)
    for name, loss in losses.items():
        # bfloat16 logits round differently in every order of a product
        if abs(loss - losses["eager"]) > 0.02 * abs(losses["eager"]) + 1e-3:
            raise RuntimeError(f"bench: {race.title}: {name} gives {loss}, eager {losses['eager']}")
    medians = {name: quantiles(times[name])["median_ms"] for name in runners}
    rival = min(v for n, v in medians.items() if n != "rlhf_fast")
    shown = [f"{medians[n]:.2f}" if n in medians else "-" for n in ("rlhf_fast", "eager")]
    shown.append(f"{medians['torch.compile']:.2f}" if config.compile else "-")
    return [*shown, f"{rival / medians['rlhf_fast']:.1f}x"]
