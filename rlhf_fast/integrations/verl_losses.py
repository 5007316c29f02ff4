"""What takes the place of verl's policy losses and of its value loss.

verl finds them by name in its registry; `patch()` swaps the entries, so configurations stay as they
are. Where a setting has no counterpart the original is called.
"""

from __future__ import annotations

import torch

from rlhf_fast.integrations.declining import declined
from rlhf_fast.integrations.patching import Seam
from rlhf_fast.integrations.verl_advantages import CORE
from rlhf_fast.losses import drawn_covariances, highest_covariances
from rlhf_fast.ops import PolicyLossParams, policy_loss, value_loss
from rlhf_fast.ops.aggregation import AGGREGATIONS

CLIPPED, KL, DUAL = "actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"
LOG_RATIO_BOUND = 20.0
"""verl's own, of these losses; the others have none."""
BOUNDED = ("ppo", "cispo", "sapo", "dppo_tv", "dppo_kl")
UNBOUNDED = float("inf")
NOTHING = 1e-30
"""A weight in place of 0, with which a token still counts among the clipped."""


def with_signature(compute):
    """A seam's replacement from `compute`, called with verl's arguments in their order; what it or
    `policy_loss` refuses with a ValueError stays with verl."""

    def replace(original):
        def replacement(
            old_log_prob,
            log_prob,
            advantages,
            response_mask,
            loss_agg_mode=original.__defaults__[0],
            config=None,
            rollout_is_weights=None,
        ):
            args = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config)
            args = (*args, rollout_is_weights)
            try:
                return compute(*args)
            except ValueError as error:
                reason = str(error)
            return declined(original, reason)(*args)

        return replacement

    return replace


