"""Pure functions from scored groups to what the policy learns from: pairs, or chosen responses.

A rule sees one prompt's group and a random generator of that prompt's own, so what it draws does
not depend on the other prompts. Rankings go by reward; among equals the earlier response is first.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_fast.errors import UserError, refuse_unused
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import PreferencePair, ScoredGroup

PairRule = Literal[
    "best_vs_worst",
    "best_vs_random",
    "best_vs_second",
    "random_pair",
    "widest_gaps",
    "policy_vs_reference",
    "data_vs_policy",
]
GroupRule = Literal["all", "top", "batch_top", "threshold", "best_worst", "best_random", "resample"]


@dataclass(frozen=True)
class SelectionConfig:
    """Which responses the policy learns from."""

    rule: PairRule | GroupRule = "best_vs_worst"
    """Pairs: best_vs_worst, best_vs_random, best_vs_second, random_pair, widest_gaps,
    policy_vs_reference, and data_vs_policy, where the row's response is chosen whatever the
    rewards. Responses: all, top, batch_top, threshold, best_worst, best_random,
    resample."""
    pairs_per_prompt: int = 1
    """Most pairs of one prompt: with best_vs_worst, best against worst, then second best against
    second worst; with best_vs_random, best against that many others."""
    min_gap: float = 0.0
    """A pair's rewards must differ by more than this."""
    keep_ties: bool = False
    """Also take pairs of equal rewards (the earlier response is chosen) instead of dropping them;
    only with min_gap 0."""
    responses_per_prompt: int = 1
    """Responses kept by top and batch_top (there on average)."""
    min_reward: float = 0.0
    """Smallest reward that threshold keeps."""
    power: float = 1.0
    """resample draws a response with probability proportional to |reward| to this power."""
    drop_equal_groups: bool = False
    """Drop prompts whose responses all have the same reward, before anything else."""
    own_samples_only: bool = False
    """Leave out responses that a mixture or the reference gave; rewards may compare with them."""

    def __post_init__(self) -> None:
        for name in ("pairs_per_prompt", "responses_per_prompt"):
            if getattr(self, name) < 1:
                raise UserError(f"selection.{name} must be >= 1, got {getattr(self, name)}")
        if self.min_gap < 0 or (self.keep_ties and self.min_gap > 0):
            raise UserError(
                f"selection.min_gap must be >= 0, and 0 with keep_ties, got {self.min_gap}"
            )
        if self.power < 0:
            raise UserError(f"selection.power must be >= 0, got {self.power}")
        by_gap = (*PAIR_RULES, "policy_vs_reference")
        users = {
            "min_gap": by_gap,
            "keep_ties": by_gap,
            "responses_per_prompt": ("top", "batch_top"),
            "min_reward": ("threshold",),
            "power": ("resample",),
        }
        refuse_unused(self, "selection", "rule", users)

    @property
    def makes_pairs(self) -> bool:
        return self.rule in PAIR_RULES or self.rule in SOURCE_RULES

    @property
    def compares(self) -> bool:
        """Whether the rule has nothing to go by where there is one response."""
        return self.makes_pairs or self.rule in ("best_worst", "best_random")

    @property
    def min_generations(self) -> int:
        """Responses per prompt that the rule needs."""
        if self.rule == "best_vs_worst":
            return 2 * self.pairs_per_prompt
        if self.rule == "best_vs_random":
            return 1 + self.pairs_per_prompt
        if self.compares:
            return self.pairs_per_prompt if self.rule == "data_vs_policy" else 2
        return self.responses_per_prompt if self.rule in ("top", "batch_top") else 1


def select(
    scored: Sequence[ScoredGroup], config: SelectionConfig, *, seed: int
) -> list[PreferencePair] | list[ScoredGroup]:
    """Applies the rule to every group; a group from which nothing is selected is left out."""
    if config.drop_equal_groups:
        scored = [group for group in scored if max(group.rewards) > min(group.rewards)]
    if config.own_samples_only:
        own = [_from_sources(group, "policy", "greedy") for group in scored]
        scored = [subgroup(group, kept) for group, kept in zip(scored, own) if kept]
    if config.compares:
        _check_comparable(scored, config.rule)
    if config.rule in SOURCE_RULES:
        rule = SOURCE_RULES[config.rule]
        return [pair for group in scored for pair in rule(group, config)]
    if config.rule == "batch_top":
        return batch_top(scored, config.responses_per_prompt)
    rngs = [random.Random(derive_seed(seed, group.prompt.id)) for group in scored]
    if config.makes_pairs:
        rule = PAIR_RULES[config.rule]
        return [
            pair_of(group, i, j)
            for group, rng in zip(scored, rngs)
            for i, j in rule(group.rewards, rng, config)
            if _differ(group, i, j)
        ]
    kept = [
        (group, GROUP_RULES[config.rule](group.rewards, rng, config))
        for group, rng in zip(scored, rngs)
    ]
    return [subgroup(group, indices) for group, indices in kept if indices]


