"""What decides about tokens or responses beside the policy loss: by hand, and in whole updates."""

import math
from dataclasses import replace

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.advantages import Rollout, with_advantages
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.on_policy import RLPolicy
from rlhf_fast.training.rl_config import CovarianceConfig, RLConfig
from rlhf_fast.types import Completion, Prompt, ScoredGroup
from tests.tiny import tiny_model, tiny_tokenizer

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, batch_size=4, num_epochs=2, schedule="constant")
NO_CLIP = {"loss_type": "dapo", "epsilon_low": 1.0, "epsilon_high": 1e6}


def groups(shift=0.0):
    """Four prompts with a good and a bad response; the sampler gave tokens `shift` more."""
    result = []
    for i in range(4):
        prompt = Prompt(str(i), [{"role": "user", "content": "x"}])
        responses = [[100 + i, 120 + 3 * i, 3], [140 + i, 3]]
        completions = [Completion(prompt, "", [5, 6 + i], ids, True) for ids in responses]
        scored = ScoredGroup(prompt, completions, [1.0, 0.0])
        (logps,) = wrapped().map_batches([group_of(scored)], wrapped().token_logps)[0][1:]
        recorded = [[x + shift for x in logps[:3]], [x + shift for x in logps[3:]]]
        completions = [
            replace(c, sampling_logps=r) for c, r in zip(completions, recorded, strict=True)
        ]
        result.append(replace(scored, completions=completions))
    return result


def group_of(scored):
    return TokenGroup(scored.completions[0].prompt_token_ids, [c.token_ids for c in
                                                               scored.completions])  # fmt: skip


def wrapped():
    return LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")


def update(data, micro_batch_tokens=4096, **options):
    """Rows of two steps on all of the data."""
    policy = RLPolicy(
        wrapped(), wrapped(), tiny_tokenizer(), config=RLConfig(optimizer=OPTIMIZER, **options)
    )
    policy.model.micro_batch_tokens = micro_batch_tokens
    return policy.update(data, seed=0)


def rollout(advantages, logps):
    response = [9] * len(advantages)
    return Rollout(TokenGroup([5], [response]), [0.0], [logps], [logps], None, None,
                   values=[[0.0] * len(response)], token_rewards=[advantages])  # fmt: skip


# With a critic of zeros and gamma 0 a token's advantage is its own reward.
PLAIN = {"advantage": "gae", "gamma": 0.0, "lam": 0.0, "whiten": False}
SURE, UNSURE = -0.1, -4.1
TOKENS = ([3.0, 1.0, -1.0, -3.0] * 2, [SURE, UNSURE] * 2 + [UNSURE, SURE] * 2)
"""Means 0 and -2.1, so covariances of 6, -2, -2, 6 and -6, 2, 2, -6."""


def test_clip_cov_leaves_out_tokens_of_high_covariance():
    for low, high, candidates in ((5.0, 7.0, [0, 3]), (1.0, 5.0, [5, 6])):
        for share, count in ((2e-4, 1), (0.25, 2)):
            config = CovarianceConfig("clip", share=share, low=low, high=high)
            drawn = set()
            for seed in range(8):
                (result,) = with_advantages(
                    [rollout(*TOKENS)], RLConfig(covariance=config, **PLAIN), seed=seed
                )
                zeros = [i for i, a in enumerate(result.advantages[0]) if a == 0.0]
                assert len(zeros) == count and set(zeros) <= set(candidates)
                drawn |= set(zeros)
            assert drawn == set(candidates)


