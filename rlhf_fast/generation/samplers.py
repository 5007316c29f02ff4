"""What is sampled besides n plain responses: each sampler wraps a generator and is one itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlhf_fast.errors import UserError, refuse_unused
from rlhf_fast.generation.chat import ChatGenerator, HasTensors
from rlhf_fast.plugins import load_function
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import Completion, Group, Message, Prompt

Kind = Literal[
    "plain",
    "greedy_extra",
    "with_response",
    "prefix_reset",
    "pilaf",
    "mixture",
    "rewrite",
    "multi_turn",
]


@dataclass(frozen=True)
class SamplerConfig:
    """Which responses are sampled for training; evaluation always samples plainly."""

    kind: Kind = "plain"
    """plain. greedy_extra: one greedy response more per prompt, as a baseline (ReMax, arXiv
    2310.10505). with_response: the row's own response beside them, scored and selected like the
    others (SPIN, arXiv 2401.01335). prefix_reset: go on from the beginning of an offline response
    (DR-PO, arXiv 2404.08495). pilaf: half of the prompts get responses from the policy moved away
    from the reference and towards it (arXiv 2502.04270). mixture: half of the responses come from
    the geometric mixture with the reference (Nash-MD, arXiv 2312.00886). rewrite: prompts rewritten
    by a function. multi_turn: feedback, or the row's next of several `turns`, is appended and
    answered."""
    strength: float = 0.1
    """pilaf: beta, how far from and towards the reference. mixture: the reference's share; 1
    samples from the reference itself (XPO, arXiv 2405.21046)."""
    prefix_field: str = "response"
    """prefix_reset and with_response: the prompt row's field with the offline response."""
    prefix_share: float = 1.0
    """prefix_reset: share of the prompts that start from a prefix."""
    function: str | None = None
    """rewrite: module:function called as f(messages, index) -> messages for each response.
    multi_turn: f(prompt, completion) -> feedback, or None when the response needs none; without a
    function, the next of the prompt row's `turns`."""
    turns: int = 2
    """multi_turn: responses in a conversation at most; it also ends where the next one would not
    fit the model."""

    def __post_init__(self) -> None:
        is_extra = self.function is not None and self.kind not in ("rewrite", "multi_turn")
        if is_extra or (self.function is None and self.kind == "rewrite"):
            raise UserError("sampler: `function` goes with kinds rewrite and multi_turn")
        if not 0 <= self.prefix_share <= 1:
            raise UserError(f"sampler.prefix_share must be in [0, 1], got {self.prefix_share}")
        if self.kind == "mixture" and not 0 < self.strength <= 1:
            raise UserError(f"sampler.strength must be in (0, 1] for mixture, got {self.strength}")
        if self.kind == "pilaf" and self.strength <= 0:
            raise UserError(f"sampler.strength must be > 0 for pilaf, got {self.strength}")
        if self.turns < 2:
            raise UserError(f"sampler.turns must be >= 2, got {self.turns}")
        users = {
            "strength": ("pilaf", "mixture"),
            "prefix_field": ("prefix_reset", "with_response"),
            "prefix_share": ("prefix_reset",),
            "turns": ("multi_turn",),
        }
        refuse_unused(self, "sampler", "kind", users)

    @property
    def keeps_prompts(self) -> bool:
        """Whether responses follow the prompts themselves and nothing longer."""
        return self.kind in ("plain", "greedy_extra", "with_response", "pilaf", "mixture")

    @property
    def needs_reference(self) -> bool:
        return self.kind in ("pilaf", "mixture")


class Sampler:
    """Plain sampling; the others replace `generate`."""

    def __init__(self, generator: ChatGenerator, config: SamplerConfig) -> None:
        self.generator = generator
        self.config = config

    @classmethod
    def check(cls, prompts: Sequence[Prompt], config: SamplerConfig, where: str) -> None:
        """Raises unless the prompts bring what this sampler takes from them."""

    def generate(
        self, prompts: Sequence[Prompt], *, num_generations: int, seed: int
    ) -> list[Group]:
        return self.generator.generate(prompts, num_generations=num_generations, seed=seed)

    def load_weights(self, policy: HasTensors) -> None:
        self.generator.load_weights(policy)


