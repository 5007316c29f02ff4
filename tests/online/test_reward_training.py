"""Reward models of every objective, trained in the loop, alone, and with a gate."""

import json
from dataclasses import replace

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.gating import Gate
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.reward_training import (
    RewardData,
    train_reward_checkpoint,
    untrained_reward_model,
)
from rlhf_fast.online.workflow import run_online
from rlhf_fast.rewards import Compute
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.gating import GateConfig
from rlhf_fast.training.reward import RewardTrainingConfig
from rlhf_fast.training.reward_regression import ordered
from tests.online.helpers import pair_rows, rows_of, write_rows
from tests.tiny import tiny_model, tiny_tokenizer

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, num_epochs=10, batch_size=16)


def score_rows(count: int = 24) -> list[dict]:
    """`helpful` likes w50, `brief` w60; two prompts in three ask for help (w30)."""
    rows = []
    for i in range(count):
        scores = [{"helpful": 1.0, "brief": -1.0}, {"helpful": -1.0, "brief": 1.0}]
        prompt = f"{'w30' if i % 3 else 'w31'} w{100 + i}"
        rows.append({"prompt": prompt, "responses": ["w50", "w60"], "scores": scores})
    return rows


def wishes(count: int = 24) -> list[dict]:
    """Who asks with w30 prefers w50, who asks with w31 prefers w60."""
    rows = []
    for i in range(count):
        best = ["w50", "w60"] if i % 2 else ["w60", "w50"]
        prompt = f"{'w30' if i % 2 else 'w31'} w{200 + i}"
        rows.append({"prompt": prompt, "chosen": best[0], "rejected": best[1]})
    return rows


