"""On-policy updates on the tiny model: advantages by hand, equivalences, and rewards that rise."""

import math
from dataclasses import replace

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.generation.chat import ChatGenerator
from rlhf_fast.generation.hf import HFGenerator
from rlhf_fast.generation.samplers import SAMPLERS, SamplerConfig
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.advantages import Rollout, with_advantages
from rlhf_fast.training.critic import Critic, explained_variance
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.on_policy import make_rl_policy
from rlhf_fast.training.rl_config import RLConfig
from rlhf_fast.training.selected import ListConfig, ListPolicy, NLLPolicy, UnpairedPolicy
from rlhf_fast.training.unpaired import ScoredUnpairedConfig
from rlhf_fast.types import Completion, Prompt, ScoredGroup
from tests.records import completion
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [Prompt(f"p{i}", [{"role": "user", "content": f"w{30 + i}"}]) for i in range(8)]
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, batch_size=8, num_epochs=3, schedule="constant")


def rollout(rewards, lengths, *, ref_gap=0.0, baseline=None, values=None):
    responses = [[9] * n for n in lengths]
    logps = [[-1.0] * n for n in lengths]
    ref = [[-1.0 - ref_gap] * n for n in lengths]
    return Rollout(TokenGroup([5], responses), rewards, logps, logps, ref, baseline, values)


def advantages(rollouts, **options):
    return [r.advantages for r in with_advantages(rollouts, RLConfig(**options))]


def test_group_advantages_are_the_same_for_every_token():
    ((first, second),) = advantages([rollout([3.0, 1.0], [2, 3])], advantage="dr_grpo")
    assert first == [1.0, 1.0] and second == [-1.0] * 3
    ((first, second),) = advantages([rollout([3.0, 1.0], [2, 3])], advantage="rloo")
    assert (first[0], second[0]) == (2.0, -2.0)


def test_pass_at_k_credits_the_best_of_several_draws():
    """2 of 3: one right response makes 2 of 3 pairs right; of a wrong one's pairs 1 of 2 is."""
    (rows,) = advantages([rollout([1.0, 0.0, 0.0], [1] * 3)], advantage="pass_at_k", draws=2)
    deviation = (2 / 3 * 1 / 3) ** 0.5
    right, wrong = (1 - 2 / 3) / deviation, (1 / 2 - 2 / 3) / deviation
    assert [a for row in rows for a in row] == pytest.approx([right, wrong, wrong], rel=1e-5)
    with pytest.raises(UserError, match="rl.draws must be at most the responses.*got 4 and 3"):
        advantages([rollout([1.0, 0.0, 0.0], [1] * 3)], advantage="pass_at_k", draws=4)
    with pytest.raises(UserError, match="draws must be >= 1, got 0"):
        RLConfig(draws=0)
    with pytest.raises(UserError, match="pass_at_k takes kl_coef"):
        RLConfig(advantage="pass_at_k", reward_kl_coef=0.1)


def test_the_kl_in_the_reward_counts_the_whole_response():
    rollouts = [rollout([3.0, 1.0], [2, 4], ref_gap=0.5)]
    ((first, second),) = advantages(rollouts, advantage="rloo", reward_kl_coef=0.1)
    assert first[0] == pytest.approx((3.0 - 0.1) - (1.0 - 0.2))


def test_remax_subtracts_the_greedy_reward():
    ((first, second),) = advantages([rollout([3.0, 1.0], [1, 2], baseline=0.5)], advantage="remax")
    assert (first, second) == ([2.5], [0.5, 0.5])


def test_nash_md_weighs_by_the_win_rate():
    """`win rate - 1/2 - tau * log(pi / ref)`, the bracket of losses.nash_md_loss."""
    rollouts = [rollout([0.75, 0.25], [2, 4], ref_gap=0.5)]
    options = {"advantage": "constant", "reward_baseline": 0.5, "reward_kl_coef": 0.1}
    ((first, second),) = advantages(rollouts, **options)
    assert first == pytest.approx([0.15] * 2) and second == pytest.approx([-0.45] * 4)


def test_reinforce_pp_whitens_discounted_returns():
    rollouts = [rollout([1.0, -1.0], [2, 2], ref_gap=0.5)]
    ((first, second),) = advantages(
        rollouts, advantage="reinforce++", reward_kl_coef=0.2, gamma=0.5
    )
    returns = torch.tensor([-0.1 + 0.5 * 0.9, 0.9, -0.1 + 0.5 * -1.1, -1.1])
    expected = (returns - returns.mean()) / returns.std()
    assert first + second == pytest.approx(expected.tolist(), abs=1e-5)


def test_gae_by_hand():
    values = [[0.5, 0.25]]
    (result,) = with_advantages(
        [rollout([1.0], [2], values=values)],
        RLConfig(advantage="gae", gamma=1.0, lam=0.5, whiten=False),
    )
    last = 1.0 - 0.25
    first = (0.25 - 0.5) + 0.5 * last
    assert result.advantages == [pytest.approx([first, last])]
    assert result.returns == [pytest.approx([first + 0.5, last + 0.25])]


