"""Named policy-gradient methods, from selection to the last of several steps, by the textbook.

The textbook has full logits in float64, one row per response, formulas as in the papers and an
optimiser of its own; the method has nothing but the settings of its name.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.online.config_file import config_with
from rlhf_fast.online.selectors import SelectionConfig, select
from rlhf_fast.recipes import METHODS
from rlhf_fast.training.advantages import with_advantages
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.on_policy import RLPolicy
from rlhf_fast.training.rl_config import RLConfig
from rlhf_fast.types import Completion, Prompt, ScoredGroup
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.test_policy_terms import rollout

STEPS, LEARNING_RATE = 4, 3e-4
OPTIMIZER = OptimizerConfig(
    learning_rate=LEARNING_RATE, batch_size=8, num_epochs=STEPS, schedule="constant"
)
REWARDS = ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0])
MAX_NEW_TOKENS = 10


def scored_groups():
    generator = torch.Generator().manual_seed(3)
    groups = []
    for i, rewards in enumerate(REWARDS):
        prompt = Prompt(str(i), [{"role": "user", "content": "x"}])
        completions = []
        for k in range(len(rewards)):
            ids = torch.randint(9, 512, (2 + (3 * i + 2 * k) % 7,), generator=generator).tolist()
            is_cut = (i + k) % 4 == 3
            ids = ids if is_cut else [*ids, 3]
            completions.append(Completion(prompt, str(ids), [5, 6 + i], ids, not is_cut))
        groups.append(ScoredGroup(prompt, completions, rewards))
    return groups


def by_name(name, temperature=1.0, groups=None, **more):
    """Rows of losses and gradient norms of the method's own selection and update."""
    groups = groups or scored_groups()
    changes = METHODS[name][1]
    selection = config_with(SelectionConfig(), changes["selection"], name)
    config = config_with(RLConfig(optimizer=OPTIMIZER), changes["rl"] | more, name)
    config = config.for_sampling(temperature, MAX_NEW_TOKENS)
    models = [LanguageModel(tiny_model(), pad_token_id=3, precision="fp32") for _ in range(2)]
    policy = RLPolicy(*models, tiny_tokenizer(), config=config)
    rows = policy.update(select(groups, selection, seed=0), seed=0)
    return [(row["loss"], row["grad_norm"]) for row in rows]


