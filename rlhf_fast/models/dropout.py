"""What would make a log-probability random is off; adapters keep their dropout."""

from __future__ import annotations

from torch import nn

ONLY_IN_TRAINING = ("input_jitter_noise", "jitter_noise", "layerdrop", "moe_jitter_eps")
"""Attributes of modules that draw random numbers, beside the dropouts."""


def disable_dropout(model: nn.Module) -> None:
    """A log-probability is a function of the tokens; adapters keep the dropout they were given."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            is_random = "dropout" in attribute or attribute in ONLY_IN_TRAINING
            if is_random and isinstance(value, float):
                setattr(module, attribute, 0.0)
