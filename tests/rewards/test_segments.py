"""Rewards of segments: where they end, how they are read, normalised and shared out."""

import math
import random
from dataclasses import replace

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.reward_training import RewardData, train_reward_checkpoint
from rlhf_fast.rewards import ComposedScorer, Compute, FunctionScorer, Part, make_source
from rlhf_fast.rewards.segments import (
    Normaliser,
    Segmenter,
    SegmentScorer,
    fit_normaliser,
    lengths_of,
    segment_rewards,
    sentence_ends,
)
from rlhf_fast.training.advantages import with_advantages
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.reward import RewardTrainingConfig
from rlhf_fast.training.rl_config import RLConfig
from rlhf_fast.types import Completion, Prompt, scored_group_from_json, to_json
from tests.online.helpers import pair_rows, write_rows
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.test_on_policy import rollout

PROMPT = Prompt("p", [{"role": "user", "content": "w30"}])
TREES = [
    TokenGroup([5, 30], [[21, 7, 22, 23, 7, 3], [24, 25]]),
    TokenGroup([5, 31, 32], [[26, 8, 27], [28], [29, 7, 40, 41]]),
]


def test_sentences_end_at_punctuation_but_not_within_numbers():
    pieces = ["It", " is", " 3", ".", "14", ".", " No", "!", " Yes", "\n", "end"]
    ends = [i for i, is_end in enumerate(sentence_ends(pieces)) if is_end]
    assert ends == [5, 7, 9, 10]
    assert sentence_ends(["a"]) == [True]
    assert lengths_of([False, True, True, False, True]) == [2, 1, 2]


def test_segments_begin_where_the_entropy_is_high():
    model = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    entropies = []
    for group in TREES:
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response])
            with torch.no_grad():
                logits = model.model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1]
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    threshold = torch.cat(entropies).median().item()
    marked = Segmenter(tiny_tokenizer(), threshold, model).mark(TREES)
    got = [marks for group in marked for marks in group.trained]
    assert got == [[*(e[1:] > threshold).tolist(), True] for e in entropies]
    assert {len(set(marks)) for marks in got} == {1, 2}  # some tokens end one and some do not


def reward_model(path, tmp_path):
    model = fresh_reward_model(path)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "rm")
    tiny_tokenizer().save_pretrained(tmp_path / "rm")
    return RewardModel.load(str(tmp_path / "rm"), precision="fp32")


def test_the_model_is_read_at_the_ends(model_path, tmp_path):
    model = reward_model(model_path, tmp_path)
    marked = Segmenter(tiny_tokenizer()).mark(TREES)
    for group, rows in zip(marked, segment_rewards(model, marked)):
        for response, marks, got in zip(group.responses, group.trained, rows):
            ends = [i + 1 for i, is_end in enumerate(marks) if is_end]
            prefixes = TokenGroup(group.prompt_ids, [response[:end] for end in ends])
            (expected,) = model.map_responses([prefixes], model.rewards)
            assert got == pytest.approx(expected, abs=1e-4)


def completions():
    chat = tiny_tokenizer()
    rows = [[21, 7, 22, 3], [23, 24]]
    texts = [chat.decode(ids, skip_special_tokens=True) for ids in rows]
    return [Completion(PROMPT, t, [5, 30], ids, True) for t, ids in zip(texts, rows)]


def test_a_plain_reward_model_pays_at_the_end_of_every_sentence(model_path, tmp_path):
    model = reward_model(model_path, tmp_path)
    source = RewardConfig(model=str(tmp_path / "rm"), segments="sentences")
    (scored,) = make_source(source, Compute("cpu", "fp32"), seed=0).score([completions()])
    prefixes = TokenGroup([5, 30], [[21, 7], [21, 7, 22, 3], [23, 24]])
    (values,) = model.map_responses([prefixes], model.rewards)
    first, second = scored.token_rewards
    assert first == pytest.approx([0, values[0], 0, values[1]], abs=1e-4)
    assert second == pytest.approx([0, values[2]], abs=1e-4)
    assert scored.rewards == pytest.approx([values[0] + values[1], values[2]], abs=1e-4)
    assert scored_group_from_json(to_json(scored)) == scored


def test_texts_without_tokens_are_read_too(model_path, tmp_path):
    """As in the accuracy of a reward on pairs of texts."""
    model = reward_model(model_path, tmp_path)
    scorer = SegmentScorer(model, Segmenter(model.tokenizer))
    (sampled,) = scorer.score([completions()])
    texts = [replace(c, token_ids=[], prompt_token_ids=[]) for c in completions()]
    (read,) = scorer.score([texts])
    assert read.token_rewards is None and len(read.rewards) == len(sampled.rewards)
    with pytest.raises(UserError, match="needs sampled responses"):
        FunctionScorer(by_token, per_token=True).score([texts])


