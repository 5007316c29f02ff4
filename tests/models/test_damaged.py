"""A model that is cut short, or of another kind, is the user's news, not a traceback."""

import shutil

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
)

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_atomic
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel, load_causal_lm
from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from rlhf_fast.training.critic import Critic
from tests.tiny import tiny_config, tiny_model, tiny_reward_model, tiny_tokenizer


@pytest.fixture
def damaged(model_path, tmp_path):
    shutil.copytree(model_path, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20_000])
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    "load",
    [
        load_causal_lm,
        fresh_reward_model,
        RewardModel.load,
        lambda path: Critic.load(path, device="cpu", pad_token_id=3),
    ],
)
def test_a_damaged_model_is_named(load, damaged):
    with pytest.raises(UserError, match=f"cannot .* from '{damaged}'"):
        load(damaged)


def test_a_model_of_another_kind_is_not_completed_with_random_weights(model_path, tmp_path):
    reward_model = tiny_reward_model()
    reward_model.save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match="no LlamaForCausalLM: .* lm_head.weight, which would be"):
        load_causal_lm(str(tmp_path / "reward"))
    with pytest.raises(UserError, match="no weights for score.weight.* saved as LlamaForCausalLM"):
        RewardModel.load(model_path)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_reward_model_that_pools_is_refused(scale):
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    model = BertForSequenceClassification(config).eval()
    model.classifier.weight.data.mul_(scale)
    with pytest.raises(UserError, match="BertForSequenceClassification is not supported"):
        RewardModel(model, tiny_tokenizer())


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gpt_neox", "qwen3_moe"])
def test_reward_models_that_read_the_last_token_are_taken(architecture):
    config = tiny_config(architecture)
    config.num_labels = 1
    RewardModel(AutoModelForSequenceClassification.from_config(config).eval(), tiny_tokenizer())


def test_a_token_without_embedding_is_refused():
    model = LanguageModel(tiny_model(vocab_size=400), pad_token_id=3)
    with pytest.raises(UserError, match="token 400, but the model's vocabulary has 400"):
        model.score_groups([TokenGroup([5], [[400]])])


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/rows.jsonl"):
        write_atomic(tmp_path / "file" / "rows.jsonl", "text")


def test_shares_of_a_model_are_refused(model_path, monkeypatch):
    """What transformers loads for ZeRO-3: weights without elements, with DeepSpeed's marks."""

    def share_out(model):
        for number, parameter in enumerate(model.parameters()):
            parameter.ds_id, parameter.data = number, torch.empty(0)
        return model

    with pytest.raises(UserError, match=r"must be whole, got DeepSpeed's .* load the model before"):
        LanguageModel(share_out(load_causal_lm(model_path)), pad_token_id=3)
    load = AutoModelForTokenClassification.from_pretrained

    def loaded(*args, **options):
        model, info = load(*args, **options)
        return share_out(model), info

    monkeypatch.setattr(AutoModelForTokenClassification, "from_pretrained", loaded)
    with pytest.raises(UserError, match="the model must be whole"):
        Critic.load(model_path, device="cpu", pad_token_id=3)
