import torch

FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE = False


def logprobs_from_logits(logits, labels, inplace_backward=True):
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def entropy_from_logits(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def entropy_from_logits_with_chunking(logits, chunk_size=2048):
    return torch.cat([entropy_from_logits(chunk) for chunk in logits.split(chunk_size)])


def masked_mean(values, mask):
    return (values * mask).sum() / (mask.sum() + 1e-8)


def masked_whiten(values, mask):
    centred = values - masked_mean(values, mask)
    variance = (centred**2 * mask).sum() / (mask.sum() - 1)
    return centred * torch.rsqrt(variance + 1e-8)
