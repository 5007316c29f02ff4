"""Settings and fixtures for every test."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: other jobs share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    """Directory of a tiny random Llama with a chat template."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)
