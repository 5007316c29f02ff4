"""Names of models: wrong ones are refused at once, and the hub is asked once at most."""

import shutil
import socket
import time

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from rlhf_fast import hub
from rlhf_fast.data import load_prompts
from rlhf_fast.errors import UserError
from rlhf_fast.models.names import check_model_name, model_directory, resolve_model
from tests.loopback import serve


@pytest.fixture
def hub_at(monkeypatch):
    """Puts the hub at an address of this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.look_up.cache_clear()

    def use(url):
        monkeypatch.setattr(hub, "HfApi", lambda: huggingface_hub.HfApi(endpoint=url))

    return use


@pytest.fixture
def asked(hub_at):
    """A hub with one model, `org/known`; yields the addresses it was asked for."""
    paths = []

    def answer(path, body):
        paths.append(path)
        if path.endswith("/org/known"):
            return 200, {"id": "org/known"}
        return (503, {}) if path.endswith("/org/busy") else (401, {"error": "Repository not found"})

    with serve(answer) as url:
        hub_at(url.removesuffix("/v1"))
        yield paths


def test_the_hub_is_asked_once(asked):
    for _ in range(2):
        assert resolve_model("org/known") == "org/known"
    assert asked == ["/api/models/org/known"]


def test_a_name_that_the_hub_lacks(asked):
    with pytest.raises(
        UserError, match="reward.model: no such model directory: org/nonsense, and "
    ):
        check_model_name("org/nonsense", "reward.model")
    assert asked == ["/api/models/org/nonsense"]


def test_a_busy_hub_is_left_to_loading(asked):
    check_model_name("org/busy", "model")
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["./none", "/none", "~/none", "{folder}/none", "a/b/c", "a b"])
def test_a_path_is_refused_without_the_hub(asked, name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    name = name.format(folder="runs")
    with pytest.raises(UserError, match=f"model: no such model directory: {name}"):
        check_model_name(name, "model")
    assert asked == []


def test_a_file_is_no_model(asked, tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match="is a file; give the directory"):
        check_model_name(str(tmp_path / "model.safetensors"), "model")


@pytest.mark.parametrize("answers", [False, True])
def test_a_hub_out_of_reach_costs_two_seconds_at_most(hub_at, answers):
    """Nobody at the address, or somebody who takes the question and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if answers:
            listening.listen()
        hub_at(f"http://127.0.0.1:{listening.getsockname()[1]}")
        start = time.perf_counter()
        with pytest.raises(UserError, match="model: .*: nonsense, and .* cannot be reached"):
            check_model_name("nonsense", "model")
        assert time.perf_counter() - start < 2


def test_a_cached_model_needs_no_hub(asked, tmp_path, monkeypatch):
    cache = tmp_path / "models--org--cached"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("1")
    (cache / "snapshots" / "1").mkdir(parents=True)
    (cache / "snapshots" / "1" / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    check_model_name("org/cached", "model")
    assert asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (model_directory("org/cached") / "config.json").is_file()


def test_a_dataset_that_the_hub_lacks(asked, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/none")
    with pytest.raises(UserError, match="data: no such file: org/nonsense, and .* no such"):
        load_prompts("org/nonsense")
    assert asked == ["/api/datasets/org/nonsense"]


def test_a_folder_without_a_model_names_those_inside(tmp_path, model_path):
    shutil.copytree(model_path, tmp_path / "run" / "sft" / "model")
    with pytest.raises(UserError, match="holds no model.*; there is one in .*run/sft/model"):
        resolve_model(str(tmp_path / "run"))
    assert resolve_model(str(tmp_path / "run" / "sft" / "model"))
