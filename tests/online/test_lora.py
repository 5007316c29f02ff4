"""Adapters in the loop: the reference is the model without them, the engine samples with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.io import read_records
from rlhf_fast.models.adapters import LoraConfig, add_lora, merge_adapters, merged_parameters
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.models.language_model import LanguageModel, load_causal_lm
from rlhf_fast.online.config import AdapterConfig, OnlineConfig, ReferenceConfig, RewardConfig
from rlhf_fast.online.config_file import config_from_yaml, config_to_yaml, config_with
from rlhf_fast.online.workflow import run_online
from rlhf_fast.recipes import METHODS
from rlhf_fast.types import scored_group_from_json
from tests.loopback import serve
from tests.online.helpers import kill_and_resume, rows_without_times
from tests.tiny import tiny_model, tiny_tokenizer
from tests.vllm_stub import Stub


@pytest.fixture
def adapted(config):
    reward = RewardConfig(function="helpers:varied")
    return replace(config, lora=AdapterConfig(rank=4), reward=reward)


def disturb(model: torch.nn.Module) -> None:
    """As if the adapters had been trained: their second factors start at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_parameters_merged_one_by_one_are_those_of_the_merged_model(architecture):
    model = tiny_model(architecture)
    plain = {name for name, _ in merged_parameters(model)}
    assert plain == {name for name, _ in model.named_parameters()}
    add_lora(model, LoraConfig(rank=4))
    disturb(model)
    found = {name: value.clone() for name, value in merged_parameters(model)}
    merge_adapters(model)
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_dropout_does_not_train_while_vllm_draws_too(adapted):
    """Both draw from the process's generators, and vLLM puts these back when it ends."""
    generation = replace(adapted.generation, backend="vllm")
    lora = replace(adapted.lora, dropout=0.1)
    with pytest.raises(UserError, match="overlap: vLLM draws from .* got lora.dropout 0.1"):
        run_online(replace(adapted, generation=generation, lora=lora, overlap=True))


@pytest.mark.parametrize("method", ["iterative-dpo", "grpo", "ppo", "raft", "lipo"])
def test_a_run_trains_adapters_alone(adapted, method):
    config = config_with(adapted, METHODS[method][1], method)
    if config.algorithm == "rl":
        config = config_with(config, {"rl": {"reward_kl_coef": 0.05}}, method)
    run_online(config)
    run = Path(config.output_dir)
    rows = rows_without_times(run)
    assert len(rows) == 3 and rows[0]["kl"] == 0.0 and rows[2]["kl"] != 0.0
    saved = {file.name for file in (run / "iteration_2" / "policy").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


def test_the_engine_samples_with_the_adapters(adapted):
    """What it recorded while sampling are the log-probabilities of the adapted policy."""
    learning = replace(adapted.dpo, optimizer=replace(adapted.dpo.optimizer, learning_rate=0.03))
    run_online(replace(adapted, dpo=learning))
    run = Path(adapted.output_dir)
    rows = rows_without_times(run)
    assert rows[2]["entropy"] != pytest.approx(rows[0]["entropy"], abs=1e-3)
    model = load_causal_lm(str(run / "iteration_2" / "policy"))
    saved = LanguageModel(model, pad_token_id=3, precision="fp32")
    judged = read_records(run / "iteration_2" / "evaluation.jsonl", scored_group_from_json)
    for group in judged:
        first = group.completions[0]
        tokens = TokenGroup(first.prompt_token_ids, [c.token_ids for c in group.completions])
        recorded = [sum(c.sampling_logps) for c in group.completions]
        assert saved.score_groups([tokens])[0] == pytest.approx(recorded, abs=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_server_gets_the_adapters_merged(adapted, tmp_path, architecture):
    """Whole weights by the names and in the shapes of the checkpoint that it began with."""
    save_model(tmp_path / "model", tiny_model(architecture), tiny_tokenizer())
    stub = Stub()
    with serve(stub) as url:
        generation = replace(adapted.generation, backend="server", server_url=url)
        data = replace(adapted.data, demonstrations=None)
        run_online(
            replace(adapted, model=str(tmp_path / "model"), data=data, generation=generation)
        )
    begin, *updates = stub.weights
    assert len(updates) == 2
    for number, state in enumerate(updates, 1):
        policy = load_causal_lm(str(Path(adapted.output_dir) / f"iteration_{number}" / "policy"))
        merge_adapters(policy)
        expected = dict(policy.named_parameters())
        assert state.keys() == begin.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name])
        assert any((value != begin[name]).any() for name, value in state.items())


@pytest.mark.parametrize("when", ["start", "end"])
def test_a_killed_run_goes_on(adapted, tmp_path, when):
    whole = replace(adapted, output_dir=str(tmp_path / "whole"))
    run_online(whole)
    resumed = kill_and_resume(adapted, "iteration_2/policy", when)
    assert resumed == rows_without_times(tmp_path / "whole")


def test_settings_that_adapters_exclude(adapted, tmp_path):
    with pytest.raises(UserError, match="reference.rule must be sft"):
        replace(adapted, reference=ReferenceConfig("ema"))
    with pytest.raises(UserError, match="optimizer.merging merges whole weights"):
        run_online(config_with(adapted, METHODS["online-ties"][1], "online-ties"))
    with pytest.raises(UserError, match="rank must be >= 1"):
        AdapterConfig(rank=-1)
    path = tmp_path / "lora.yaml"
    path.write_text(config_to_yaml(adapted))
    assert config_from_yaml(path, OnlineConfig()) == adapted


def test_the_end_of_a_run_says_how_adapters_become_a_model(adapted, capsys):
    run_online(replace(adapted, num_iterations=1))
    line = capsys.readouterr().out.splitlines()[-1]
    policy = Path(adapted.output_dir) / "iteration_1" / "policy"
    assert line == f"model: {policy} (adapters; rlhf-fast merge --models {policy} --output MODEL)"
