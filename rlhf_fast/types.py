"""The records that cross rooms: plain data, one JSON object per line on disk."""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from typing import Any

Message = dict[str, str]  # {"role": "user", "content": "..."}


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant's next turn."""

    id: str
    """Unique within a run; seeds and files refer to it."""
    messages: list[Message]
    metadata: dict[str, Any] = field(default_factory=dict)
    """The row's other fields, handed to reward functions as keyword columns."""


@dataclass(frozen=True)
class Completion:
    """One sampled response, as the tokens that were sampled: it is never tokenised again."""

    prompt: Prompt
    text: str
    """Decoded response without special tokens."""
    prompt_token_ids: list[int]
    token_ids: list[int]
    """Response tokens; when finished, the last one is the stop token that was sampled."""
    finished: bool
    """True if the model stopped by itself, False if the token limit cut it."""
    sampling_logps: list[float] | None = None
    """Log-probability of each response token under the engine that sampled it (temperature 1)."""
    source: str = "policy"
    """What it was sampled from: policy, greedy, mixture, reference, or rewritten; or data."""


@dataclass(frozen=True)
class ScoredGroup:
    """All responses to one prompt with their rewards, same order."""

    prompt: Prompt
    completions: list[Completion]
    rewards: list[float]
    components: dict[str, list[float]] = field(default_factory=dict)
    """The rewards that were combined, by name, each with one value per response."""
    token_rewards: list[list[float]] | None = None
    """Shares of the rewards that the scorer gave to single tokens: per response, one per token;
    what they leave of the reward belongs to the last token."""


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt, the better first."""

    chosen: Completion
    rejected: Completion
    chosen_reward: float
    rejected_reward: float


Group = list[Completion]
"""The responses sampled for one prompt."""


def to_json(record: Prompt | Completion | ScoredGroup | PreferencePair | Group) -> dict[str, Any]:
    return {"completions": _plain(record)} if isinstance(record, list) else _plain(record)


def _plain(value: Any) -> Any:
    """Records as dictionaries of their fields; unlike `dataclasses.asdict` nothing else is copied,
    which takes longer than writing it."""
    if is_dataclass(value):
        return {name: _plain(part) for name, part in vars(value).items()}
    if isinstance(value, list) and value and is_dataclass(value[0]):
        return [_plain(part) for part in value]
    return value


def prompt_from_json(row: dict[str, Any]) -> Prompt:
    return Prompt(row["id"], row["messages"], row["metadata"])


def completion_from_json(row: dict[str, Any]) -> Completion:
    return Completion(**{**row, "prompt": prompt_from_json(row["prompt"])})


def group_from_json(row: dict[str, Any]) -> Group:
    return [completion_from_json(completion) for completion in row["completions"]]


def scored_group_from_json(row: dict[str, Any]) -> ScoredGroup:
    rewards, prompt = row["rewards"], prompt_from_json(row["prompt"])
    components, shares = row.get("components", {}), row.get("token_rewards")
    return ScoredGroup(prompt, group_from_json(row), rewards, components, shares)


def preference_pair_from_json(row: dict[str, Any]) -> PreferencePair:
    chosen, rejected = (completion_from_json(row[name]) for name in ("chosen", "rejected"))
    return PreferencePair(chosen, rejected, row["chosen_reward"], row["rejected_reward"])