def test_macro_actions_share_their_advantage():
    values = [[0.5, 0.5, 0.25, 0.25, 0.25]]
    options = {"advantage": "gae", "gamma": 1.0, "lam": 0.5, "whiten": False}
    (macro,) = with_advantages(
        [rollout([1.0], [5], values=values)], RLConfig(macro_tokens=2, **options)
    )
    steps = [[0.5, 0.25, 0.25]]  # one value per macro action: tokens 1-2, 3-4, 5
    (plain,) = with_advantages([rollout([1.0], [3], values=steps)], RLConfig(**options))
    first, second, third = plain.advantages[0]
    assert macro.advantages[0] == pytest.approx([first, first, second, second, third])


def test_imitation_counts_every_response_once():
    assert advantages([rollout([0.3, -5.0], [1, 2])], advantage="imitation") == [[[1.0], [1.0] * 2]]


def test_explained_variance():
    assert explained_variance([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert explained_variance([1.5, 1.5], [1.0, 2.0]) == 0.0
    assert math.isnan(explained_variance([1.0, 2.0], [3.0, 3.0]))


def wrapped(seed=0):
    return LanguageModel(tiny_model(seed=seed), pad_token_id=3, precision="fp32")


def policy_of(model_path, **options):
    return make_rl_policy(
        wrapped(),
        wrapped(),
        tiny_tokenizer(),
        config=RLConfig(optimizer=OPTIMIZER, **options),
        critic_path=model_path,
        seed=0,
        on_step=lambda metrics, total: None,
    )


@pytest.fixture(scope="module")
def generator(model_path):
    chat = ChatFormat(tiny_tokenizer())
    backend = HFGenerator(
        model_path, decode=chat.decode, stop_token_ids=chat.stop_token_ids, dtype="float32"
    )
    return ChatGenerator(backend, chat, SamplingConfig(max_new_tokens=6))


def wanted(completion: Completion) -> float:
    """Share of tokens in the upper half of the vocabulary."""
    return sum(t >= 256 for t in completion.token_ids) / len(completion.token_ids)


def sample(generator, policy, seed, kind="plain"):
    generator.load_weights(policy)
    sampler = SAMPLERS[kind](generator, SamplerConfig(kind))
    groups = sampler.generate(PROMPTS, num_generations=8, seed=seed)
    return [ScoredGroup(g[0].prompt, g, [wanted(c) for c in g]) for g in groups]


def mean(scored):
    return sum(r for g in scored for r in g.rewards) / sum(len(g.rewards) for g in scored)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo", "advantage": "grpo"},
        {"loss_type": "dr_grpo", "advantage": "dr_grpo"},
        {"loss_type": "dapo", "advantage": "grpo", "epsilon_high": 0.28},
        {"loss_type": "gspo", "advantage": "grpo"},
        {"loss_type": "rloo", "advantage": "rloo", "reward_kl_coef": 0.01},
        {"loss_type": "reinforce++", "advantage": "reinforce++", "reward_kl_coef": 0.01},
        {"loss_type": "reinforce++", "advantage": "reinforce++_baseline", "kl_coef": 0.01},
        {"loss_type": "remax", "advantage": "remax"},
        {"loss_type": "ppo", "advantage": "gae", "reward_kl_coef": 0.01},
    ],
    ids=lambda o: f"{o['loss_type']}-{o['advantage']}",
)
def test_the_reward_rises(generator, model_path, options):
    kind = "greedy_extra" if options["advantage"] == "remax" else "plain"
    policy = policy_of(model_path, **options)
    first = mean(sample(generator, policy, 100))
    for step in range(6):
        rows = policy.update(sample(generator, policy, step, kind), seed=step)
        assert all(math.isfinite(row["loss"]) for row in rows)
    assert mean(sample(generator, policy, 100)) > first + 0.07
    assert rows[0]["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert rows[0]["sampling_weight"] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gspo", "rloo"])
def test_micro_batches_change_nothing(generator, model_path, loss_type):
    policies = [policy_of(model_path, loss_type=loss_type, kl_coef=0.1) for _ in range(2)]
    policies[1].model.micro_batch_tokens = 40
    groups = sample(generator, policies[0], 0)
    rows = [policy.update(groups, seed=0) for policy in policies]
    for one, other in zip(*rows):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("loss_type", ["ppo", "grpo", "dapo", "dr_grpo", "gspo", "rloo", "a_lol"])
