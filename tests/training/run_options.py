"""Options and results of stand-alone runs in tests."""

from __future__ import annotations

import json

from rlhf_fast.training.optimizer import OptimizerConfig
from rlhf_fast.training.session import ComputeConfig, OutputConfig

OPTIMIZER_SETTINGS = {"learning_rate": 3e-3, "num_epochs": 2, "batch_size": 4}
OPTIMIZER = OptimizerConfig(**OPTIMIZER_SETTINGS)
COMPUTE = ComputeConfig(device="cpu", precision="fp32")


def write(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count=12):
    return [
        {"prompt": f"w{i} w{i + 1}", "chosen": "w50 w51", "rejected": f"w60 w{i}", "margin": 0.5}
        for i in range(100, 100 + count)
    ]


def common(tmp_path, model, rows, **changes):
    options = {
        "model": model,
        "data": write(tmp_path, rows),
        "compute": COMPUTE,
        "output": OutputConfig(directory=str(tmp_path / "run")),
    }
    return options | changes


def metrics(tmp_path):
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
