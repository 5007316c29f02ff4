"""Questions to the policy that is being trained, as to a judge."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_fast.generation.chat import ChatGenerator
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.types import Prompt


def answers_of(
    generator: ChatGenerator,
    questions: Sequence[str],
    *,
    count: int,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> list[list[str]]:
    """`count` answers to each question by the weights that the generator has now."""
    prompts = [
        Prompt(f"question {k} to the policy as a judge", [{"role": "user", "content": question}])
        for k, question in enumerate(questions, 1)
    ]
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=max_tokens)
    groups = generator.generate(prompts, num_generations=count, seed=seed, sampling=sampling)
    return [[completion.text for completion in group] for group in groups]
