import torch
import torch.nn.functional as F


def aggregate(loss, mask, by_token, dp_size, num_tokens, num_sequences):
    if by_token:
        total = mask.sum() if num_tokens is None else num_tokens / dp_size
        return (loss * mask).sum() / total
    lengths = mask.sum(-1)
    means = (loss * mask).sum(-1) / lengths.clamp(min=1)
    return means.sum() / ((lengths > 0).sum() if num_sequences is None else num_sequences / dp_size)


class DPOLoss(torch.nn.Module):
    def __init__(self, beta, label_smoothing=0.0, ipo=False):
        super().__init__()
        self.beta, self.label_smoothing, self.ipo = beta, label_smoothing, ipo

    def forward(
        self,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    ):
        chosen = policy_chosen_logps - reference_chosen_logps
        rejected = policy_rejected_logps - reference_rejected_logps
        margin = chosen - rejected
        if self.ipo:
            losses = (margin - 1 / (2 * self.beta)) ** 2
        else:
            right, wrong = F.logsigmoid(self.beta * margin), F.logsigmoid(-self.beta * margin)
            losses = -right * (1 - self.label_smoothing) - wrong * self.label_smoothing
        rewards = (self.beta * x.detach() for x in (chosen, rejected))
        return losses.mean(), *rewards


class PairWiseLoss(torch.nn.Module):
    def forward(self, chosen_reward, reject_reward, margin=None):
        return -F.logsigmoid(
            chosen_reward - reject_reward - (0 if margin is None else margin)
        ).mean()


class PolicyLoss(torch.nn.Module):
    """Without corrections for the sampler."""

    def __init__(
        self,
        clip_eps_low=0.2,
        clip_eps_high=0.2,
        dual_clip=None,
        token_level_loss=True,
        policy_loss_type="ppo",
        is_correction_level="off",
        is_correction_mode="mask",
        is_correction_gating="ratio",
        is_correction_threshold=(0.5, 5.0),
    ):
        super().__init__()
        self.clip_eps_low, self.clip_eps_high = clip_eps_low, clip_eps_high
        self.dual_clip, self.token_level_loss = dual_clip, token_level_loss
        self.policy_loss_type = policy_loss_type
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold

    def forward(
        self,
        log_probs,
        old_log_probs,
        advantages,
        action_mask=None,
        rollout_log_probs=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        log_ratio = log_probs - old_log_probs
        kl = -log_ratio.detach()
        ratio = log_ratio.exp()
        free = ratio * advantages
        bounded = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high) * advantages
        loss = -torch.minimum(free, bounded)
        clipped = (bounded < free) * action_mask
        if self.dual_clip is not None:
            loss = torch.where(advantages < 0, loss.minimum(-self.dual_clip * advantages), loss)
        totals = (self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        loss = aggregate(loss, action_mask, *totals)
        count = action_mask.sum()
        return loss, clipped.sum() / count, (kl * action_mask).sum() / count, None, None


class ValueLoss(torch.nn.Module):
    def __init__(self, clip_eps=None, token_level_loss=True):
        super().__init__()
        self.clip_eps, self.token_level_loss = clip_eps, token_level_loss

    def forward(
        self,
        values,
        old_values,
        returns,
        action_mask=None,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
    ):
        loss = (values - returns) ** 2
        if self.clip_eps is not None:
            near = old_values + (values - old_values).clamp(-self.clip_eps, self.clip_eps)
            loss = loss.maximum((near - returns) ** 2)
        totals = (self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        return 0.5 * aggregate(loss, action_mask, *totals)