def _check_comparable(scored: Sequence[ScoredGroup], rule: str) -> None:
    for group in scored:
        if len(group.rewards) < 2:
            raise UserError(
                f"selection {rule} compares responses, got {len(group.rewards)} to prompt "
                f"{group.prompt.id!r}; sample more, or take a rule that selects single ones"
            )


def ranking(rewards: Sequence[float]) -> list[int]:
    """Indices from the best reward to the worst."""
    return sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))


def best_vs_worst(
    rewards: Sequence[float], rng: random.Random, config: SelectionConfig
) -> list[tuple[int, int]]:
    """Best against worst, then second best against second worst: each response is used once.

    Source: arXiv 2405.07863, section 3 (one pair per prompt).
    """
    order = ranking(rewards)
    count = min(config.pairs_per_prompt, len(order) // 2)
    return _wide_enough(rewards, zip(order[:count], reversed(order)), config)


def best_vs_random(
    rewards: Sequence[float], rng: random.Random, config: SelectionConfig
) -> list[tuple[int, int]]:
    """The best response against others, drawn uniformly without replacement."""
    best, *others = ranking(rewards)
    rivals = rng.sample(others, min(config.pairs_per_prompt, len(others)))
    return _wide_enough(rewards, ((best, rival) for rival in rivals), config)


def best_vs_second(
    rewards: Sequence[float], rng: random.Random, config: SelectionConfig
) -> list[tuple[int, int]]:
    """The best response against the second best: the hardest pair."""
    return _wide_enough(rewards, [tuple(ranking(rewards)[:2])], config)


def random_pair(
    rewards: Sequence[float], rng: random.Random, config: SelectionConfig
) -> list[tuple[int, int]]:
    """Pairs drawn uniformly among all pairs of responses, the better one chosen."""
    pairs = list(itertools.combinations(ranking(rewards), 2))
    drawn = rng.sample(pairs, min(config.pairs_per_prompt, len(pairs)))
    return _wide_enough(rewards, drawn, config)


def widest_gaps(
    rewards: Sequence[float], rng: random.Random, config: SelectionConfig
) -> list[tuple[int, int]]:
    """Every pair whose rewards differ enough, widest gaps first, up to `pairs_per_prompt`."""
    pairs = sorted(itertools.permutations(range(len(rewards)), 2))
    pairs = _wide_enough(rewards, (p for p in pairs if rewards[p[0]] >= rewards[p[1]]), config)
    return sorted(pairs, key=lambda p: rewards[p[1]] - rewards[p[0]])[: config.pairs_per_prompt]


def all_responses(
    rewards: Sequence[float], rng: random.Random, config: SelectionConfig
) -> list[int]:
    """Everything, in the order it was sampled."""
    return list(range(len(rewards)))


def top(rewards: Sequence[float], rng: random.Random, config: SelectionConfig) -> list[int]:
    """The best responses of the prompt, best first: rejection sampling, or a ranked list.

    Source: RAFT, arXiv 2304.06767, section 3; best-of-n.
    """
    return ranking(rewards)[: config.responses_per_prompt]


def threshold(rewards: Sequence[float], rng: random.Random, config: SelectionConfig) -> list[int]:
    """Responses whose reward is at least `min_reward`: expert iteration (arXiv 2403.04642)."""
    return [i for i, reward in enumerate(rewards) if reward >= config.min_reward]


def best_worst(rewards: Sequence[float], rng: random.Random, config: SelectionConfig) -> list[int]:
    """The best and the worst response: PF-PPO's BW filter (arXiv 2409.06957)."""
    order = ranking(rewards)
    return [order[0], order[-1]]


def best_random(rewards: Sequence[float], rng: random.Random, config: SelectionConfig) -> list[int]:
    """The best response and a random other one: PF-PPO's BR filter (arXiv 2409.06957)."""
    best, *others = ranking(rewards)
    return [best, rng.choice(others)]


def resample(rewards: Sequence[float], rng: random.Random, config: SelectionConfig) -> list[int]:
    """As many draws as responses, with replacement, with weights |reward|^power.

    Rewards near 0, where a reward model is least reliable, are drawn least. Source: PF-PPO, arXiv
    2409.06957, as verl implements it.
    """
    weights = [abs(reward) ** config.power for reward in rewards]
    if sum(weights) == 0:
        return []
    return sorted(rng.choices(range(len(rewards)), weights, k=len(rewards)))


def batch_top(scored: Sequence[ScoredGroup], responses_per_prompt: int) -> list[ScoredGroup]:
    """The best responses of the whole batch, `responses_per_prompt` per prompt on average.

    Source: RAFT, arXiv 2304.06767, section 3 (the variant that ranks globally).
    """
    places = [(-r, g, i) for g, group in enumerate(scored) for i, r in enumerate(group.rewards)]
    kept: dict[int, list[int]] = {}
    for _, g, i in sorted(places)[: responses_per_prompt * len(scored)]:
        kept.setdefault(g, []).append(i)
    return [subgroup(scored[g], kept[g]) for g in sorted(kept)]


def policy_vs_reference(group: ScoredGroup, config: SelectionConfig) -> list[PreferencePair]:
    """The policy's samples against the reference's, in the order sampled; the better is chosen.

    Source: XPO, arXiv 2405.21046, algorithm 1 (one pair per prompt).
    """
    places = zip(_from_sources(group, "policy"), _from_sources(group, "reference"))
    pairs = [sorted(p, key=lambda i: -group.rewards[i]) for p in places][: config.pairs_per_prompt]
    pairs = _wide_enough(group.rewards, pairs, config)
    return [pair_of(group, i, j) for i, j in pairs if _differ(group, i, j)]


def data_vs_policy(group: ScoredGroup, config: SelectionConfig) -> list[PreferencePair]:
    """The row's response against the policy's samples, in the order sampled.

    Source: SPIN, arXiv 2401.01335, algorithm 1 (one pair per prompt).
    """
    given, sampled = _from_sources(group, "data"), _from_sources(group, "policy")
    pairs = [(i, j) for i in given for j in sampled[: config.pairs_per_prompt]]
    return [pair_of(group, i, j) for i, j in pairs if _differ(group, i, j)]


def sampled_alone(group: ScoredGroup) -> ScoredGroup:
    """Without the response that the data brought."""
    return subgroup(group, [i for i, c in enumerate(group.completions) if c.source != "data"])


def _from_sources(group: ScoredGroup, *sources: str) -> list[int]:
    return [i for i, c in enumerate(group.completions) if c.source in sources]


def _differ(group: ScoredGroup, i: int, j: int) -> bool:
    """Two equal responses are a tie, even where rounding or a drawn judge rates them apart."""
    a, b = group.completions[i], group.completions[j]
    return (a.text, a.token_ids) != (b.text, b.token_ids)


def pair_of(group: ScoredGroup, chosen: int, rejected: int) -> PreferencePair:
    return PreferencePair(
        group.completions[chosen],
        group.completions[rejected],
        group.rewards[chosen],
        group.rewards[rejected],
    )


def subgroup(group: ScoredGroup, indices: Sequence[int]) -> ScoredGroup:
    def kept(values: Sequence) -> list:
        return [values[i] for i in indices]

    components = {name: kept(values) for name, values in group.components.items()}
    shares = group.token_rewards and kept(group.token_rewards)
    return ScoredGroup(
        group.prompt, kept(group.completions), kept(group.rewards), components, shares
    )


def _wide_enough(rewards, pairs, config: SelectionConfig) -> list[tuple[int, int]]:
    least = -math.inf if config.keep_ties else config.min_gap
    return [(i, j) for i, j in pairs if rewards[i] - rewards[j] > least]


PAIR_RULES: dict[str, Callable[..., list[tuple[int, int]]]] = {
    "best_vs_worst": best_vs_worst,
    "best_vs_random": best_vs_random,
    "best_vs_second": best_vs_second,
    "random_pair": random_pair,
    "widest_gaps": widest_gaps,
}
SOURCE_RULES: dict[str, Callable[[ScoredGroup, SelectionConfig], list[PreferencePair]]] = {
    "policy_vs_reference": policy_vs_reference,
    "data_vs_policy": data_vs_policy,
}
GROUP_RULES: dict[str, Callable[..., list[int]]] = {
    "all": all_responses,
    "top": top,
    "threshold": threshold,
    "best_worst": best_worst,
    "best_random": best_random,
    "resample": resample,
}
