"""Stand-alone training: files in, model directory out, every row accounted for."""

import json
import math
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import tyro
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import AdapterConfig, LoraConfig, add_lora
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.online.stages.models import SFT
from rlhf_fast.training.__main__ import main
from rlhf_fast.training.engine_state import gathered
from rlhf_fast.training.lengths import LengthConfig
from rlhf_fast.training.optimizer import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig
from rlhf_fast.training.reward import RewardTrainingConfig
from rlhf_fast.training.runs import (
    PairwiseRun,
    PreferenceRun,
    RewardRun,
    SFTRun,
    run_pairwise_model,
    run_preference,
    run_reward_model,
    run_sft,
)
from rlhf_fast.training.session import ComputeOptions, OutputConfig
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.run_options import OPTIMIZER, common, metrics, pairs


def test_sft_of_conversations_plain_rows_and_text(tmp_path, model):
    turns = ["user", "assistant", "user", "assistant"]
    talk = [{"role": role, "content": f"w{30 + i}"} for i, role in enumerate(turns)]
    shared = [{"from": "human", "value": "w40"}, {"from": "gpt", "value": "w41"}]
    rows = [
        {"messages": talk},
        {"conversations": shared},
        {"prompt": "w20", "response": "w21"},
        {"text": "w22 w23 w24"},
    ]
    path = run_sft(SFTRun(**common(tmp_path, model, rows), optimizer=OPTIMIZER))
    AutoModelForCausalLM.from_pretrained(path)
    assert len(metrics(tmp_path)) == 2
    card = ModelCard.load(path / "README.md")
    assert (
        "sft" in card.data.tags and f"| loss | {metrics(tmp_path)[-1]['loss']:.4g} |" in card.text
    )
    summary = json.loads((tmp_path / "run" / "data.json").read_text())
    assert summary["num_kept"] == 4 and summary["num_refused"] == 0
    with pytest.raises(UserError, match="holds a finished run"):
        run_sft(SFTRun(**common(tmp_path, model, rows), optimizer=OPTIMIZER))


def test_rows_are_refused_with_reasons_or_stop_the_run(tmp_path, model):
    rows = [
        *pairs(4),
        {"prompt": "w20", "chosen": "w21"},
        {"prompt": "w20", "chosen": "w21", "rejected": "w21"},
        {"prompt": "w20", "chosen": "w21", "rejected": "w22 " * 50},
    ]
    options = common(tmp_path, model, rows, lengths=LengthConfig(max_length=30))
    config = DPOConfig(optimizer=OPTIMIZER)
    with pytest.raises(UserError, match=r"data.jsonl, row 5: field `rejected` is missing"):
        run_preference(PreferenceRun(**options, dpo=config))
    run_preference(PreferenceRun(**options, dpo=config, bad_rows="count"))
    summary = json.loads((tmp_path / "run" / "data.json").read_text())
    assert summary["refused"] == {
        "field `rejected` is missing": 1,
        "`chosen` and `rejected` are the same": 1,
        "longer than 30 tokens, too_long=refuse": 1,
    }
    assert summary["num_kept"] == 4 and summary["num_truncated"] == 0
    assert "row 5" in summary["examples"]["field `rejected` is missing"]


@pytest.mark.parametrize("lora", [AdapterConfig(), AdapterConfig(rank=4)], ids=["full", "lora"])
def test_preference_run_and_its_reference_cache(tmp_path, model, lora, monkeypatch):
    options = common(tmp_path, model, pairs(), lora=lora)
    config = DPOConfig(optimizer=OptimizerConfig(learning_rate=1e-2, num_epochs=4, batch_size=4))
    path = run_preference(PreferenceRun(**options, dpo=config))
    first, *_, last = metrics(tmp_path)
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5) and last["loss"] < 0.5
    assert len(list((tmp_path / "data.jsonl.reference").iterdir())) == 1
    assert (path / "adapter_model.safetensors").exists() == (lora.rank > 0)
    other = OutputConfig(directory=str(tmp_path / "again"), merge_adapters=lora.rank > 0)
    again = run_preference(PreferenceRun(**options | {"output": other}, dpo=config))
    assert len(list((tmp_path / "data.jsonl.reference").iterdir())) == 1
    assert (again / "model.safetensors").exists()


