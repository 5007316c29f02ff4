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


@register(ADV_ESTIMATOR_REGISTRY, "grpo_vectorized")
def compute_grpo_vectorized_outcome_advantage(
    token_level_rewards,
    response_mask,
    index,
    epsilon=1e-6,
    norm_adv_by_std_in_grpo=True,
    config=None,
):
    grpo = compute_grpo_outcome_advantage
    return grpo(token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo)


@register(ADV_ESTIMATOR_REGISTRY, "grpo_passk")
def compute_grpo_passk_outcome_advantage(
    token_level_rewards,
    response_mask,
    index,
    epsilon=1e-6,
    norm_adv_by_std_in_grpo=True,
    config=None,
    **kwargs,
):
    def of_group(scores):
        lead = scores.topk(2).values.diff().neg() / (scores.std() + epsilon)
        return torch.zeros_like(scores).index_fill(0, scores.argmax(), lead.item())

    return compute_group_advantage(token_level_rewards, response_mask, index, of_group)


@register(ADV_ESTIMATOR_REGISTRY, "reinforce_plus_plus_baseline")
def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
):
    grpo = compute_grpo_outcome_advantage
    scores, _ = grpo(token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=False)
    scores = verl_F.masked_whiten(scores, response_mask) * response_mask
    return scores, scores


@register(ADV_ESTIMATOR_REGISTRY, "opo")
def compute_opo_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
):
    scores, lengths = token_level_rewards.sum(-1), response_mask.sum(-1)
    advantages = scores.clone()
    for name in set(index):
        rows = torch.tensor([other == name for other in index])
        if rows.sum() > 1:
            mean = (lengths * scores)[rows].sum() / lengths[rows].sum()
            advantages[rows] = scores[rows] - mean
    advantages = advantages[:, None] * response_mask
    return advantages, advantages


@register(ADV_ESTIMATOR_REGISTRY, "reinforce_plus_plus")
def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards, response_mask, config=None, **kwargs
):
    returns, ahead = torch.zeros_like(token_level_rewards), 0.0
    for t in reversed(range(returns.shape[1])):
        live = response_mask[:, t] > 0
        returns[:, t] = (token_level_rewards[:, t] + config.gamma * ahead) * live
        ahead = torch.where(live, returns[:, t], ahead)
    return verl_F.masked_whiten(returns, response_mask) * response_mask, returns


@register(ADV_ESTIMATOR_REGISTRY, "gpg")
def compute_gpg_outcome_advantage(
    token_level_rewards,
    response_mask,
    index,
    epsilon=1e-6,
    f_norm=1.0,
    alpha=1.0,
    config=None,
    **kwargs,
):
    grpo = compute_grpo_outcome_advantage
    scores, _ = grpo(token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=False)
    scores = scores * len(scores) / (token_level_rewards.sum(-1) != 0).sum().clamp(min=1) / f_norm
    return scores, scores


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


def dppo(is_inside, old_log_prob, log_prob, advantages, mask, mode, config):
    ratio = (log_prob - old_log_prob).exp().detach()
    inside = is_inside(old_log_prob, log_prob.detach(), advantages, config)
    highest = config.get("clip_ratio_c", 20.0)
    losses = -advantages * ratio.clamp(max=highest) * log_prob * inside
    lower = (ratio > highest) & inside
    return finish(losses, ~inside, log_prob - old_log_prob, mask, mode, config, lower)