def test_normaliser_recovers_the_lines():
    rng = random.Random(0)
    places = [rng.uniform(0.05, 1) for _ in range(20_000)]
    rewards = [2 * math.log(p) + 1 + rng.gauss(0, 1) * (0.5 - 0.2 * math.log(p)) for p in places]
    fitted = fit_normaliser(rewards, places)
    assert fitted.mean == pytest.approx((2.0, 1.0), abs=0.05)
    assert fitted.deviation == pytest.approx((-0.2, 0.5), abs=0.05)
    assert Normaliser((2.0, 1.0), (-0.2, 0.5))(1.25, 1.0) == pytest.approx(0.5)
    alike = fit_normaliser([3.0, 3.0], [1.0, 1.0])
    assert alike(3.0, 1.0) == 0.0


def test_a_trained_segment_model_shares_its_reward_out(model_path, tmp_path):
    data = RewardData.load(write_rows(tmp_path / "p.jsonl", pair_rows()), None)
    training = RewardTrainingConfig(
        "segments",
        segments="sentences",
        holdout_share=0.25,
        optimizer=OptimizerConfig(learning_rate=3e-3, num_epochs=10, batch_size=16),
    )
    compute = Compute("cpu", "fp32", 4096)
    metrics = train_reward_checkpoint(
        tmp_path / "rm",
        model_path,
        training,
        data,
        compute=compute,
        seed=0,
        on_step=lambda row, total: None,
        log=tmp_path / "metrics.jsonl",
    )
    assert metrics["held_out_accuracy"] == 1.0
    scorer = make_source(RewardConfig(model=str(tmp_path / "rm")), compute, seed=0)
    assert isinstance(scorer, SegmentScorer)
    (scored,) = scorer.score([completions()])
    shares = scored.token_rewards[0]
    assert shares[0] == shares[1] and shares[2] == shares[3]  # evenly over each sentence
    marked = scorer.segmenter.mark([TokenGroup([5, 30], [[21, 7, 22, 3]])])
    ((one, two),) = segment_rewards(scorer.model, marked)[0]
    place = scorer.normaliser
    assert 2 * shares[0] == pytest.approx(place(one, 0.5) / 2, abs=1e-4)
    assert scored.rewards[0] == pytest.approx((place(one, 0.5) + place(two, 1.0)) / 2, abs=1e-4)


def test_shares_reach_their_tokens_and_the_rest_the_last_one():
    values = [[0.0, 0.0, 0.0]]
    given = rollout([1.0], [3], values=values)
    given = type(given)(**{**vars(given), "token_rewards": [[0.25, 0.5, 0.0]]})
    options = {"advantage": "gae", "gamma": 1.0, "lam": 0.0, "whiten": False}
    (result,) = with_advantages([given], RLConfig(**options))
    assert result.advantages == [pytest.approx([0.25, 0.5, 0.25])]
    (plain,) = with_advantages([rollout([1.0], [3], values=values)], RLConfig(**options))
    assert plain.advantages == [pytest.approx([0.0, 0.0, 1.0])]


def by_token(completion_ids, **_):
    return [[float(i) for i in range(len(ids))] for ids in completion_ids]


def test_parts_add_up_token_by_token():
    parts = {
        "dense": Part(FunctionScorer(by_token, per_token=True), 2.0),
        "whole": Part(FunctionScorer(lambda completions, **_: [1.0] * len(completions)), 3.0),
    }
    (scored,) = ComposedScorer(parts).score([completions()])
    assert scored.rewards == [2 * 6 + 3, 2 * 1 + 3]
    assert scored.token_rewards == [[0, 2, 4, 6], [0, 2]]


def test_mistakes(model_path, tmp_path):
    with pytest.raises(UserError, match="segments and segment_model go with model"):
        RewardConfig(function="helpers:varied", segments="sentences")
    with pytest.raises(UserError, match="per_token goes with function, without steps"):
        RewardConfig(function="helpers:varied", steps="sum", per_token=True)
    with pytest.raises(UserError, match="one reward for each of 4 tokens, got 1"):
        FunctionScorer(lambda **_: [[1.0], [1.0]], per_token=True).score([completions()])
    reward_model(model_path, tmp_path)
    source = RewardConfig(model=str(tmp_path / "rm"), segments="entropy")
    with pytest.raises(UserError, match="give reward.segment_model"):
        make_source(source, Compute("cpu", "fp32"), seed=0)
    source = RewardConfig(model=str(tmp_path / "rm"), segments="sentences")
    other = [Completion(PROMPT, "something else", [5], [21, 7], True)]
    with pytest.raises(UserError, match="need a model with the policy's tokenizer"):
        make_source(source, Compute("cpu", "fp32"), seed=0).score([other])
