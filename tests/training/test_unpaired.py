"""KTO and its relatives; tests/training/test_trajectories.py holds KTO's steps to the textbook."""

from dataclasses import replace

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import AdapterConfig
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.optimizer import OptimizerConfig
from rlhf_fast.training.runs import UnpairedRun, run_unpaired
from rlhf_fast.training.unpaired import (
    UNPAIRED_LOSSES,
    ScoredUnpairedConfig,
    UnpairedConfig,
    mismatched,
    train_unpaired,
)
from tests.tiny import tiny_model
from tests.training.run_options import common, metrics, pairs

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, num_epochs=4, batch_size=4)
GROUPS = [TokenGroup([5, 20 + i], [[30 + i, 40 + i, 3], [50 + i, 3]]) for i in range(4)]
LABELS = [[True, False], [False, False], [True, True], [False, True]]


def language_model(seed, micro_batch_tokens=4096):
    options = {"precision": "fp32", "micro_batch_tokens": micro_batch_tokens}
    return LanguageModel(tiny_model(seed=seed), pad_token_id=3, **options)


def rotated(prompts):
    groups = [TokenGroup(prompt, [[90 + i]]) for i, prompt in enumerate(prompts)]
    return groups, mismatched(groups)


@pytest.mark.parametrize("prompts", [[[1], [2]], [[1], [1], [2], [3]], [[2], [1], [2], [3], [1]]])
def test_every_prompt_gets_a_response_to_another_one(prompts):
    groups, others = rotated(prompts)
    prompt_of = {group.responses[0][0]: group.prompt_ids for group in groups}
    assert [other.prompt_ids for other in others] == prompts
    assert sorted(o.responses[0][0] for o in others) == sorted(prompt_of)
    assert all(prompt_of[o.responses[0][0]] != o.prompt_ids for o in others)


def test_a_response_to_another_prompt_makes_no_row_longer():
    groups = [TokenGroup([1], [[9] * 8]), TokenGroup([2] * 6, [[9]])]
    assert [other.path_length for other in mismatched(groups)] == [2, 9]
    with pytest.raises(UserError, match=r"no prompt may have more than half .* got 2 of 3"):
        rotated([[1], [1], [2]])


@pytest.mark.parametrize("micro_batch_tokens", [4096, 12])
@pytest.mark.parametrize("loss_type", UNPAIRED_LOSSES)
def test_the_first_loss_by_hand(loss_type, micro_batch_tokens):
    """Each loss of its own log-ratios, with what the batch tells to be neutral."""
    policy, reference = language_model(0, micro_batch_tokens), language_model(1)

    def log_ratios(groups):
        scores = [torch.tensor(m.score_groups(groups)).flatten() for m in (policy, reference)]
        return scores[0] - scores[1]

    ratios, baseline = log_ratios(GROUPS), None
    if loss_type == "kto":
        baseline = log_ratios(mismatched(GROUPS)).mean().clamp(min=0)
        assert baseline > 0.05
    if loss_type == "bco_pair":
        baseline = ratios.mean()
    expected = ops.unpaired_preference_loss_ref(
        ratios,
        torch.tensor(LABELS).flatten(),
        torch.zeros_like(ratios),
        loss_type=loss_type,
        beta=0.1,
        params=ops.PreferenceParams(chosen_weight=2.0),
        data=ops.PairData(baseline=baseline),
    ).loss
    config = UnpairedConfig(loss_type, desirable_weight=2.0, optimizer=OPTIMIZER)
    (row, *_) = train_unpaired(policy, GROUPS, LABELS, config=config, reference=reference, seed=0)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-4)
    if baseline is not None:
        assert row["baseline"] == pytest.approx(baseline.item(), rel=1e-4)


def test_rewards_tell_which_responses_are_desirable():
    config = ScoredUnpairedConfig()
    assert config.labels([1.0, 3.0, 2.0]) == [False, True, False]
    assert config.labels([0.1] * 3) == []
    assert ScoredUnpairedConfig(min_reward=2.0).labels([1.0, 3.0, 2.0]) == [False, True, True]


def labelled(count=12):
    """The responses of `pairs`, one to a row, good and bad ones in turn."""
    rows = [(row["prompt"], row[name]) for row in pairs(count) for name in ("chosen", "rejected")]
    return [
        {"prompt": prompt, "completion": text, "label": text == "w50 w51"} for prompt, text in rows
    ]


@pytest.mark.parametrize("lora", [AdapterConfig(), AdapterConfig(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("rows", [labelled, pairs])
def test_a_run_learns_from_labelled_rows_or_pairs(tmp_path, model, rows, lora):
    options = common(tmp_path, model, rows(), lora=lora)
    path = run_unpaired(UnpairedRun(**options, unpaired=UnpairedConfig(optimizer=OPTIMIZER)))
    first, *_, last = metrics(tmp_path)
    assert first["loss"] == pytest.approx(0.5, abs=1e-5) and last["loss"] < 0.45
    assert last["reward_accuracy"] == 1.0
    assert last["desirable_reward"] > 0 > last["undesirable_reward"]
    assert (path / "adapter_model.safetensors").exists() == (lora.rank > 0)
    assert len(list((tmp_path / "data.jsonl.reference").iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": "yes"}, "row 3: `label` must be true or false, got 'yes'"),
        ({"label": 1}, "row 3: `label` must be true or false, got 1"),
        ({"label": None}, "row 3: `label` must be true or false, got None"),
    ],
)
def test_bad_labels_are_refused(tmp_path, model, change, says):
    rows = labelled()
    rows[2] |= change
    with pytest.raises(UserError, match=says):
        run_unpaired(UnpairedRun(**common(tmp_path, model, rows)))


def test_rows_without_a_label_are_refused(tmp_path, model):
    rows = [{"prompt": "w20", "completion": "w21"}]
    with pytest.raises(UserError, match="row 1: field `label` is missing"):
        run_unpaired(UnpairedRun(**common(tmp_path, model, rows)))


def test_mistakes():
    with pytest.raises(UserError, match="unpaired.loss_type must be one of nca_pair, bco_pair"):
        UnpairedConfig("sigmoid")
    with pytest.raises(UserError, match="undesirable_weight >= 0, got 0.1, 1.0 and -1"):
        replace(UnpairedConfig(), undesirable_weight=-1)
