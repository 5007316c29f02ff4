"""A fit in a process of its own: `python -m tests.training.launched KIND DIRECTORY [DELAY]`.

KIND is sft, dpo or reward; DELAY is a pause in seconds after every step, so the parent can hit it.
Launched by torchrun or Accelerate it shares the work; with SHARDED set it shards the model.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.checkpoints import Checkpoints
from rlhf_fast.training.fit import FitOptions, OptimizerConfig
from rlhf_fast.training.preference import DPOConfig, train_dpo
from rlhf_fast.training.sft import train_sft
from tests.tiny import tiny_model
from tests.training.examples import make_pairs

STEPS = 20


class ShardingOnCpu(Accelerator):
    """Does on a CPU what Accelerate does with FSDP2 on GPUs alone."""

    distributed_type = SimpleNamespace(value="FSDP")
    is_fsdp2 = True

    def prepare(self, module, optimizer):
        mesh = init_device_mesh("cpu", (self.num_processes,))
        for layer in module.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        optimizer.param_groups[0]["params"] = list(module.parameters())
        return module, optimizer


def main(kind: str, directory: Path, delay: float = 0.0) -> None:
    torch.set_num_threads(1)
    kind_of_accelerator = ShardingOnCpu if "SHARDED" in os.environ else Accelerator
    accelerator = kind_of_accelerator(cpu=True) if "WORLD_SIZE" in os.environ else None
    options = FitOptions(Checkpoints(directory / "checkpoints", every_steps=3), accelerator)
    config = OptimizerConfig(learning_rate=1e-3, num_epochs=5, batch_size=4, ema_decay=0.9)
    model = LanguageModel(
        tiny_model(), pad_token_id=3, precision="fp32", micro_batch_tokens=64, row_tokens=48
    )
    pairs = make_pairs(16)

    def on_step(row: dict[str, float], total: int) -> None:
        print(f"step {row['step']} of {total}", flush=True)
        time.sleep(delay)

    common = {"seed": 7, "on_step": on_step, "options": options}
    if kind == "dpo":
        reference = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
        rows = train_dpo(model, reference, pairs, config=DPOConfig(optimizer=config), **common)
    else:
        groups = [
            TokenGroup(p.chosen.prompt_token_ids, [p.chosen.token_ids, p.rejected.token_ids])
            for p in pairs
        ]
        rows = train_sft(model, groups, config=config, **common)
    assert len(rows) == STEPS
    if "SHARDED" in os.environ:
        assert all(hasattr(p, "full_tensor") for p in model.model.parameters())
    weights = {
        name: getattr(p.detach(), "full_tensor", p.detach)().double().sum().item()
        for name, p in model.model.named_parameters()
    }
    if accelerator is None or accelerator.is_main_process:
        (directory / "result.json").write_text(json.dumps({"rows": rows, "weights": weights}))
    if accelerator is not None:
        accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(float, sys.argv[3:]))
