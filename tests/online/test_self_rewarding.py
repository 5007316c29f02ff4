"""The policy judges its own responses, in every iteration with the weights it then has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.generation.chat import ChatGenerator
from rlhf_fast.generation.hf import HFGenerator
from rlhf_fast.io import write_jsonl
from rlhf_fast.models.chat import ChatFormat, load_tokenizer
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.config_file import config_with
from rlhf_fast.online.self_judge import answers_of
from rlhf_fast.online.stages.responses import Score
from rlhf_fast.online.workflow import run_online
from rlhf_fast.recipes import METHODS
from rlhf_fast.rewards.judge import JudgeConfig
from rlhf_fast.rewards.pairwise import PairwiseScorer
from rlhf_fast.rewards.policy_judge import PolicyJudge
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import group_from_json, to_json
from tests.online.helpers import rows_of
from tests.records import completion


def asked(path):
    chat = ChatFormat(load_tokenizer(path))
    backend = HFGenerator(
        path,
        decode=chat.decode,
        stop_token_ids=chat.stop_token_ids,
        dtype="float32",
        batch_size=256,
    )
    generator = ChatGenerator(backend, chat, sampling=None)
    return lambda questions, **options: answers_of(generator, questions, **options)


def test_every_iteration_is_judged_by_its_own_policy(config, judging_path):
    config = config_with(config, METHODS["self-rewarding"][1], "test")
    changes = {
        "reward": {"judge": {"max_tokens": 6}},
        "data": {"demonstrations": None},
        "dpo": {"optimizer": {"learning_rate": 1e-2}},
    }
    config = config_with(replace(config, model=judging_path), changes, "test")
    run_online(config)
    run = Path(config.output_dir)
    policies = {1: judging_path, 2: str(run / "iteration_1" / "policy")}
    rewards = {}
    for iteration in policies:
        groups = rows_of(run / f"iteration_{iteration}" / "scored.jsonl")
        pairs = rows_of(run / f"iteration_{iteration}" / "pairs.jsonl")
        assert pairs and all(p["chosen_reward"] > p["rejected_reward"] for p in pairs)
        rewards[iteration] = [reward for group in groups for reward in group["rewards"]]
        records = [group_from_json(group) for group in groups]
        judge = PolicyJudge(
            config.reward.judge, asked(policies[iteration]), seed=derive_seed(config.seed, "judge")
        )
        expected = [reward for group in judge.score(records) for reward in group.rewards]
        assert rewards[iteration] == pytest.approx(expected)
    assert len(set(rewards[1])) > 3


def test_the_policys_answers_are_read_like_a_judges():
    """A rating is the mean of the samples; silence is asked again, with another seed."""
    seen = []

    def ask(questions, **options):
        seen.append((len(questions), options))
        return [
            ["well [[4]]", "[[7]]"] if "good" in q or len(seen) > 1 else ["", "[[7]]"]
            for q in questions
        ]

    config = JudgeConfig(policy=True, mode="rate", samples=2, max_tokens=9)
    judge = PolicyJudge(config, ask, seed=5)
    group = [completion("good"), completion("bad")]
    (scored,) = judge.score([group])
    assert scored.rewards == [5.5, 5.5]
    options = {"count": 2, "temperature": 1.0, "max_tokens": 9}
    assert seen == [(2, {**options, "seed": 5}), (1, {**options, "seed": 6})]
    judge.score([group])
    assert seen[2][0] == 2  # by then the policy may be another
    silent = PolicyJudge(config, lambda questions, **_: [["no", "no"] for _ in questions])
    with pytest.raises(UserError, match=r"the judge 'policy' gave no verdict .* got 'no'"):
        silent.score([group])


def test_the_policy_may_compare(config):
    def ask(questions, **_):
        return [["[[A]]" if "better\n\n[Response B]" in q else "[[B]]"] for q in questions]

    judge = PolicyJudge(JudgeConfig(policy=True), ask)
    (scored,) = PairwiseScorer(judge).score([[completion("worse"), completion("better")]])
    assert scored.rewards == [0.0, 1.0]


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="judge.policy asks no server: .* got http://x"):
        JudgeConfig(url="http://x", policy=True)
    with pytest.raises(UserError, match="reward: give one of .* got model, judge"):
        RewardConfig(model="m", judge=JudgeConfig(policy=True))
    file = tmp_path / "completions.jsonl"
    write_jsonl(file, [to_json([completion("x")])])
    stage = Score(
        completions=str(file),
        output=str(tmp_path / "scored.jsonl"),
        reward=RewardConfig(judge=JudgeConfig(policy=True)),
        device="cpu",
    )
    with pytest.raises(UserError, match="judge.policy is for online runs"):
        stage.run()