def test_data_that_others_share_stay_as_they_are(tmp_path, model, monkeypatch):
    """Where they lie nobody may write: the reference's log-probabilities go into the run."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    options = common(tmp_path, model, pairs())
    run_preference(PreferenceRun(**options, dpo=DPOConfig(optimizer=OPTIMIZER)))
    assert not list(tmp_path.glob("*.reference"))
    assert len(list((tmp_path / "run").glob("reference-*/reference-*.safetensors"))) == 1


@pytest.mark.parametrize("loss_type", ["ipo", "simpo", "orpo", "apo_zero", "robust"])
def test_every_kind_of_loss_learns(tmp_path, model, loss_type):
    optimizer = OptimizerConfig(learning_rate=1e-2, num_epochs=4, batch_size=4)
    config = DPOConfig(loss_type=loss_type, optimizer=optimizer)
    run_preference(PreferenceRun(**common(tmp_path, model, pairs()), dpo=config))
    rows = metrics(tmp_path)
    assert rows[-1]["reward_accuracy"] == 1.0 and rows[-1]["reward_margin"] > 0
    assert (tmp_path / "data.jsonl.reference").exists() == config.needs_reference


def test_soft_labels_come_from_margins(tmp_path, model):
    config = DPOConfig(soft_label_scale=1.0, optimizer=OPTIMIZER)
    run_preference(PreferenceRun(**common(tmp_path, model, pairs()), dpo=config))
    last = metrics(tmp_path)[-1]
    p = 1 / (1 + math.exp(-0.5))  # its entropy bounds the loss of such pairs from below
    assert -p * math.log(p) - (1 - p) * math.log(1 - p) <= last["loss"] < math.log(2)
    rows = [{k: v for k, v in row.items() if k != "margin"} for row in pairs()]
    output = OutputConfig(directory=str(tmp_path / "other"))
    with pytest.raises(UserError, match="soft_label_scale needs rows with `margin`"):
        run_preference(PreferenceRun(**common(tmp_path, model, rows, output=output), dpo=config))


def test_settings_of_other_losses_are_refused():
    with pytest.raises(UserError, match="margins must be left out for 'apo_zero'"):
        DPOConfig(loss_type="apo_zero", margin=1.0)
    with pytest.raises(UserError, match="loss_type must be one of"):
        DPOConfig(loss_type="aot")


@pytest.mark.parametrize("loss_type", ["kto", "bco_pair"])
def test_losses_with_a_baseline_are_not_those_of_pairs(loss_type):
    """Without theirs, kto is apo_zero and bco_pair shifts nothing."""
    with pytest.raises(UserError, match=f"take algorithm unpaired with .* {loss_type}"):
        DPOConfig(loss_type=loss_type)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_reward_run_on_pairs(tmp_path, model, num_outputs):
    training = RewardTrainingConfig(
        num_outputs=num_outputs, optimizer=OPTIMIZER, holdout_share=0.25
    )
    run = RewardRun(**common(tmp_path, model, pairs(40)), training=training)
    path = run_reward_model(run)
    assert metrics(tmp_path)[-1]["held_out_accuracy"] == 1.0
    loaded = RewardModel.load(str(path), precision="fp32")
    assert len(loaded.reward_weights) == num_outputs
    assert loaded.model.config.pad_token_id != loaded.chat.end_token_id


@pytest.mark.parametrize("objective", ["attributes", "quantiles", "rankings"])
def test_reward_run_on_scores(tmp_path, model, objective):
    if objective == "attributes":
        rows = [
            {
                "prompt": f"w{i}",
                "responses": ["w50", "w60"],
                "scores": [{"help": 1.0, "short": None}, {"help": -1.0, "short": 2}],
            }
            for i in range(100, 120)
        ]
    elif objective == "quantiles":
        rows = [{"prompt": f"w{i}", "response": "w50", "score": i % 3} for i in range(100, 120)]
    else:
        three = {"responses": ["w50", "w60", "w70"], "scores": [2, 0, 1]}
        rows = [{"prompt": f"w{i}", **three} for i in range(100, 120)]
    num_outputs = 5 if objective == "quantiles" else 1
    training = RewardTrainingConfig(
        objective=objective, num_outputs=num_outputs, optimizer=OPTIMIZER
    )
    num_steps = {"attributes": 2 * 9, "quantiles": 2 * 5, "rankings": 2 * 5}
    run = RewardRun(**common(tmp_path, model, rows), training=training)
    loaded = RewardModel.load(str(run_reward_model(run)), precision="fp32")
    *steps, summary = metrics(tmp_path)
    held_out = (
        4 if objective == "attributes" else 2
    )  # of 20 prompts a tenth, with all its responses
    assert summary["num_held_out_examples"] == held_out and len(steps) == num_steps[objective]
    known = objective != "quantiles"  # one response to a prompt has no order
    assert (summary["held_out_accuracy"] in (0.0, 0.5, 1.0)) == known
    names = {"attributes": ["help", "short"]}.get(objective, ["score"])
    assert loaded.model.config.reward_outputs == names
    assert len(loaded.reward_weights) == {"attributes": 2, "quantiles": 5, "rankings": 1}[objective]


@pytest.mark.parametrize("objective", ["pairwise", "segments"])
def test_objectives_trained_elsewhere_are_refused(objective):
    with pytest.raises(UserError, match=f"objective {objective} is trained by"):
        RewardRun(training=RewardTrainingConfig(objective=objective))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "one of sft, preference, unpaired, reward, pairwise"),
        (["dpo"], 2, "got 'dpo'"),
        (["--help"], 0, "preference  DPO and its relatives on pairs"),
        (["sft", "--model", "x", "--output", "y"], 1, "data is missing"),
    ],
)
def test_the_command_line_says_what_is_wrong(capsys, arguments, code, says):
    assert main(arguments) == code
    assert says in "".join(capsys.readouterr())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_what_was_spread_over_processes_is_saved_as_if_it_had_not_been(tmp_path, lora):
    spread = tiny_model(tie_word_embeddings=True).bfloat16()
    spread.generation_config.eos_token_id = [3, 4]
    if lora:
        add_lora(spread, lora)
    spread.model.norm.weight.full_tensor = spread.model.norm.weight.detach  # as a DTensor has it
    whole = gathered(spread)
    assert gathered(spread, keep=False) is spread
    assert whole is not spread and whole.generation_config.eos_token_id == [3, 4]
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    for (name, mine), (_, theirs) in zip(whole.named_parameters(), spread.named_parameters()):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
    save_model(tmp_path / "model", whole, tiny_tokenizer())


def test_both_commands_name_the_same_options_alike():
    """`rlhf-fast sft` and `python -m rlhf_fast.training sft`."""
    arguments = "--model m --data d --system-prompt s --output o --seed 3 --device cpu".split()
    arguments += "--precision fp32 --micro-batch-tokens 7 --optimizer.learning-rate 0.5".split()
    arguments += "--bad-rows count --attention flex --gradient-checkpointing".split()
    assert tyro.cli(SFTRun, args=[*arguments, "--lora.rank", "4"]).lora == AdapterConfig(rank=4)
    stage, run = (tyro.cli(config, args=arguments) for config in (SFT, SFTRun))
    for name in ("model", "data", "system_prompt", "bad_rows", "seed", "optimizer"):
        assert getattr(stage, name) == getattr(run, name) != getattr(SFTRun(), name)
    assert stage.output == run.output.directory == "o"
    for field in fields(ComputeOptions):
        value = getattr(run.compute, field.name)
        assert getattr(stage, field.name) == value != field.default
    assert not {field.name for field in fields(SFT)} - set(vars(run)) - set(vars(run.compute))


def test_a_reward_run_of_adapters(tmp_path, model):
    options = common(tmp_path, model, pairs(8))
    config = RewardTrainingConfig(num_outputs=2, members="adapters", optimizer=OPTIMIZER)
    path = run_reward_model(RewardRun(**options, training=config))
    assert RewardModel.load(str(path)).num_outputs == 2
    with pytest.raises(UserError, match="members adapters take training.adapter"):
        RewardRun(**options, training=config, lora=AdapterConfig(rank=4))


def test_pairwise_run(tmp_path, model):
    run_pairwise_model(PairwiseRun(**common(tmp_path, model, pairs(8)), optimizer=OPTIMIZER))
    summary = json.loads((tmp_path / "run" / "data.json").read_text())
    assert summary["num_kept"] == 16  # both orders