class GreedyExtra(Sampler):
    """Adds the greedy response to each group, last and marked by its source."""

    def generate(
        self, prompts: Sequence[Prompt], *, num_generations: int, seed: int
    ) -> list[Group]:
        groups = super().generate(prompts, num_generations=num_generations, seed=seed)
        sampling = replace(self.generator.sampling, temperature=0.0)
        greedy = self.generator.generate(prompts, num_generations=1, seed=seed, sampling=sampling)
        return [[*g, replace(extra, source="greedy")] for g, (extra,) in zip(groups, greedy)]


class WithResponse(Sampler):
    """Adds the row's response to each group, last and marked by its source.

    Nobody sampled it: it has no sampling log-probabilities.
    """

    @classmethod
    def check(cls, prompts: Sequence[Prompt], config: SamplerConfig, where: str) -> None:
        for prompt in prompts:
            _offline_response(prompt, config, where)

    def generate(
        self, prompts: Sequence[Prompt], *, num_generations: int, seed: int
    ) -> list[Group]:
        groups = super().generate(prompts, num_generations=num_generations, seed=seed)
        return [[*group, self._given(prompt)] for group, prompt in zip(groups, prompts)]

    def _given(self, prompt: Prompt) -> Completion:
        chat, text = (
            self.generator.chat,
            _offline_response(prompt, self.config, "sampler with_response"),
        )
        ids = chat.response_ids(text)
        return Completion(prompt, text, chat.prompt_ids(prompt.messages), ids, True, source="data")


class PrefixReset(Sampler):
    """Starts from a random part of the offline response; a group shares its prefix.

    The prefix counts as prompt: it is not trained, but belongs to the text that is scored.
    """

    @classmethod
    def check(cls, prompts: Sequence[Prompt], config: SamplerConfig, where: str) -> None:
        for prompt in prompts:
            _offline_response(prompt, config, where)

    def generate(
        self, prompts: Sequence[Prompt], *, num_generations: int, seed: int
    ) -> list[Group]:
        chat = self.generator.chat
        prefixes = [self._prefix(prompt, seed) for prompt in prompts]
        token_ids = [chat.prompt_ids(p.messages) + prefix for p, prefix in zip(prompts, prefixes)]
        groups = self.generator.generate(
            prompts, num_generations=num_generations, seed=seed, token_ids=token_ids
        )
        return [
            [replace(c, text=chat.decode(prefix + c.token_ids)) for c in group]
            for group, prefix in zip(groups, prefixes)
        ]

    def _prefix(self, prompt: Prompt, seed: int) -> list[int]:
        text = _offline_response(prompt, self.config, "sampler prefix_reset")
        rng = random.Random(derive_seed(seed, "prefix", prompt.id))
        if rng.random() >= self.config.prefix_share:
            return []
        ids = self.generator.chat.response_ids(text, finished=False)
        return ids[: rng.randrange(len(ids))] if ids else []


class Mixture(Sampler):
    """Samples from the policy and from its mixtures with the reference, on the logits.

    `guidance` g gives logits `(1 + g) * policy - g * reference`: 0 is the policy, -1 the
    reference. PILAF gives each prompt, with probability 1/2, half of its responses with +strength
    and half with -strength, else 0; `mixture` gives the second half of every group -strength.
    """

    def generate(
        self, prompts: Sequence[Prompt], *, num_generations: int, seed: int
    ) -> list[Group]:
        guidance = [self._guidance(prompt, num_generations, seed) for prompt in prompts]
        groups = self.generator.generate(
            prompts, num_generations=num_generations, seed=seed, guidance=guidance
        )
        return [
            [replace(c, source=_source(g)) for c, g in zip(group, row)]
            for group, row in zip(groups, guidance)
        ]

    def _guidance(self, prompt: Prompt, count: int, seed: int) -> list[float]:
        half, strength = count // 2, self.config.strength
        if self.config.kind == "mixture":
            return [0.0] * (count - half) + [-strength] * half
        rng = random.Random(derive_seed(seed, "pilaf", prompt.id))
        if rng.random() < 0.5:
            return [0.0] * count
        return [strength] * (count - half) + [-strength] * half


