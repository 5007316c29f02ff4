"""`rlhf-fast bench` at a tiny shape."""

import json

import pytest

from rlhf_fast.cli import bench
from rlhf_fast.errors import UserError


def test_table_names_every_contestant(capsys):
    bench.run(bench.BenchConfig(vocab=100, width=16, tokens=32, quick=True, compile=False))
    shown = capsys.readouterr().out
    assert "rlhf_fast" in shown and "eager" in shown and "V=100" in shown


def test_shape_comes_from_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 77, "hidden_size": 24}))
    config = bench.with_model_shape(bench.BenchConfig(model=str(tmp_path)))
    assert (config.vocab, config.width) == (77, 24)


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(UserError, match="dtype must be .* got 'int8'"):
        bench.BenchConfig(dtype="int8")
    with pytest.raises(UserError, match="folder with a config.json"):
        bench.with_model_shape(bench.BenchConfig(model=str(tmp_path)))
