import torch

from ..trainer_utils import get_batch_logps


class CustomKTOTrainer:
    def forward(self, model, batch, prefix=""):
        logits = model(batch["input_ids"]).logits.to(torch.float32)
        logps, lengths = get_batch_logps(logits, batch["labels"])
        return {"logps": logps, "average": logps / lengths, "logits": logits}
