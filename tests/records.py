"""Records for tests: prompts, completions, scored groups."""

from __future__ import annotations

from rlhf_fast.types import Completion, Prompt, ScoredGroup


def completion(text: str, prompt_id: str = "p", *, num_tokens: int = 2, finished: bool = True):
    prompt = Prompt(prompt_id, [{"role": "user", "content": "x"}])
    return Completion(prompt, text, [1], [*range(20, 19 + num_tokens), 3], finished)


def scored(*rewards, prompt_id="p", texts=None) -> ScoredGroup:
    texts = texts or [f"text {i}" for i in range(len(rewards))]
    completions = [completion(text, prompt_id) for text in texts]
    return ScoredGroup(completions[0].prompt, completions, list(map(float, rewards)))