def policy(loss_type: str, aggregation: str | None = None, metrics=(CLIPPED, KL, DUAL)):
    """`aggregation`: what the loss uses whatever `loss_agg_mode` says."""

    @with_signature
    def replace(old, logps, advantages, mask, mode, config, weights):
        params = _params(loss_type, aggregation or mode, config)
        if loss_type == "dro" and weights is not None:
            raise ValueError("rollout_is_weights must be None, as they weigh its square")
        advantages = _weighted(advantages, weights)
        loss, found = _loss(old, logps, advantages, mask, loss_type, params, config)
        if not metrics:
            return loss, {}
        numbers = _numbers(
            {
                CLIPPED: found.clip_low + found.clip_high,
                KL: found.old_kl_k1,
                DUAL: found.clip_dual,
                "squares": found.old_kl_k2 * found.num_tokens * 2,
            }
        )
        if loss_type in BOUNDED and not numbers["squares"] < LOG_RATIO_BOUND**2:
            log_ratio = (logps.detach() - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
            numbers[KL] = -_mean(log_ratio, mask.bool()).item()
        return loss, {name: numbers[name] for name in metrics}

    return replace


def reinforce(original):
    """Of `bypass_mode`, which names the first argument."""
    ours = policy("reinforce", metrics=(KL,))(original)
    return lambda rollout_log_prob, *args, **kwargs: ours(rollout_log_prob, *args, **kwargs)


@with_signature
def clip_cov(old, logps, advantages, mask, mode, config, weights):
    params, live = _params("clip_cov", mode, config), mask.bool()
    ratio = (logps.detach() - old).exp()
    is_low = (advantages < 0) & (ratio < 1 - params.epsilon_low)
    is_high = (advantages > 0) & (ratio > 1 + params.epsilon_high)
    settings = config.policy_loss
    drawn = drawn_covariances(
        advantages,
        logps,
        live,
        share=_given(settings.clip_cov_ratio, 2e-4),
        low=_given(settings.clip_cov_lb, 1.0),
        high=_given(settings.clip_cov_ub, 5.0),
        spared=is_low | is_high,
    )
    advantages = _weighted(advantages, weights).masked_fill(drawn, 0.0)
    loss, found = _loss(old, logps, advantages, mask, "ppo", params, config)
    return loss, _numbers({CLIPPED: _mean(drawn.float(), live), KL: found.old_kl_k1})


def kl_cov(original):
    """Its penalty is aggregated like the loss, by verl's own function."""
    aggregate = original.__globals__["agg_loss"]

    @with_signature
    def replace(old, logps, advantages, mask, mode, config, weights):
        params, live, settings = _params("kl_cov", mode, config), mask.bool(), config.policy_loss
        share = _given(settings.kl_cov_ratio, 2e-4)
        worst = highest_covariances(advantages, logps, live, share=share)
        advantages = _weighted(advantages, weights)
        loss, _ = _loss(old, logps, advantages, mask, "ppo", params, config)
        gaps = (logps - old).abs()
        penalty = _given(settings.ppo_kl_coef, 1.0) * gaps.masked_fill(~worst, 0.0)
        penalty = penalty if weights is None else penalty * weights
        loss = loss + aggregate(penalty, mask, mode, **config.global_batch_info)
        return loss, _numbers({KL: _mean(gaps.detach(), live)})

    return replace(original)


@with_signature
def geo_mean(old, logps, advantages, mask, mode, config, weights):
    """GMPO: of advantages that are one per sequence; its mean is over all of them, empty or not."""
    params, live = _params("gmpo", "seq-mean-token-mean", config), mask.bool()
    of_sequence = advantages.masked_fill(~live, -torch.inf).amax(1)
    if weights is not None:
        raise ValueError("rollout_is_weights must be None")
    if (advantages.masked_fill(~live, torch.inf).amin(1) < of_sequence).any():
        raise ValueError("advantages must be the same all along a sequence")
    of_sequence = of_sequence.masked_fill(~live.any(1), 0.0)
    settings = {"mask": live, "loss_type": "gmpo", "params": params, "normalizer": len(mask)}
    loss, found = policy_loss(logps, old, of_sequence, **settings)
    log_ratio = logps.detach() - old
    is_far = (log_ratio < -params.epsilon_low) | (log_ratio > params.epsilon_high)
    high, low = (_mean((is_far & side).float(), live) for side in (advantages > 0, advantages < 0))
    return loss, _numbers({CLIPPED: high, KL: found.old_kl_k1, DUAL: low})


def _loss(old, logps, advantages, mask, loss_type, params, config):
    return policy_loss(
        logps,
        old,
        advantages,
        mask=mask.bool(),
        loss_type=loss_type,
        params=params,
        normalizer=_normalizer(params.aggregation, mask, **config.global_batch_info),
    )


def _mean(values, mask):
    return values.masked_fill(~mask, 0.0).sum() / mask.sum()


def _weighted(advantages, weights):
    """verl's weights multiply a token's loss, which is linear in its advantage but for the sign."""
    return advantages if weights is None else advantages * weights.clamp(min=NOTHING)


def _numbers(metrics: dict) -> dict[str, float]:
    """With one copy from the device."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))


def _given(setting, default):
    return default if setting is None else setting


def _params(loss_type: str, aggregation: str, config) -> PolicyLossParams:
    """Raises ValueError for what `policy_loss` would refuse, or verl has to refuse itself."""
    if config is None:
        raise ValueError("config must be given")
    options = {"aggregation": aggregation}
    if loss_type not in ("sapo", "reinforce", "dro", "kl_cov"):
        options["epsilon_low"] = _given(config.clip_ratio_low, config.clip_ratio)
        options["epsilon_high"] = _given(config.clip_ratio_high, config.clip_ratio)
    if loss_type not in BOUNDED:
        options["log_ratio_bound"] = UNBOUNDED
    if loss_type == "sapo":
        options |= {"sapo_temperature_pos": config.tau_pos, "sapo_temperature_neg": config.tau_neg}
    if loss_type == "gspo_token":  # verl bounds it above only; below, e^-10 is nothing either
        options["log_ratio_bound"] = 10.0
    if loss_type == "dro":
        options["dro_beta"] = _given(config.policy_loss.dro_beta, 0.0)  # which is refused
    if loss_type == "kl_cov":  # no clip at all
        options |= {"epsilon_low": 1.0, "epsilon_high": 1e38}
    if loss_type == "ppo":
        options["dual_clip"] = config.get("clip_ratio_c", 3.0)
    if loss_type.startswith("dppo"):  # probabilities of tokens however far they moved
        options |= {"dual_clip": config.get("clip_ratio_c", 20.0), "log_ratio_bound": UNBOUNDED}
    return PolicyLossParams(**options)


def value(original):
    def replacement(
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
        totals = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
        if loss_agg_mode not in AGGREGATIONS or not cliprange_value > 0:
            args = (vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode)
            must = f"cliprange_value must be positive and loss_agg_mode one of {AGGREGATIONS}"
            return declined(original, must)(*args, *totals)
        out = value_loss(
            vpreds,
            returns,
            old_values=values,
            clip=cliprange_value,
            mask=response_mask.bool(),
            aggregate=loss_agg_mode,
            normalizer=_normalizer(loss_agg_mode, response_mask, *totals),
        )
        return out.loss, out.metrics.clip_fraction

    return replacement


def _normalizer(
    aggregation: str,
    mask,
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
    loss_scale_factor=None,
):
    """What verl divides the sum by, from the whole step's counts if it knows them."""
    if aggregation == "token-sum":
        return 1.0 / dp_size
    if aggregation == "token-mean":
        count = mask.sum() if batch_num_tokens is None else batch_num_tokens
    else:
        count = (mask.sum(-1) > 0).sum() if global_batch_size is None else global_batch_size
    if aggregation == "seq-mean-token-sum-norm":
        count = count * (loss_scale_factor or mask.shape[-1])
    return count / dp_size


# ---- the table of seams --------------------------------------------------------------------------

SIGNATURE = (
    "({}, log_prob, advantages, response_mask, loss_agg_mode='{}', config=None, "
    "rollout_is_weights=None)"
)


def _seam(name: str, replace, mode: str = "token-mean", old: str = "old_log_prob") -> Seam:
    return Seam(f"{CORE}:compute_policy_loss_{name}", replace, (SIGNATURE.format(old, mode),))


LOSSES = (
    _seam("vanilla", policy("ppo")),
    _seam("cispo", policy("cispo")),
    _seam("sapo", policy("sapo", "seq-mean-token-mean"), "seq-mean-token-mean"),
    _seam("gspo", policy("gspo_token"), "seq-mean-token-mean"),
    _seam("dppo_tv", policy("dppo_tv")),
    _seam("dppo_kl", policy("dppo_kl")),
    _seam("gpg", policy("reinforce", metrics=())),
    _seam("dro", policy("dro", metrics=(KL,))),
    _seam("clip_cov", clip_cov),
    _seam("kl_cov", kl_cov),
    _seam("geo_mean", geo_mean),
    _seam("reinforce", reinforce, "seq-mean-token-sum", "rollout_log_prob"),
    Seam(
        f"{CORE}:compute_value_loss",
        value,
        (
            "(vpreds, returns, values, response_mask, cliprange_value, "
            "loss_agg_mode='token-mean', dp_size=1, batch_num_tokens=None, "
            "global_batch_size=None, loss_scale_factor=None)",
        ),
    ),
)