OBJECTIVES = {
    "pairs": {"num_outputs": 3, "label_smoothing": 0.1, "label_update_rate": 0.2},
    "pairwise": {},
    "segments": {"entropy_threshold": 6.2},
    "quantiles": {"num_outputs": 4},
    "rankings": {},
    "binary": {},
    "attributes": {},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loop_trains_by_every_objective(config, answering_path, tmp_path, objective):
    training = RewardTrainingConfig(
        objective, optimizer=replace(OPTIMIZER, num_epochs=1), **OBJECTIVES[objective]
    )
    reward = RewardConfig(labeller="helpers:varied", training=training)
    run_online(replace(config, model=answering_path, num_iterations=1, reward=reward))
    run = tmp_path / "run"
    (metrics,) = rows_of(run / "reward_model" / "metrics.jsonl")
    assert 0 <= metrics["accuracy"] <= 1
    by_pairs = objective in ("pairs", "segments", "pairwise")
    assert (run / "reward_model" / f"{'pairs' if by_pairs else 'labelled'}.jsonl").exists()
    rewards = [r for g in rows_of(run / "iteration_1/scored.jsonl") for r in g["rewards"]]
    assert len(set(rewards)) > 1
    if objective == "pairwise":
        assert all(0 <= r <= 1 for r in rewards)


def trained(path, base, objective, data, **options):
    options = {"optimizer": OPTIMIZER, **options}
    training = RewardTrainingConfig(objective, holdout_share=0.25, **options)
    compute = Compute("cpu", "fp32", 4096)
    options = {"compute": compute, "seed": 0, "on_step": lambda row, total: None}
    log = path.parent / "metrics.jsonl"
    return train_reward_checkpoint(path, base, training, data, log=log, **options)


def test_the_gate_weighs_attributes_by_the_prompt(model_path, tmp_path):
    scores = write_rows(tmp_path / "scores.jsonl", score_rows())
    pairs = write_rows(tmp_path / "pairs.jsonl", wishes())
    data = RewardData.load(pairs, scores)
    gate = GateConfig(width=32, num_steps=300, batch_size=16, learning_rate=1e-2)
    trained(tmp_path / "rm", model_path, "attributes", data, gate=gate)
    model = RewardModel.load(str(tmp_path / "rm"), precision="fp32")
    groups = [
        model.token_group(p.prompt.messages, [p.chosen, p.rejected], p.finished) for p in data.pairs
    ]
    rewards = torch.tensor(model.map_responses(groups, model.rewards))
    assert (rewards[:, 0] > rewards[:, 1]).all()
    ungated = torch.tensor(model.map_responses(groups, model.outputs)).mean(-1)
    assert not (ungated[:, 0] > ungated[:, 1]).all()  # no fixed weights can do it
    assert json.loads((tmp_path / "rm/config.json").read_text())["reward_outputs"] == [
        "brief",
        "helpful",
    ]


def test_gate_by_hand_and_round_trip(tmp_path):
    gate = Gate(4, 3, width=8).eval()
    features = torch.randn(5, 4)
    h = features
    for layer in (0, 3, 6):
        h = torch.relu(gate.layers[layer](h))
    expected = gate.scale * torch.softmax(gate.layers[9](h) / 10, -1)
    torch.testing.assert_close(gate(features), expected)
    gate.save(tmp_path / "g" / "gate.safetensors")
    again = Gate.load(tmp_path / "g" / "gate.safetensors")
    torch.testing.assert_close(again(features), gate(features))
    (tmp_path / "g" / "gate.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="damaged gate"):
        Gate.load(tmp_path / "g" / "gate.safetensors")


def test_rankings_order_all_responses(model_path, tmp_path):
    three = {"responses": ["w50", "w60", "w70"], "scores": [2, 0, 1]}
    rows = [{"prompt": f"w{100 + i}", **three} for i in range(24)]
    data = RewardData.load(None, write_rows(tmp_path / "s.jsonl", rows))
    metrics = trained(tmp_path / "rm", model_path, "rankings", data)
    assert metrics["held_out_accuracy"] == 1.0


def test_binary_scores_need_no_second_response(model_path, tmp_path):
    rows = [
        {"prompt": f"w{100 + i}", "response": f"w{50 + i % 2}", "score": i % 2} for i in range(24)
    ]
    data = RewardData.load(None, write_rows(tmp_path / "s.jsonl", rows))
    metrics = trained(tmp_path / "rm", model_path, "binary", data)
    assert metrics["held_out_accuracy"] == 1.0
    rows[0]["score"] = 7
    wrong = RewardData.load(None, write_rows(tmp_path / "w.jsonl", rows))
    with pytest.raises(UserError, match="objective binary is of scores in"):
        trained(tmp_path / "other", model_path, "binary", wrong)


def test_pairwise_accuracy(answering_path, tmp_path):
    data = RewardData.load(write_rows(tmp_path / "p.jsonl", pair_rows()), None)
    metrics = trained(tmp_path / "rm", answering_path, "pairwise", data)
    assert metrics["num_held_out_pairs"] == 5 and metrics["held_out_accuracy"] == 1.0


def test_mistakes(model_path, tmp_path):
    pairs = RewardData.load(write_rows(tmp_path / "p.jsonl", pair_rows()), None)
    both = replace(pairs, scored=RewardData.load(None, one_score(tmp_path)).scored)
    with pytest.raises(UserError, match="quantiles learns from scored responses, got none"):
        trained(tmp_path / "rm", model_path, "quantiles", pairs)
    with pytest.raises(UserError, match="pairs has no use for both pairs and scores"):
        trained(tmp_path / "rm", model_path, "pairs", both)
    two = RewardData.load(None, write_rows(tmp_path / "two.jsonl", score_rows()))
    with pytest.raises(UserError, match="rankings is of one score, got"):
        trained(tmp_path / "rm", model_path, "rankings", two)
    with pytest.raises(UserError, match="parameters head fits one output to pairs"):
        RewardTrainingConfig("quantiles", parameters="head")


def one_score(tmp_path) -> str:
    return write_rows(tmp_path / "one.jsonl", [{"prompt": "w1", "response": "w2", "score": 1}])


def test_equal_rewards_order_nothing():
    best_first = [[2.0], [1.0], [0.0]]
    for scores in (best_first, best_first[::-1]):
        assert ordered([0.5] * 3, scores) == [0.0] * 3
    assert ordered([3.0, 1.0, 2.0], best_first) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("pad", [None, "<end>", "<pad>"])
def test_other_tools_find_a_responses_end(tmp_path, pad):
    """transformers reads a reward before the first pad token and wants one in its configuration."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    tiny_model(pad_token_id=None).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = untrained_reward_model(tmp_path / "base", RewardTrainingConfig(), Compute("cpu"))
    found = model.model.config.pad_token_id
    assert found is not None and found != model.chat.end_token_id
    assert pad != "<pad>" or found == tokenizer.pad_token_id
