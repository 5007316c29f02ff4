"""Online merging: every optimiser step is merged with what supervised fine-tuning changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rlhf_fast.errors import UserError
from rlhf_fast.models.merging import dropped, largest, locate_tensors
from rlhf_fast.models.names import model_directory
from rlhf_fast.seeds import derive_seed

if TYPE_CHECKING:
    from rlhf_fast.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class OnlineMergingConfig:
    """Merging inside the optimiser (arXiv 2405.17931)."""

    rule: Literal["dare", "ties"] | None = None
    """What is left of a step: dare, entries drawn at random and scaled up; ties, the largest, where
    their sign agrees with that of the fine-tuning. None does not merge."""
    density: float = 0.01
    """Share of the entries that is left, of each step and of the fine-tuning."""
    strength: float = 1e-7
    """A step becomes (1 - strength) * step + strength * what fine-tuning changed."""
    base: str | None = None
    """Model before supervised fine-tuning; None: the model that the run starts from."""
    tuned: str | None = None
    """Model after it; None: the reference that the run starts from."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or not 0 <= self.strength < 1:
            raise UserError(
                f"optimizer.merging: density must be in (0, 1] and strength in [0, 1), got "
                f"{self.density} and {self.strength}"
            )

    @property
    def is_resolved(self) -> bool:
        return self.rule is None or bool(self.base and self.tuned and self.base != self.tuned)


def merging_between(
    config: OptimizerConfig, base: Path | str, tuned: Path | str
) -> OptimizerConfig:
    """The configuration with these models where it names none."""
    merging = config.merging
    if merging.rule is None:
        return config
    named = replace(merging, base=merging.base or str(base), tuned=merging.tuned or str(tuned))
    if not named.is_resolved:
        raise UserError(
            f"optimizer.merging needs the models before and after supervised fine-tuning, got "
            f"{named.base} as both; give optimizer.merging.base"
        )
    return replace(config, merging=named)


class OnlineMerging:
    """Merges the steps of an optimiser; keeps one more copy of the parameters, two in a step.

    What is drawn depends on the seed, the step and the parameter's name alone.

    Source: OnDARE and OnTIES, arXiv 2405.17931; weight decay counts as part of the step.
    """

    def __init__(self, model: nn.Module, config: OnlineMergingConfig, seed: int) -> None:
        if not config.is_resolved:
            raise UserError("optimizer.merging needs both models: give merging.base and .tuned")
        self.config = config
        self.seed = seed
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        models = config.base, config.tuned
        before, after = (locate_tensors(model_directory(model)) for model in models)
        missing = sorted(n for n in self.parameters if n not in before or n not in after)
        if missing:
            raise UserError(
                f"optimizer.merging: every trained parameter must be in both models, got none "
                f"named {missing[0]} in {config.base} or {config.tuned}; adapters cannot be merged"
            )
        self.task_vectors = {
            name: self._thinned(
                _read(after[name], name) - _read(before[name], name), "task_vector", name
            ).to(parameter)
            for name, parameter in self.parameters.items()
        }

    @contextlib.contextmanager
    def merged(self, step: int) -> Iterator[None]:
        """Merges what the optimiser does inside."""
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        yield
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                delta = self._thinned(parameter - before[name], step, name)
                merged = merge_step(
                    delta, self.task_vectors[name], self.config.rule, self.config.strength
                )
                parameter.copy_(before[name] + merged)

    def _thinned(self, vector: Tensor, what: int | str, name: str) -> Tensor:
        if self.config.rule == "ties":
            return largest(vector, self.config.density)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "merging", what, name))
        return dropped(vector, self.config.density, generator)


def merge_step(step: Tensor, task_vector: Tensor, rule: str, strength: float) -> Tensor:
    """`(1 - strength) * step + strength * task_vector`, both thinned out already.

    With ties an entry counts only where its sign is that of the sum of the two.
    """
    if rule == "ties":
        sign = torch.where(step + task_vector >= 0, 1.0, -1.0)
        step = step * (step.sign() == sign)
        task_vector = task_vector * (task_vector.sign() == sign)
    return torch.lerp(step, task_vector, strength)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name).float()
