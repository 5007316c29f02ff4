"""A model whose weights are cut short is the user's news, not a traceback."""

import shutil

import pytest
import torch
from transformers import AutoModelForTokenClassification

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_atomic
from rlhf_fast.models.language_model import LanguageModel, load_causal_lm
from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from rlhf_fast.training.critic import Critic


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
