"""Settings and fixtures for every test."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: other jobs share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer


def _torch_settings() -> dict[str, object]:
    products = getattr(torch.backends.mkldnn, "matmul", None)  # not in every torch
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "oneDNN's products": products and products.fp32_precision,
    }


@pytest.fixture(autouse=True)
def torch_settings_stay():
    """Numbers must not depend on which tests ran before in the same process."""
    torch.manual_seed(0)
    before = _torch_settings()
    yield
    assert _torch_settings() == before


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    """Directory of a tiny random Llama with a chat template."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def answering_path(tmp_path_factory) -> str:
    """The same with a tokenizer that has the answers A and B of pairwise models."""
    path, tokenizer = tmp_path_factory.mktemp("answering"), tiny_tokenizer()
    tokenizer.add_tokens(["A", "B"])
    tiny_model(vocab_size=520).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def judging_path(tmp_path_factory) -> str:
    """Directory of a tiny model whose every word holds a rating: [[9]]9, [[1]]10, [[1]]11."""
    path, tokenizer = tmp_path_factory.mktemp("judging"), tiny_tokenizer(word="[[{0!s:.1}]]{0}")
    tiny_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def config(model_path, tmp_path, monkeypatch):
    """A run of two iterations on the tiny model; its functions are `helpers:...`."""
    from tests.run_config import small_run

    monkeypatch.syspath_prepend(str(Path(__file__).parent / "online"))
    return small_run(model_path, tmp_path)


def pytest_terminal_summary(terminalreporter):
    from tests.peers import summary

    summary.report(terminalreporter)
