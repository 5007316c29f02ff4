import torch


def log_probs_from_logits(logits, labels, temperature=1.0):
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def compute_entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()