def test_kl_cov_marks_the_tokens_of_highest_covariance():
    config = RLConfig(covariance=CovarianceConfig("kl", share=0.25), **PLAIN)
    (result,) = with_advantages([rollout(*TOKENS)], config)
    assert result.penalised == [[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    assert result.advantages == [pytest.approx(TOKENS[0])]


@pytest.mark.parametrize("micro_batch_tokens", [4096, 12])
def test_kl_cov_holds_tokens_back(micro_batch_tokens):
    data = groups()
    plain = update(data, **NO_CLIP)
    first, second = update(
        data,
        micro_batch_tokens,
        covariance=CovarianceConfig("kl", share=1.0, kl_coef=10.0),
        **NO_CLIP,
    )
    assert first["loss"] == pytest.approx(plain[0]["loss"], abs=1e-5)  # nothing has moved
    # Both moved alike in the first step; k2 is half the mean of squares, 10 |.| is far above it.
    assert second["loss"] > plain[1]["loss"] + 10 * math.sqrt(2 * second["old_kl_k3"]) / 4


@pytest.mark.parametrize("micro_batch_tokens", [4096, 12])
def test_stale_responses_of_negative_advantage_are_left_out(micro_batch_tokens):
    options = {"advantage": "dr_grpo", "sampling_correction": "none"}
    stale = update(groups(shift=1.0), micro_batch_tokens, off_policy_threshold=0.5, **options)
    assert stale[0]["loss"] == pytest.approx(-0.5 / 2, abs=1e-4)  # of +0.5 and -0.5 the former
    for data, threshold in ((groups(shift=1.0), 1.5), (groups(shift=-1.0), 0.5)):
        kept = update(data, micro_batch_tokens, off_policy_threshold=threshold, **options)
        assert kept[0]["loss"] == pytest.approx(0.0, abs=1e-4)
    unknown = [
        replace(g, completions=[replace(c, sampling_logps=None) for c in g.completions])
        for g in groups()
    ]
    kept = update(unknown, micro_batch_tokens, off_policy_threshold=0.5, **options)
    assert kept[0]["loss"] == pytest.approx(0.0, abs=1e-4)


def test_two_passes_through_the_head_learn_what_one_pass_learns():
    plain = update(groups(), kl_coef=0.1)
    masked = update(groups(), kl_coef=0.1, off_policy_threshold=1e6)
    for one, other in zip(plain, masked, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_n_step_returns_by_hand():
    data = [
        Rollout(TokenGroup([5], [[9] * 3, [9]]), [1.0, 2.0], [[-1.0] * 3, [-1.0]], [], None, None,
                values=[[0.5, 0.25, 0.75], [3.0]])
    ]  # fmt: skip
    config = RLConfig(advantage="gae", num_steps=2, gamma=0.5, whiten=False)
    (result,) = with_advantages(data, config)
    returns = [0.25 * 0.75, 0.5 * 1.0, 1.0]
    assert result.returns == [pytest.approx(returns), pytest.approx([2.0])]
    expected = [r - v for r, v in zip(returns, data[0].values[0])]
    assert result.advantages == [pytest.approx(expected), pytest.approx([-1.0])]


@pytest.mark.parametrize(("max_length", "divisor"), [(None, 3), (12, 12)])
def test_dr_grpo_divides_by_one_length(max_length, divisor):
    """The sums of a prompt's responses are -0.5 * 3 and 0.5 * 2 at first; eight responses."""
    options = {"loss_type": "dr_grpo", "advantage": "dr_grpo", "max_length": max_length}
    first, _ = update(groups(), **options)
    assert first["loss"] == pytest.approx(4 * (-0.5 * 3 + 0.5 * 2) / (8 * divisor), rel=1e-4)


def test_mistakes():
    with pytest.raises(UserError, match="rl.max_length: loss_type grpo makes no use of it, got 3"):
        RLConfig(max_length=3)
    with pytest.raises(UserError, match="max_length must be >= 1, got 0"):
        RLConfig(loss_type="dr_grpo", max_length=0)
    with pytest.raises(UserError, match=r"rl.covariance: share must lie in \(0, 1\].* got 0.0"):
        CovarianceConfig("clip", share=0.0)
    with pytest.raises(UserError, match="off_policy_threshold must be >= 0, got -1"):
        RLConfig(off_policy_threshold=-1.0)
    with pytest.raises(UserError, match="num_steps must be >= 1, got 0"):
        RLConfig(num_steps=0)
    with pytest.raises(UserError, match="num_steps counts tokens"):
        RLConfig(num_steps=2, macro_tokens=2)
    for options in ({"num_steps": 2}, {"macro_tokens": 2}):
        with pytest.raises(UserError, match="advantage grpo makes no use of it, got 2"):
            RLConfig(**options)
