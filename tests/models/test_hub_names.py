"""Models by their name on the hub: whoever needs files gets those of the cache."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.endpoint import Endpoint
from rlhf_fast.errors import UserError
from rlhf_fast.generation.server import ServerGenerator
from rlhf_fast.models.gating import Gate
from rlhf_fast.models.names import model_directory
from rlhf_fast.models.reward_model import GATE_FILE, RewardModel
from rlhf_fast.online.merging import MergeConfig, merge_checkpoints
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
