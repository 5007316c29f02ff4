"""OREAL: credit by hand, a token-level reward model that finds the deciding token, the update."""

import math

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.rl_config import RLConfig
from rlhf_fast.training.token_credit import (
    OutcomeConfig,
    TokenCredit,
    fit_token_credit,
    outcome_advantages,
)
from rlhf_fast.training.token_values import token_values
from rlhf_fast.types import Completion, Prompt, ScoredGroup
from tests.training.test_on_policy import policy_of

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, batch_size=8, num_epochs=8, schedule="constant")
OPTIONS = {"device": "cpu", "pad_token_id": 3, "precision": "fp32"}


def groups(count=16, decisive=50, neutral=60):
    """Two responses per prompt: w50 makes the first right, w60 is in the place of it."""
    prompts = [[5, 100 + i] for i in range(count)]
    return [TokenGroup(p, [[70, decisive, 71], [70, neutral, 71]]) for p in prompts]


def test_advantages_by_hand():
    config = OutcomeConfig(right_reward=1.0, wrong_weight=0.5)
    certain = 40.0  # sigmoid is 1: the token counts fully for a right response, not for a wrong one
    scores = [[certain, 0.0], [-certain], [certain, -certain], [math.log(3), -math.log(3)]]
    got = outcome_advantages([1.0, 0.0, 0.0, 0.0], scores, config)
    wrong = -0.5 * (1 / 3) * 4 / (2 * 3)
    assert got == [
        pytest.approx([2.0, 0.0]),
        pytest.approx([wrong]),
        pytest.approx([0.0, wrong]),
        pytest.approx([0.0, 0.5 * wrong]),
    ]


def test_one_right_and_one_wrong_are_the_papers():
    got = outcome_advantages([1.0, 0.0], [[40.0], [-40.0]], OutcomeConfig())
    assert got == [pytest.approx([1.0]), pytest.approx([-0.5])]


def test_groups_of_one_outcome_are_defined():
    right = outcome_advantages([1.0, 1.0], [[40.0], [40.0]], OutcomeConfig())
    wrong = outcome_advantages([0.0, 0.0], [[-40.0], [-40.0]], OutcomeConfig())
    assert right == [pytest.approx([0.5])] * 2 and wrong == [pytest.approx([0.0])] * 2


def test_scores_are_read_after_each_token(model_path):
    model = TokenCredit.load(model_path, **OPTIONS)
    assert not model.head.weight.any()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    (tree,) = groups(1)
    (shared,) = token_values(model, [tree], model.scores)
    for response, got in zip(tree.responses, shared):
        ids = torch.tensor([tree.prompt_ids + response])
        with torch.no_grad():
            expected = model.model(input_ids=ids, use_cache=False).logits[0, 2:, 0]
        torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=1e-4)


def test_the_deciding_token_is_found(model_path):
    model = TokenCredit.load(model_path, **OPTIONS)
    examples = groups()
    rows = fit_token_credit(model, examples, [[True, False]] * 16, config=OPTIMIZER, seed=0)
    assert rows[-1]["accuracy"] == 1.0 and rows[-1]["loss"] < 0.1 < rows[0]["loss"]
    right, wrong = token_values(model, groups(1), model.scores)[0]
    assert right[1] > 1 and wrong[1] < -1
    assert right[0] == pytest.approx(wrong[0], abs=1e-4)  # before it the two are the same


def scored(count=8):
    def completion(prompt, ids):
        return Completion(prompt, "", [5, int(prompt.id)], ids, True, None)

    result = []
    for i in range(count):
        prompt = Prompt(str(100 + i), [{"role": "user", "content": "w1"}])
        responses = [completion(prompt, [70, token, 71]) for token in (50, 60)]
        result.append(ScoredGroup(prompt, responses, [1.0, 0.0]))
    return result


def likelihood(policy, token):
    tokens = [TokenGroup([5, 100 + i], [[70, token]]) for i in range(8)]
    return sum(row[0] for row in policy.model.score_groups(tokens))


def test_the_update_moves_towards_what_was_right(model_path, tmp_path):
    options = {"loss_type": "reinforce", "advantage": "oreal"}
    policy = policy_of(model_path, outcome=OutcomeConfig(learning_rate=1e-2), **options)
    before = likelihood(policy, 50) - likelihood(policy, 60)
    for step in range(3):
        rows = policy.update(scored(), seed=step)
    assert likelihood(policy, 50) - likelihood(policy, 60) > before + 8 * 0.2
    assert rows[-1]["credit_accuracy"] == 1.0 and math.isfinite(rows[-1]["credit_loss"])
    policy.save(tmp_path / "iteration_1" / "policy")
    again = policy_of(model_path, **options)
    again.load(tmp_path / "iteration_1" / "policy")
    assert torch.equal(again.credit.head.weight, policy.credit.head.weight)


def test_mistakes():
    with pytest.raises(UserError, match="oreal takes kl_coef, not reward_kl_coef"):
        RLConfig(advantage="oreal", reward_kl_coef=0.1)
    with pytest.raises(UserError, match="rl.outcome: learning_rate must be > 0"):
        OutcomeConfig(learning_rate=0.0)
