import torch


class FusedLinearForPPO(torch.nn.Module):
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logps = (hidden_states @ vocab_weights.t() / temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, input_ids[..., None])[..., 0], entropy
