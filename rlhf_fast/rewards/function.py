"""A Python function as the reward."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.plugins import load_function, place_of
from rlhf_fast.rewards.shaping import StepReduction, reduce_steps
from rlhf_fast.types import Group, Prompt, ScoredGroup

ARGUMENTS = ("prompts", "completions", "finished")


class FunctionScorer:
    """Calls `function(prompts, completions, *, finished, **columns) -> list[float]` per group.

    `prompts` are message lists and `completions` texts, one of each per response; `finished` says
    whether each response ended by itself; `columns` are the prompt row's other fields, each as a
    list (TRL's convention for reward functions); those of the names above are left out. With
    `steps` the function returns a list of step rewards for each response, which are reduced to one;
    with `per_token` it also gets `completion_ids` and returns one reward per token.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        *,
        steps: StepReduction | None = None,
        step_limit: float = 0.0,
        per_token: bool = False,
    ) -> None:
        self.steps = steps
        self.step_limit = step_limit
        self.per_token = per_token
        self.name = function if isinstance(function, str) else function.__qualname__
        self.function = load_function(function) if isinstance(function, str) else function

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        return [self._scored(list(group)) for group in groups]

    def _scored(self, group: Group) -> ScoredGroup:
        prompt, returned = group[0].prompt, self._returned(group)
        rewards = self._checked(returned, group)
        if not self.per_token:
            return ScoredGroup(prompt, group, rewards)
        shares = [list(map(float, row)) for row in returned]
        for row, completion in zip(shares, group):
            if len(row) != len(completion.token_ids):
                raise UserError(
                    f"reward function {self.name} must return one reward for each of "
                    f"{len(completion.token_ids)} tokens, got {len(row)} on prompt {prompt.id!r}"
                )
        return ScoredGroup(prompt, group, rewards, token_rewards=shares)

    def _returned(self, group: Group) -> Any:
        prompt = group[0].prompt
        # Copies: what the function does to its arguments must not reach the run's prompts.
        columns = {name: _copies(value, group) for name, value in prompt.metadata.items()}
        if self.per_token:
            if not all(c.token_ids for c in group):
                raise UserError(
                    "reward.per_token needs sampled responses, got texts without tokens"
                )
            columns["completion_ids"] = [c.token_ids for c in group]
        columns |= {
            "prompts": _copies(prompt.messages, group),
            "completions": [c.text for c in group],
            "finished": [c.finished for c in group],
        }
        try:
            return self.function(**columns)
        except Exception as error:  # whatever the user's function raises is reported as theirs
            raise UserError(
                f"reward function {self.name} raised {type(error).__name__} on prompt "
                f"{prompt.id!r}: {error}{place_of(error)}"
            ) from error

    def _value(self, reward: Any) -> float:
        if self.per_token:
            return math.fsum(map(float, reward))
        if self.steps is None:
            return float(reward)
        return reduce_steps([float(step) for step in reward], self.steps, self.step_limit)

    def _expected(self) -> str:
        if self.per_token:
            return "lists of token rewards"
        return "numbers" if self.steps is None else "lists of step rewards"

    def _checked(self, rewards: Any, group: Group) -> list[float]:
        prompt_id = group[0].prompt.id
        try:
            if isinstance(rewards, (str, Mapping)):
                raise TypeError
            values = [self._value(r) for r in rewards]
        except (TypeError, ValueError):
            raise UserError(
                f"reward function {self.name} must return a list of {self._expected()}, got "
                f"{rewards!r:.80} on prompt {prompt_id!r}"
            ) from None
        if len(values) != len(group):
            raise UserError(
                f"reward function {self.name} must return {len(group)} rewards, got {len(values)} "
                f"on prompt {prompt_id!r}"
            )
        for value, completion in zip(values, group):
            if not math.isfinite(value):
                raise UserError(
                    f"reward function {self.name} returned {value} on prompt {prompt_id!r}, "
                    f"response {completion.text[:80]!r}"
                )
        return values


def check_signature(name: str, prompts: Iterable[Prompt], *, per_token: bool = False) -> None:
    """Refuses a function that cannot be called with the arguments of a reward function.

    These are named as `FunctionScorer` says, and the fields of the prompts' rows.
    """
    arguments = {*ARGUMENTS, "completion_ids"} if per_token else {*ARGUMENTS}
    try:
        signature = inspect.signature(load_function(name))
    except ValueError:  # of some builtins nothing is known
        return
    for fields in {frozenset(prompt.metadata) - arguments for prompt in prompts}:
        try:
            signature.bind(**dict.fromkeys(arguments | fields))
        except TypeError as error:
            given = ", ".join([*ARGUMENTS, *sorted(arguments - {*ARGUMENTS}), *sorted(fields)])
            raise UserError(
                f"reward function {name}{signature} cannot be called: {error}; it is given the "
                f"keyword arguments {given}: name those it uses and end with `**columns`"
            ) from None


def _copies(value: Any, group: Group) -> list[Any]:
    return [copy.deepcopy(value) for _ in group]
