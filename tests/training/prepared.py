"""FSDP2 as Accelerate prepares it on GPUs, over gloo: `python -m tests.training.prepared FILE`.

On a CPU Accelerate leaves FSDP out; here it is told that it is there, with the answers that
`accelerate config` proposes. The model's head is tied. Writes the losses of this launch and of one
process alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.checkpoints import Checkpoints
from rlhf_fast.training.fit import FitOptions
from tests.tiny import tiny_model
from tests.training.trajectories import train


def sharded_accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=True,
    )
    return accelerator


def losses(options: FitOptions | None) -> list[float]:
    model = tiny_model(tie_word_embeddings=True)
    backbone = LanguageModel(model, pad_token_id=3, precision="fp32")

    def on_step(row: dict[str, float], total: int) -> None:
        if options:
            assert all(hasattr(p, "full_tensor") for p in model.parameters())

    rows = train("sft", backbone, options=options, on_step=on_step)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return [row["loss"] for row in rows]


def main(file: Path) -> None:
    torch.set_num_threads(1)
    accelerator = sharded_accelerator()
    checkpoints = Checkpoints(file.parent / "checkpoints", every_steps=20)
    found = losses(FitOptions(checkpoints, accelerator))
    if accelerator.is_main_process:
        file.write_text(json.dumps([found, losses(None)]))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
