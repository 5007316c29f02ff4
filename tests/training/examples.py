"""Random preference pairs over the tiny vocabulary."""

from __future__ import annotations

import torch

from rlhf_fast.types import Completion, PreferencePair, Prompt


def make_pairs(count: int) -> list[PreferencePair]:
    generator = torch.Generator().manual_seed(1)

    def tokens(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(9, 512, (length,), generator=generator).tolist()

    pairs = []
    for i in range(count):
        prompt, prompt_ids = Prompt(str(i), [{"role": "user", "content": "x"}]), tokens(2, 9)
        chosen, rejected = (
            Completion(prompt, "", prompt_ids, [*tokens(1, 12), 3], True) for _ in range(2)
        )
        pairs.append(PreferencePair(chosen, rejected, 1.0, 0.0))
    return pairs
