"""`rlhf-fast bench` at a tiny shape."""

import json

import pytest
import torch

from rlhf_fast.cli import bench
from rlhf_fast.errors import UserError


def test_table_names_every_contestant(capsys):
    bench.run(bench.BenchConfig(vocab=100, width=16, tokens=32, quick=True, compile=False))
    shown = capsys.readouterr().out
    assert "rlhf_fast" in shown and "eager" in shown and "V=100" in shown
    rows = [line for line in shown.splitlines() if line.startswith(("head", "PPO", "advantages"))]
    assert len(rows) == 5 and all("faster" in r or "slower" in r or "tie" in r for r in rows)
    assert "won" in shown.splitlines()[-1]


def test_a_large_model_is_quick_too():
    small = bench.quick(bench.BenchConfig(vocab=49152, width=576), "cpu")
    large = bench.quick(bench.BenchConfig(vocab=151936, width=4096), "cpu")
    assert small.tokens == 256 and 16 <= large.tokens < 64
    assert bench.quick(bench.BenchConfig(vocab=151936, width=4096), "cuda").tokens == 256


def test_a_wrong_result_stops_the_benchmark(monkeypatch):
    race = bench.Race("wrong", [torch.ones(3)], lambda x: 2 * x.sum(), lambda x: x.sum())
    monkeypatch.setattr(bench, "races", lambda *_: [race])
    with pytest.raises(RuntimeError, match="wrong: rlhf_fast gives"):
        bench.run(bench.BenchConfig(vocab=10, width=4, tokens=2, compile=False))


def test_shape_comes_from_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 77, "hidden_size": 24}))
    config = bench.with_model_shape(bench.BenchConfig(model=str(tmp_path)))
    assert (config.vocab, config.width) == (77, 24)


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(UserError, match="^dtype must be .* got 'int8'"):
        bench.BenchConfig(dtype="int8")
    with pytest.raises(UserError, match="folder with a config.json"):
        bench.with_model_shape(bench.BenchConfig(model=str(tmp_path)))
