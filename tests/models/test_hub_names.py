"""Models by their name on the hub: whoever needs files gets those of the cache."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast import hub
from rlhf_fast.endpoint import Endpoint
from rlhf_fast.errors import UserError
from rlhf_fast.generation.server import ServerGenerator
from rlhf_fast.models.adapters import LoraConfig, add_lora, has_adapters
from rlhf_fast.models.chat import load_tokenizer
from rlhf_fast.models.checkpoint import load_text_config
from rlhf_fast.models.gating import Gate
from rlhf_fast.models.language_model import load_causal_lm
from rlhf_fast.models.names import (
    base_of_adapters,
    check_model_name,
    check_whole,
    model_directory,
    resolve_model,
)
from rlhf_fast.models.reward_model import GATE_FILE, RewardModel, fresh_reward_model
from rlhf_fast.online.merging import MergeConfig, merge_checkpoints
from rlhf_fast.training.critic import Critic
from tests.loopback import serve
from tests.tiny import tiny_reward_model, tiny_tokenizer


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """Puts a directory into a cache of the hub's layout; returns the model's name there."""
    import huggingface_hub.constants
    import transformers.utils.hub

    cache = tmp_path / "cache"
    for module in (huggingface_hub.constants, transformers.utils.hub):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(cache))

    def put(directory) -> str:
        snapshot = cache / "models--someone--tiny" / "snapshots" / ("0" * 40)
        shutil.copytree(directory, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        return "someone/tiny"

    return put


@pytest.fixture
def adapters(model_path, tmp_path):
    """A folder of adapters that change the model, without a tokenizer, as PEFT leaves it."""
    model = load_causal_lm(model_path)
    add_lora(model, LoraConfig(rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapters")
    return str(tmp_path / "adapters")


def test_adapters_on_the_hub_are_merged(adapters, model_path, on_hub):
    name = on_hub(adapters)
    assert resolve_model(name) == name and base_of_adapters(name) == model_path
    assert load_tokenizer(name).chat_template
    assert load_text_config(name).vocab_size == 512
    critic = Critic.load(name, device="cpu", pad_token_id=3).model
    for model in (load_causal_lm(name), fresh_reward_model(name), critic):
        assert not has_adapters(model) and model.name_or_path == name
        found, expected = (m.base_model.state_dict() for m in (model, load_causal_lm(adapters)))
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(UserError, match="needs a whole model, got adapters in someone/tiny"):
        check_whole(name, "this")


def test_adapters_are_asked_for_once(model_path, monkeypatch):
    """Where they are on the hub and not in the cache yet."""
    asked = []

    class Api:
        endpoint = "here"

        def repo_info(self, name, **options):
            asked.append(name)
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename="adapter_config.json")])

        def hf_hub_download(self, name, file, **options):
            asked.append(file)

    monkeypatch.setattr(hub, "HfApi", Api)
    for _ in range(2):
        check_model_name("someone/adapters")
    assert asked == ["someone/adapters", "adapter_config.json"]


def test_a_directory_is_itself_and_a_name_its_snapshot(model_path, on_hub):
    assert model_directory(model_path) == Path(model_path)
    name = on_hub(model_path)
    assert (model_directory(name) / "model.safetensors").is_file()
    for unknown in ("someone/else", "./missing", "no such name"):
        with pytest.raises(UserError, match="no such model directory|there is no directory"):
            model_directory(unknown)


def test_a_server_reads_the_snapshot(model_path, on_hub):
    seen = []

    def stub(path, body):
        seen.append(body.get("kwargs", {}).get("weights_path"))
        return 200, {"success": True}

    with serve(stub) as url:
        settings = {"model": "m", "decode": str, "stop_token_ids": [3]}
        endpoint = Endpoint(url, retries=0)
        ServerGenerator(url, on_hub(model_path), endpoint=endpoint, **settings)
    assert load_file(Path(seen[0]) / "model.safetensors")


def test_momentum_starts_from_the_snapshot(model_path, on_hub, tmp_path):
    name = on_hub(model_path)
    merge_checkpoints(tmp_path / "out", [name], MergeConfig("extrapolate"), base=name)
    merged, original = (
        load_file(p / "model.safetensors") for p in (tmp_path / "out", Path(model_path))
    )
    assert all(torch.equal(merged[name], original[name]) for name in original)


def test_a_gate_on_the_hub_is_used(on_hub, tmp_path):
    model = tiny_reward_model()
    model.save_pretrained(tmp_path / "rm")
    tiny_tokenizer().save_pretrained(tmp_path / "rm")
    Gate(32, 1, width=8).save(tmp_path / "rm" / GATE_FILE)
    assert RewardModel.load(str(tmp_path / "rm")).gate is not None
    assert RewardModel.load(on_hub(tmp_path / "rm")).gate is not None
