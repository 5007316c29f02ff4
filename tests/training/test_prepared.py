"""FSDP2 by Accelerate's own preparation, which the GPUs of a launch get."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from safetensors.torch import load_file

from tests.tiny import tiny_model
from tests.training.launched import LAUNCHERS


def test_two_processes_follow_one(tmp_path):
    file = tmp_path / "losses.json"
    command = [*LAUNCHERS["replicated"], "-m", "tests.training.prepared", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    mine, alone = json.loads(file.read_text())
    assert mine == pytest.approx(alone, rel=1e-4)
    weights = load_file(tmp_path / "checkpoints/step_20/weights.safetensors")
    whole = dict(tiny_model(tie_word_embeddings=True).named_parameters())
    assert {name: t.shape for name, t in weights.items()} == {n: p.shape for n, p in whole.items()}
