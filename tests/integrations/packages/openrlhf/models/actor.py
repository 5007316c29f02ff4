import torch

from .utils import compute_entropy, log_probs_from_logits


class Actor(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(
        self,
        sequences,
        action_mask=None,
        attention_mask=None,
        return_output=False,
        return_entropy=False,
    ):
        output = self.model(sequences, attention_mask=attention_mask)
        output["logits"] = output["logits"].to(torch.float32)
        if return_entropy:
            output.entropy = compute_entropy(output["logits"])[:, :-1]
        if action_mask is None:
            return output
        logps = log_probs_from_logits(output["logits"], sequences.roll(-1, 1))[:, :-1]
        logps = logps[:, -action_mask.shape[1] :] * action_mask
        return (logps, output) if return_output else logps
