"""The reference beside the policy: its logits for the same tokens, whatever the padding."""

import pytest
import torch

from rlhf_fast.generation.guide import ReferenceGuide
from tests.tiny import tiny_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_mixtures_are_those_of_rows_alone(architecture):
    """GPT-2's positions are absolute, so counting the padding would show."""
    model, rows = tiny_model(architecture), [[20, 21, 22, 23, 24], [30, 31]]
    width, g = 5, torch.tensor([0.5, -0.25])
    ids = torch.tensor([[3] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    guide = ReferenceGuide(model, mask, g)
    for step in range(3):
        scores = torch.randn(2, 512)
        mixed = guide.mix(ids, scores)
        for k, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0, -1]
            expected = (1 + g[k]) * scores[k] - g[k] * alone
            torch.testing.assert_close(mixed[k], expected, rtol=1e-4, atol=1e-4)
        rows = [[*row, 50 + step] for row in rows]
        ids = torch.cat([ids, torch.full((2, 1), 50 + step)], 1)
