"""Prompts that say how good the answer is to be: return-conditioned training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_fast.errors import UserError
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ConditionConfig:
    """Levels of quality, by reward, that prompts can ask for."""

    bounds: tuple[float, ...] = ()
    """Rewards at which the next level begins, ascending; none: prompts say nothing of quality."""
    text: str = "Quality of the answer: {level} of {levels}."
    """Put after the prompt's last message. Samples are asked for at the highest level; what is
    learned from them is the level that they have reached."""

    def __post_init__(self) -> None:
        if list(self.bounds) != sorted(set(self.bounds)):
            raise UserError(f"condition.bounds must ascend, got {self.bounds}")
        if "{level}" not in self.text:
            raise UserError(f"condition.text must have {{level}} in it, got {self.text!r}")

    def level(self, reward: float) -> int:
        """1 below the first bound."""
        return 1 + sum(bound <= reward for bound in self.bounds)


class ConditionedChat(ChatFormat):
    """Writes prompts that ask for an answer of some level, by default the highest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, condition: ConditionConfig) -> None:
        super().__init__(tokenizer)
        self.condition = condition

    def prompt_ids(self, messages: list[Message], level: int | None = None) -> list[int]:
        levels = len(self.condition.bounds) + 1
        text = self.condition.text.replace("{levels}", str(levels))
        text = text.replace("{level}", str(level or levels))
        *before, last = messages
        return super().prompt_ids([*before, {**last, "content": f"{last['content']}\n\n{text}"}])