class Rewrite(Sampler):
    """Samples each response from a rewritten prompt and hands it over as if from the plain one.

    The policy is trained on the plain prompt, so the sampling log-probabilities do not apply.
    """

    def __init__(self, generator: ChatGenerator, config: SamplerConfig) -> None:
        super().__init__(generator, config)
        self.function: Callable[[list[Message], int], list[Message]] = load_function(
            config.function or ""
        )

    def generate(
        self, prompts: Sequence[Prompt], *, num_generations: int, seed: int
    ) -> list[Group]:
        rewritten = [
            replace(prompt, id=f"{prompt.id}#{i}", messages=self.function(prompt.messages, i))
            for prompt in prompts
            for i in range(num_generations)
        ]
        groups = iter(self.generator.generate(rewritten, num_generations=1, seed=seed))
        return [
            [self._plain(prompt, next(groups)[0]) for _ in range(num_generations)]
            for prompt in prompts
        ]

    def _plain(self, prompt: Prompt, completion: Completion) -> Completion:
        ids = self.generator.chat.prompt_ids(prompt.messages)
        return replace(
            completion,
            prompt=prompt,
            prompt_token_ids=ids,
            sampling_logps=None,
            source="rewritten",
        )


class MultiTurn(Sampler):
    """Answers feedback: each response that gets some becomes a longer prompt with its own group.

    The groups of later turns follow those of the first; their prompts' ids end in `/turn-...`.
    """

    def __init__(self, generator: ChatGenerator, config: SamplerConfig) -> None:
        super().__init__(generator, config)
        self.feedback: Callable[[Prompt, Completion], str | None] = (
            load_function(config.function) if config.function else _next_turn
        )

    @classmethod
    def check(cls, prompts: Sequence[Prompt], config: SamplerConfig, where: str) -> None:
        if not config.function and not any("turns" in prompt.metadata for prompt in prompts):
            raise UserError(
                f"{where}: no prompt has `turns`, which sampler multi_turn goes through; give "
                f"them, or sampler.function"
            )

    def generate(
        self, prompts: Sequence[Prompt], *, num_generations: int, seed: int
    ) -> list[Group]:
        self.check(prompts, self.config, "sampler multi_turn")
        options = {"num_generations": num_generations}
        groups = latest = super().generate(prompts, seed=seed, **options)
        for turn in range(2, self.config.turns + 1):
            later = [p for group in latest for p in self._continued(group, turn)]
            if not later:
                break
            latest = super().generate(later, seed=derive_seed(seed, "turn", turn), **options)
            groups = groups + latest
        return groups

    def _continued(self, group: Group, turn: int) -> list[Prompt]:
        prompts = []
        for index, completion in enumerate(group):
            feedback = self.feedback(completion.prompt, completion)
            if feedback is not None:
                prompt = completion.prompt
                answer = {"role": "assistant", "content": completion.text}
                messages = [*prompt.messages, answer, {"role": "user", "content": feedback}]
                name = f"{prompt.id}/turn-{turn}-{index}"
                longer = replace(prompt, id=name, messages=messages)
                if self.generator.has_room(longer):
                    prompts.append(longer)
        return prompts


def _offline_response(prompt: Prompt, config: SamplerConfig, where: str) -> str:
    text = prompt.metadata.get(config.prefix_field)
    if not isinstance(text, str):
        raise UserError(
            f"{where}, prompt {prompt.id!r} needs the field `{config.prefix_field}` (text), "
            f"fields: {sorted(prompt.metadata)}"
        )
    return text


def _next_turn(prompt: Prompt, completion: Completion) -> str | None:
    asked = sum(message["role"] == "user" for message in prompt.messages)
    following = prompt.metadata.get("turns", [])[asked:]
    if not following:
        return None
    return following[0]["content"] if isinstance(following[0], dict) else following[0]


SAMPLERS: dict[str, type[Sampler]] = {
    "plain": Sampler,
    "greedy_extra": GreedyExtra,
    "with_response": WithResponse,
    "prefix_reset": PrefixReset,
    "pilaf": Mixture,
    "mixture": Mixture,
    "rewrite": Rewrite,
    "multi_turn": MultiTurn,
}


def _source(guidance: float) -> str:
    if guidance == 0:
        return "policy"
    return "reference" if guidance == -1 else "mixture"
