import torch

from ..trainer_utils import get_batch_logps


class CustomDPOTrainer:
    def concatenated_forward(self, model, batch, is_ref_model=False):
        logits = model(batch["input_ids"]).logits.to(torch.float32)
        logps, _ = get_batch_logps(logits, batch["labels"])
        return {"logps": logps, "logits": logits}
