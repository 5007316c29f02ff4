"""Return-conditioned training: every response follows the prompt that asks for its level."""

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.condition import ConditionConfig, ConditionedChat
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.online.config import GenerationConfig, OnlineConfig
from rlhf_fast.online.parts import Parts
from rlhf_fast.online.selectors import SelectionConfig
from rlhf_fast.rewards import Compute
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.selected import NLLPolicy
from rlhf_fast.types import Completion, Prompt, ScoredGroup
from tests.tiny import tiny_model, tiny_tokenizer

CONDITION = ConditionConfig(bounds=(0.0, 1.0), text="w20{level}")
PROMPTS = [Prompt(str(i), [{"role": "user", "content": f"w{30 + i}"}]) for i in range(4)]
GOOD, BAD = [300, 301, 3], [400, 401, 3]


def test_levels_begin_at_their_bounds():
    assert [CONDITION.level(reward) for reward in (-1.0, 0.0, 0.5, 1.0, 9.0)] == [1, 2, 2, 3, 3]


def test_prompts_ask_for_the_highest_level_and_rewards_do_not_see_it(model_path):
    parts = Parts(model_path, Compute("cpu", "fp32", 4096), CONDITION)
    config = GenerationConfig(backend="hf", sampling=SamplingConfig(max_new_tokens=4))
    generator = parts.generator(model_path, config, seed=0, prompts=PROMPTS)
    groups = generator.generate(PROMPTS, num_generations=1, seed=0)
    plain = Parts(model_path, Compute("cpu", "fp32", 4096)).chat
    for prompt, (completion,) in zip(PROMPTS, groups):
        assert completion.prompt == prompt
        assert [i for i in completion.prompt_token_ids if i not in range(201, 204)] == (
            plain.prompt_ids(prompt.messages)
        )
        assert 203 in completion.prompt_token_ids


def test_the_policy_learns_what_each_level_answers():
    chat = ConditionedChat(tiny_tokenizer(), CONDITION)
    models = (LanguageModel(tiny_model(), pad_token_id=3, precision="fp32") for _ in range(2))
    config = OptimizerConfig(learning_rate=1e-2, num_epochs=40, batch_size=8)
    policy = NLLPolicy(*models, tiny_tokenizer(), config=config, chat=chat)
    groups = [
        ScoredGroup(
            prompt,
            [
                Completion(prompt, "", chat.prompt_ids(prompt.messages), t, True)
                for t in (GOOD, BAD)
            ],
            [2.0, -1.0],
        )
        for prompt in PROMPTS
    ]
    policy.update(groups, seed=0)
    messages = PROMPTS[0].messages
    for level, wanted in ((3, GOOD), (1, BAD)):
        group = TokenGroup(chat.prompt_ids(messages, level), [GOOD, BAD])
        (logps,) = policy.model.score_groups([group])
        assert max(logps) == logps[[GOOD, BAD].index(wanted)] > min(logps) + 1


def test_mistakes():
    with pytest.raises(UserError, match=r"condition.bounds must ascend, got \(1.0, 0.0\)"):
        ConditionConfig(bounds=(1.0, 0.0))
    with pytest.raises(UserError, match="condition.text must have {level} in it, got 'good'"):
        ConditionConfig(text="good")
    with pytest.raises(UserError, match="condition is for algorithm nll .* got rl"):
        OnlineConfig(algorithm="rl", selection=SelectionConfig(rule="all"), condition=CONDITION)