def rows_of_logits(model, groups, temperature=1.0):
    """Per response: log-probability and entropy of every token, with gradient."""
    result = []
    for completion in (c for g in groups for c in g.completions):
        ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
        start = len(completion.prompt_token_ids)
        logits = model(input_ids=ids).logits[0, start - 1 : -1]
        logps = (logits / temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        result.append((logps.gather(1, ids[0, start:, None])[:, 0], entropy))
    return result


def textbook(groups, advantages, loss, temperature=1.0):
    """`loss(parts)`: per response (advantage, ratio, log-probs, entropies before and now)."""
    model = tiny_model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    with torch.no_grad():
        before = rows_of_logits(model, groups, temperature)
    rows = []
    for _ in range(STEPS):
        now = rows_of_logits(model, groups, temperature)
        parts = [
            (a, (lp - old).exp(), lp, unsure, entropy)
            for a, (lp, entropy), (old, unsure) in zip(advantages, now, before, strict=True)
        ]
        value = loss(parts)
        optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rows.append((value.item(), norm.item()))
    return rows


def clipped(a, ratio, low, high):
    return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def sequence_mean(token_loss):
    return lambda parts: torch.stack([token_loss(*p).mean() for p in parts]).mean()


def token_mean(token_loss):
    return lambda parts: torch.cat([token_loss(*p) for p in parts]).mean()


def by_budget(token_loss):
    """Dr.GRPO: a constant divides, not the lengths that happen to be there."""
    return lambda parts: sum(token_loss(*p).sum() for p in parts) / len(parts) / MAX_NEW_TOKENS


def dapo(a, ratio, *_):
    return clipped(a, ratio, 0.2, 0.28)


def of_high_entropy(parts):
    entropies = torch.cat([unsure for *_, unsure, _ in parts])
    kept = entropies >= entropies.quantile(0.8)
    losses = torch.cat([dapo(*p) for p in parts])
    return (losses * kept).sum() / len(losses)


def gspo(a, ratio, *_):
    return clipped(a, ratio.log().mean().exp(), 3e-4, 4e-4)


def gmpo(a, ratio, *_):
    x = ratio.log()
    return -a * (x.clamp(max=0.4) if a >= 0 else x.clamp(min=-0.4)).mean().exp()


def cispo(a, ratio, logps, *_):
    return -ratio.clamp(0, 5).detach() * a * logps


def standardised(rewards):
    mean = statistics.fmean(rewards)
    return [(r - mean) / (statistics.stdev(rewards) + 1e-6) for r in rewards]


def centred(rewards):
    return [r - statistics.fmean(rewards) for r in rewards]


def leave_one_out(rewards):
    total, count = sum(rewards), len(rewards)
    return [r - (total - r) / (count - 1) for r in rewards]


def whitened(advantages):
    values = torch.tensor(advantages, dtype=torch.float64)
    return ((values - values.mean()) / (values.var() + 1e-8).sqrt()).tolist()


def grpo(a, ratio, *_):
    return clipped(a, ratio, 0.2, 0.2)


CASES = {
    "grpo": (True, standardised, sequence_mean(grpo)),
    "dapo": (True, standardised, token_mean(dapo)),
    "dr-grpo": (False, centred, by_budget(grpo)),
    "gspo": (False, standardised, sequence_mean(gspo)),
    "gspo-token": (False, standardised, sequence_mean(gspo)),
    "gmpo": (False, standardised, sequence_mean(gmpo)),
    "cispo": (True, standardised, token_mean(cispo)),
    "high-entropy-tokens": (True, standardised, of_high_entropy),
    "reinforce-rej": (True, lambda rewards: [r - 0.5 for r in rewards], sequence_mean(grpo)),
    "rloo": (
        False,
        leave_one_out,
        sequence_mean(lambda a, ratio, *_: clipped(a, ratio.prod(), 0.2, 0.2)),
    ),
    "reinforce++-baseline": (False, centred, token_mean(grpo)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_method_follows_the_textbook(name):
    drops, estimate, loss = CASES[name]
    groups = [g for g in scored_groups() if not drops or len(set(g.rewards)) > 1]
    advantages = [a for g in groups for a in estimate(g.rewards)]
    if name == "reinforce++-baseline":
        advantages = whitened(advantages)
    assert_close(by_name(name), textbook(groups, advantages, loss))


@pytest.mark.parametrize("name", ["grpo", "high-entropy-tokens"])
def test_the_policy_is_taken_at_the_temperature_of_its_samples(name):
    """As TRL and verl do; what the sampler did otherwise is known at temperature 1."""
    _, estimate, loss = CASES[name]
    groups = [g for g in scored_groups() if len(set(g.rewards)) > 1]
    advantages = [a for g in groups for a in estimate(g.rewards)]
    with torch.no_grad():
        logps = iter(rows_of_logits(tiny_model().double(), groups))
    recorded = [
        [replace(c, sampling_logps=(next(logps)[0] - 0.1).tolist()) for c in g.completions]
        for g in groups
    ]
    given = [replace(g, completions=row) for g, row in zip(groups, recorded)]
    expected = textbook(groups, [math.exp(0.1) * a for a in advantages], loss, temperature=0.7)
    assert_close(by_name(name, temperature=0.7, groups=given), expected)
    cold = textbook(groups, [math.exp(0.1) * a for a in advantages], loss)
    assert cold[0] != pytest.approx(expected[0], rel=2e-2)


@pytest.mark.parametrize("more", [{}, {"off_policy_threshold": 1e6}], ids=["one", "two passes"])
def test_entropy_is_that_at_the_temperature(more):
    groups = [g for g in scored_groups() if len(set(g.rewards)) > 1]
    advantages = [a for g in groups for a in standardised(g.rewards)]

    def loss(parts):
        return token_mean(dapo)(parts) - torch.cat([entropy for *_, entropy in parts]).mean()

    rows = by_name("dapo", temperature=0.7, entropy_coef=1.0, **more)
    assert_close(rows, textbook(groups, advantages, loss, temperature=0.7))


def test_raft_plus_plus_learns_from_right_responses_alone():
    groups = []
    for g in scored_groups():
        right = [i for i, reward in enumerate(g.rewards) if reward == 1]
        if right:
            kept = [g.completions[i] for i in right]
            groups.append(ScoredGroup(g.prompt, kept, [1.0] * len(right)))
    ones = [1.0 for g in groups for _ in g.rewards]
    assert_close(by_name("raft++"), textbook(groups, ones, sequence_mean(grpo)))


def test_cut_responses_count_in_advantages_and_are_not_learned_from():
    groups = [g for g in scored_groups() if len(set(g.rewards)) > 1]
    advantages, finished = [], []
    for g in groups:
        pairs = list(zip(standardised(g.rewards), g.completions))
        advantages += [a for a, c in pairs if c.finished]
        kept = [c for c in g.completions if c.finished]
        finished.append(ScoredGroup(g.prompt, kept, [0.0] * len(kept)))
    assert len(advantages) < 3 * len(groups)
    expected = textbook(finished, advantages, token_mean(dapo))
    assert_close(by_name("dapo", mask_unfinished=True), expected)


@pytest.mark.parametrize("more", [{}, {"off_policy_threshold": 1e6}], ids=["one", "two passes"])
def test_the_bonus_for_entropy_is_learned(more):
    groups = [g for g in scored_groups() if len(set(g.rewards)) > 1]
    advantages = [a for g in groups for a in standardised(g.rewards)]

    def loss(parts):
        return token_mean(dapo)(parts) - torch.cat([entropy for *_, entropy in parts]).mean()

    rows = by_name("dapo", entropy_coef=1.0, sampling_correction="none", **more)
    assert_close(rows, textbook(groups, advantages, loss))


def test_tokens_are_chosen_over_the_whole_update():
    entropies = [[5.0]], [[1.0, 4.0, 2.0, 3.0]]
    rollouts = [
        replace(rollout([0.0] * len(e[0]), [-1.0] * len(e[0])), entropies=e) for e in entropies
    ]
    config = RLConfig(advantage="constant", reward_baseline=-1.0, high_entropy_share=0.4)
    results = with_advantages(rollouts, config)
    assert [r.advantages for r in results] == [[[1.0]], [[0.0, 1.0, 0.0, 0.0]]]


def assert_close(rows, expected):
    for row, truth in zip(rows, expected, strict=True):
        assert row == pytest.approx(truth, rel=2e-3, abs=1e-5)


def test_settings_that_would_be_ignored():
    for settings, message in (
        ({"draws": 4}, "rl.draws: advantage grpo makes no use of it, got 4"),
        ({"lam": 0.5}, "rl.lam: advantage grpo"),
        ({"advantage": "rloo", "gamma": 0.9}, "rl.gamma: advantage rloo"),
        ({"loss_type": "sapo", "epsilon_high": 0.28}, "rl.epsilon_high: loss_type sapo"),
        ({"loss_type": "cispo", "dual_clip": 3.0}, "rl.dual_clip: loss_type cispo"),
        ({"max_length": 9}, "rl.max_length: loss_type grpo"),
        ({"kl_estimator": "k1"}, "rl.kl_estimator: kl_coef 0.0"),
        (
            {"sampling_correction": "none", "sampling_low": 0.5},
            "sampling_low: sampling_corr",
        ),
    ):
        with pytest.raises(UserError, match=message):
            RLConfig(**settings)
    with pytest.raises(UserError, match=r"high_entropy_share must lie in \(0, 1\], got 0"):
        RLConfig(high_entropy_share=0.0)
    with pytest.raises(UserError, match="mask_unfinished: the token limit cut all responses to 1"):
        cut = replace(rollout([1.0], [-1.0]), finished=[False])
        with_advantages([cut], RLConfig(advantage="constant", mask_unfinished=True))
