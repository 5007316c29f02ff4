from collections import defaultdict

import torch

import verl.utils.torch_functional as verl_F

POLICY_LOSS_REGISTRY, ADV_ESTIMATOR_REGISTRY = {}, {}


def register(registry, name):
    def add(function):
        registry[name] = function
        return function

    return add


@register(ADV_ESTIMATOR_REGISTRY, "gae")
def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
    advantages = torch.zeros_like(values)
    next_value = ahead = torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = token_level_rewards[:, t] + gamma * next_value - values[:, t]
        live = response_mask[:, t] > 0
        next_value = torch.where(live, values[:, t], next_value)
        ahead = torch.where(live, delta + gamma * lam * ahead, ahead)
        advantages[:, t] = ahead
    return verl_F.masked_whiten(advantages, response_mask), advantages + values


def compute_group_advantage(rewards, mask, index, of_group):
    scores, groups = rewards.sum(-1), defaultdict(list)
    for i, name in enumerate(index):
        groups[name].append(i)
    for rows in groups.values():
        scores[rows] = of_group(scores[rows])
    advantages = scores[:, None] * mask
    return advantages, advantages


@register(ADV_ESTIMATOR_REGISTRY, "grpo")
def compute_grpo_outcome_advantage(
    token_level_rewards,
    response_mask,
    index,
    epsilon=1e-6,
    norm_adv_by_std_in_grpo=True,
    config=None,
):
    def of_group(scores):
        if len(scores) == 1:
            return scores / (1 + epsilon) if norm_adv_by_std_in_grpo else scores
        centred = scores - scores.mean()
        return centred / (scores.std() + epsilon) if norm_adv_by_std_in_grpo else centred

    return compute_group_advantage(token_level_rewards, response_mask, index, of_group)


@register(ADV_ESTIMATOR_REGISTRY, "rloo")
def compute_rloo_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
):
    def of_group(scores):
        count = len(scores)
        return scores if count == 1 else (scores - scores.mean()) * count / (count - 1)

    return compute_group_advantage(token_level_rewards, response_mask, index, of_group)


@register(ADV_ESTIMATOR_REGISTRY, "rloo_vectorized")
def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
):
    def of_group(scores):
        return (scores - scores.mean()) * len(scores) / max(len(scores) - 1, 1)

    return compute_group_advantage(token_level_rewards, response_mask, index, of_group)


def agg_loss(
    loss_mat,
    loss_mask,
    loss_agg_mode,
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
    loss_scale_factor=None,
):
    loss, lengths = loss_mat * loss_mask, loss_mask.sum(-1)
    if loss_agg_mode == "token-sum":
        return loss.sum() * dp_size
    if loss_agg_mode == "token-mean":
        return loss.sum() / (batch_num_tokens or loss_mask.sum()) * dp_size
    sums = loss.sum(-1)
    if loss_agg_mode == "seq-mean-token-mean":
        sums = sums / lengths.clamp(min=1)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        sums = sums / (loss_scale_factor or loss_mask.shape[-1])
    return sums.sum() / (global_batch_size or (lengths > 0).sum()) * dp_size


def finish(losses, clipped, log_ratio, mask, mode, config, lower=None):
    lower = torch.zeros_like(losses) if lower is None else lower
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    means = (verl_F.masked_mean(x.float(), mask).item() for x in (clipped, -log_ratio, lower))
    loss = agg_loss(losses, mask, mode, **config.global_batch_info)
    return loss, dict(zip(names, means))


@register(POLICY_LOSS_REGISTRY, "vanilla")
def compute_policy_loss_vanilla(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    free = -advantages * ratio
    bound = -advantages * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    losses = free.maximum(bound)
    highest = -advantages * config.get("clip_ratio_c", 3.0)
    lower = (losses > highest) & (advantages < 0)
    losses = torch.where(advantages < 0, losses.minimum(highest), losses)
    mode = loss_agg_mode
    return finish(losses, bound > free, log_ratio, response_mask, mode, config, lower)


@register(POLICY_LOSS_REGISTRY, "cispo")
def compute_policy_loss_cispo(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    bound = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    losses = -bound.detach() * advantages * log_prob
    return finish(losses, bound != ratio, log_ratio, response_mask, loss_agg_mode, config)


@register(POLICY_LOSS_REGISTRY, "sapo")
def compute_policy_loss_sapo(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="seq-mean-token-mean",
    config=None,
    rollout_is_weights=None,
):
    log_ratio = log_prob - old_log_prob
    tau = torch.where(advantages > 0, config.tau_pos, config.tau_neg)
    losses = -torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau * advantages
    none = torch.zeros_like(losses)
    return finish(losses, none, log_ratio, response_mask, "seq-mean-token-mean", config)


@register(POLICY_LOSS_REGISTRY, "gspo")
def compute_policy_loss_gspo(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="seq-mean-token-mean",
    config=None,
    rollout_is_weights=None,
):
    log_ratio = log_prob - old_log_prob
    mean = (log_ratio * response_mask).sum(-1) / response_mask.sum(-1).clamp(min=1)
    ratio = (log_prob - log_prob.detach() + mean.detach()[:, None]).clamp(max=10.0).exp()
    free = -advantages * ratio
    bound = -advantages * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    losses = free.maximum(bound)
    return finish(losses, bound > free, log_ratio, response_mask, loss_agg_mode, config)


def compute_value_loss(
    vpreds,
    returns,
    values,
    response_mask,
    cliprange_value,
    loss_agg_mode="token-mean",
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
    loss_scale_factor=None,
):
    near = vpreds.clamp(values - cliprange_value, values + cliprange_value)
    free, bound = (vpreds - returns) ** 2, (near - returns) ** 2
    totals = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    loss = agg_loss(free.maximum(bound), response_mask, loss_agg_mode, *totals)
    return 0.5 * loss, verl_F.masked_mean((bound > free).float(), response_mask)
