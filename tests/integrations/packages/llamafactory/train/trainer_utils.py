import torch


def get_batch_logps(logits, labels, label_pad_token_id=-100, ld_alpha=None):
    labels = labels[:, 1:].clone()
    logits, live = logits[:, :-1, :], labels != label_pad_token_id
    labels[~live] = 0
    logps = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (logps * live).sum(-1), live.sum(-1)