def test_the_head_in_one_pass_learns_what_two_passes_learn(generator, model_path, loss_type):
    """Log-probabilities first and `policy_loss` after them, in the same updates."""
    options = {"loss_type": loss_type, "kl_coef": 0.1, "temperature": 0.8}
    policies = [policy_of(model_path, **options) for _ in range(2)]
    model = policies[1].model

    def two_passes(hidden, batch, old_logps, advantages, *, temperature, **options):
        outputs = model.head_outputs(hidden, batch.labels, ("logps", "entropy"), temperature)
        options |= {"cu_seqlens": batch.cu_seqlens, "entropy": outputs.entropy.detach()}
        return ops.policy_loss(outputs.logps, old_logps, advantages, **options)

    model.policy_loss = two_passes
    groups = sample(generator, policies[0], 0)
    rows = [policy.update(groups, seed=0) for policy in policies]
    for one, other in zip(*rows):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    first, second = (p.model.model.state_dict() for p in policies)
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-4), name


def test_imitation_of_the_best_raises_the_reward(generator):
    policy = NLLPolicy(wrapped(), wrapped(), tiny_tokenizer(), config=OPTIMIZER)
    first = mean(sample(generator, policy, 100))
    for step in range(6):
        groups = sample(generator, policy, step)
        best = [max(range(8), key=g.rewards.__getitem__) for g in groups]
        chosen = [
            ScoredGroup(g.prompt, [g.completions[i]], [g.rewards[i]]) for g, i in zip(groups, best)
        ]
        policy.update(chosen, seed=step)
    assert mean(sample(generator, policy, 100)) > first + 0.07


@pytest.mark.parametrize(
    "loss_type", ["lipo_lambda", "list_mle", "pairwise_logistic", "rrhf", "pro"]
)
def test_list_losses_raise_the_reward(generator, loss_type):
    config = ListConfig(loss_type, optimizer=OPTIMIZER, nll_weight=0.1)
    policy = ListPolicy(wrapped(), wrapped(), tiny_tokenizer(), config=config)
    first = mean(sample(generator, policy, 100))
    for step in range(6):
        rows = policy.update(sample(generator, policy, step), seed=step)
    assert 0 <= rows[-1]["top_accuracy"] <= 1
    assert mean(sample(generator, policy, 100)) > first + 0.07


@pytest.mark.parametrize("loss_type", ["kto", "bco_pair", "apo_zero"])
def test_losses_of_desirable_and_undesirable_responses_raise_the_reward(generator, loss_type):
    config = ScoredUnpairedConfig(loss_type, optimizer=OPTIMIZER)
    policy = UnpairedPolicy(wrapped(), wrapped(), tiny_tokenizer(), config=config)
    first = mean(sample(generator, policy, 100))
    for step in range(10):
        rows = policy.update(sample(generator, policy, step), seed=step)
    assert rows[-1]["desirable_reward"] > rows[-1]["undesirable_reward"]
    assert mean(sample(generator, policy, 100)) > first + 0.07
    alike = [replace(g, rewards=[1.0] * 8) for g in sample(generator, policy, 0)]
    with pytest.raises(UserError, match="responses to each of 8 prompts have equal rewards"):
        policy.update(alike, seed=0)


def test_stale_samples_are_weighed(generator, model_path):
    policy = policy_of(model_path, loss_type="grpo")
    groups = sample(generator, policy, 0)
    shifted = [
        replace(
            g,
            completions=[
                replace(c, sampling_logps=[x - 1.0 for x in c.sampling_logps])
                for c in g.completions
            ],
        )
        for g in groups
    ]
    (row, *_) = policy.update(shifted, seed=0)
    assert row["sampling_weight"] == pytest.approx(2.0, abs=1e-3)  # e, truncated
    assert row["sampling_clipped"] == pytest.approx(1.0)


def test_critic_starts_from_a_reward_model_or_fresh(model_path, tmp_path):
    from rlhf_fast.models.reward_model import fresh_reward_model

    options = {"device": "cpu", "pad_token_id": 3, "precision": "fp32"}
    one, other = (Critic.load(model_path, seed=s, **options) for s in (0, 1))
    assert not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(one.head.weight, Critic.load(model_path, seed=0, **options).head.weight)
    reward = fresh_reward_model(model_path)
    torch.nn.init.normal_(reward.score.weight)
    reward.save_pretrained(tmp_path / "rm")
    critic = Critic.load(tmp_path / "rm", **options)
    assert torch.equal(critic.head.weight, reward.score.weight)


def test_mistakes(generator, model_path):
    policy = policy_of(model_path, loss_type="remax", advantage="remax")
    with pytest.raises(UserError, match="needs one greedy response per prompt, got 0"):
        policy.update(sample(generator, policy, 0), seed=0)
    greedy = replace(completion("w21"), source="greedy")
    with pytest.raises(UserError, match="prompt 'p' has nothing but its greedy response"):
        policy_of(model_path).update([ScoredGroup(greedy.prompt, [greedy], [1.0])], seed=0)
    with pytest.raises(UserError, match="rl.gamma must be in"):
        RLConfig(gamma=2.0)
    with pytest.raises(UserError, match="rl: policy_loss: epsilon_low must"):
        RLConfig(epsilon_low=2.0)
    with pytest.raises(UserError, match="list: beta must be > 0"):
        ListConfig(beta=0.0)
