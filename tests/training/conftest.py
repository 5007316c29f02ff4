"""Fixtures of the stand-alone trainings."""

import pytest

from rlhf_fast.models.checkpoint import save_model
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def model(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["A", "B"])
    save_model(tmp_path / "base", tiny_model(vocab_size=520), tokenizer)
    return str(tmp_path / "base")
