"""The gate of a reward model with several outputs: their weights, from the prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_fast.errors import UserError

NUM_LAYERS, DROPOUT, TEMPERATURE = 3, 0.2, 10.0


class Gate(nn.Module):
    """`scale * softmax(mlp(prompt) / 10)`, one weight per output: [R, D] -> [R, H].

    Source: ArmoRM, arXiv 2406.12845, section 3.2, with the released layers and temperature.
    """

    def __init__(self, num_features: int, num_outputs: int, *, width: int = 1024) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (num_features, *[width] * (NUM_LAYERS - 1)):
            layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(DROPOUT)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_outputs))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * (self.layers(features.float()) / TEMPERATURE).softmax(-1)

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        save_file({name: t.contiguous() for name, t in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path) -> Gate:
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: damaged gate ({error})") from error
        width, num_features = state["layers.0.weight"].shape
        num_outputs = len(next(reversed([t for n, t in sorted(state.items()) if "bias" in n])))
        gate = cls(num_features, num_outputs, width=width)
        gate.load_state_dict(state)
        return gate.eval()