@register(POLICY_LOSS_REGISTRY, "dppo_tv")
def compute_policy_loss_dppo_tv(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    def is_inside(old, new, advantages, config):
        moved = new.exp() - old.exp()
        up, down = moved <= config.clip_ratio_high, moved >= -config.clip_ratio_low
        return torch.where(advantages > 0, up, down)

    given = (old_log_prob, log_prob, advantages, response_mask)
    return dppo(is_inside, *given, loss_agg_mode, config)


@register(POLICY_LOSS_REGISTRY, "dppo_kl")
def compute_policy_loss_dppo_kl(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    def is_inside(old, new, advantages, config):
        p, q = old.exp(), new.exp()
        kl = p * (old - new) + (1 - p) * ((1 - p + 1e-8) / (1 - q + 1e-8)).log()
        up, down = kl <= config.clip_ratio_high, kl <= config.clip_ratio_low
        return torch.where(advantages > 0, up | (q <= p), down | (q >= p))

    given = (old_log_prob, log_prob, advantages, response_mask)
    return dppo(is_inside, *given, loss_agg_mode, config)


@register(POLICY_LOSS_REGISTRY, "gpg")
def compute_policy_loss_gpg(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    losses = -log_prob * advantages
    return agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info), {}


def compute_policy_loss_reinforce(
    rollout_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="seq-mean-token-sum",
    config=None,
    rollout_is_weights=None,
):
    losses = -log_prob * advantages * (1.0 if rollout_is_weights is None else rollout_is_weights)
    given = (log_prob - rollout_log_prob, response_mask, loss_agg_mode, config)
    loss, metrics = finish(losses, torch.zeros_like(losses), *given)
    return loss, {"actor/ppo_kl": metrics["actor/ppo_kl"]}


@register(POLICY_LOSS_REGISTRY, "dro")
def compute_policy_loss_dro(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    log_ratio = log_prob - old_log_prob
    losses = config.policy_loss.dro_beta / 2 * log_ratio.square() - advantages * log_prob
    given = (log_ratio, response_mask, loss_agg_mode, config)
    loss, metrics = finish(losses, torch.zeros_like(losses), *given)
    return loss, {"actor/ppo_kl": metrics["actor/ppo_kl"]}


def covariances(advantages, log_prob, mask):
    centred = (x - verl_F.masked_mean(x, mask) for x in (advantages, log_prob.detach()))
    return torch.mul(*centred).masked_fill(mask == 0, -torch.inf)


@register(POLICY_LOSS_REGISTRY, "clip_cov")
def compute_policy_loss_clip_cov(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    log_ratio = log_prob - old_log_prob
    free = -advantages * log_ratio.exp()
    low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    bound = -advantages * log_ratio.exp().clamp(low, high)
    settings, found = config.policy_loss, covariances(advantages, log_prob, response_mask)
    found = (found > settings.clip_cov_lb) & (found < settings.clip_cov_ub) & (bound <= free)
    places, count = found.nonzero(), int(settings.clip_cov_ratio * response_mask.sum())
    drawn = torch.zeros_like(found)
    for row, column in places[torch.randperm(len(places))[: max(count, 1)]]:
        drawn[row, column] = True
    losses = free.maximum(bound) * ~drawn
    loss, metrics = finish(losses, drawn, log_ratio, response_mask, loss_agg_mode, config)
    return loss, {k: metrics[k] for k in ("actor/pg_clipfrac", "actor/ppo_kl")}


@register(POLICY_LOSS_REGISTRY, "kl_cov")
def compute_policy_loss_kl_cov(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    log_ratio = log_prob - old_log_prob
    found, settings = covariances(advantages, log_prob, response_mask), config.policy_loss
    count = max(int(settings.kl_cov_ratio * response_mask.sum()), 1)
    worst = found >= found.flatten().topk(count).values[-1]
    losses = settings.ppo_kl_coef * log_ratio.abs() * worst - advantages * log_ratio.exp()
    given = (-log_ratio.abs(), response_mask, loss_agg_mode, config)
    loss, metrics = finish(losses, worst, *given)
    return loss, {"actor/ppo_kl": metrics["actor/ppo_kl"]}


@register(POLICY_LOSS_REGISTRY, "geo_mean")
def compute_policy_loss_geo_mean(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    log_ratio = log_prob - old_log_prob
    near = log_ratio.clamp(-config.clip_ratio_low, config.clip_ratio_high)
    least = torch.where(advantages > 0, log_ratio.minimum(near), log_ratio.maximum(near))
    lengths = response_mask.sum(-1).clamp(min=1)
    ratio = ((least * response_mask).sum(-1) / lengths).exp()
    loss = -((advantages * response_mask).sum(-1) / lengths * ratio).mean()
    far, sides = near != log_ratio, (advantages > 0, advantages < 0)
    given = (log_ratio, response_mask, "token-mean", config)
    _, metrics = finish(log_prob, far & sides[0], *given, far & sides[1])
    return loss, metrics


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
