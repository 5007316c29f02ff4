"""Methods that say what is sampled, what is learned from, and how."""

from __future__ import annotations

from typing import Any

Changes = dict[str, Any]

RESPONSES: Changes = {"rule": "all"}
PPO: Changes = {"loss_type": "ppo", "advantage": "gae", "reward_kl_coef": 0.05}


def rl(**settings: Any) -> Changes:
    """Policy gradients from all responses."""
    return {"algorithm": "rl", "selection": RESPONSES, "rl": settings}


def informative_rl(**settings: Any) -> Changes:
    """The same without prompts whose responses all have the same reward."""
    selection = {**RESPONSES, "drop_equal_groups": True}
    return {"algorithm": "rl", "selection": selection, "rl": settings}


POLICY_METHODS: dict[str, tuple[int, Changes]] = {
    # updates from pairs
    "iterative-dpo": (64, {"algorithm": "dpo", "reference": {"rule": "sft"}}),
    "best-vs-random": (40, {"selection": {"rule": "best_vs_random"}}),
    "rpo": (172, {"dpo": {"nll_weight": 1.0}}),
    "inpo": (27, {"dpo": {"loss_type": "ipo_sum", "beta": 0.005, "previous_share": 0.5}}),
    "wpo": (135, {"dpo": {"weigh_by_policy": True}}),
    "r-dpo": (0, {"dpo": {"length_penalty": 0.01}}),
    "simpo": (0, {"dpo": {"loss_type": "simpo", "beta": 2.5, "margin": 1.4}}),
    "ipo": (0, {"dpo": {"loss_type": "ipo", "beta": 0.1}}),
    "orpo": (0, {"dpo": {"loss_type": "orpo", "beta": 0.1, "nll_weight": 1.0}}),
    "spin": (
        0,
        {
            "generation": {"sampler": {"kind": "with_response"}},
            "selection": {"rule": "data_vs_policy"},
            "reference": {"rule": "previous"},
        },
    ),
    "sppo": (
        0,
        {"dpo": {"loss_type": "sppo_hard", "beta": 1e-3}, "reference": {"rule": "previous"}},
    ),
    "osp": (192, {"dpo": {"soft_label_scale": 1.0}}),
    "slic": (46, {"dpo": {"loss_type": "slic", "beta": 1.0, "margin": 1.0, "nll_weight": 0.1}}),
    "cpl": (3, {"dpo": {"loss_type": "cpo", "bias": 0.5}}),
    "xpo": (
        122,
        {
            "generation": {"sampler": {"kind": "mixture", "strength": 1.0}},
            "selection": {"rule": "policy_vs_reference"},
            "dpo": {"exploration": 1e-5},
        },
    ),
    # policy gradients of groups
    "grpo": (0, informative_rl(loss_type="grpo", advantage="grpo")),
    "dapo": (0, informative_rl(loss_type="dapo", advantage="grpo", epsilon_high=0.28)),
    "dr-grpo": (0, rl(loss_type="dr_grpo", advantage="dr_grpo")),
    "gspo": (0, rl(loss_type="gspo", epsilon_low=3e-4, epsilon_high=4e-4)),
    "gspo-token": (0, rl(loss_type="gspo_token", epsilon_low=3e-4, epsilon_high=4e-4)),
    "cispo": (0, informative_rl(loss_type="cispo", epsilon_low=1.0, epsilon_high=4.0)),
    "gmpo": (0, rl(loss_type="gmpo", epsilon_low=0.4, epsilon_high=0.4)),
    "sapo": (0, rl(loss_type="sapo")),
    "high-entropy-tokens": (
        0,
        informative_rl(loss_type="dapo", epsilon_high=0.28, high_entropy_share=0.2),
    ),
    "clip-cov": (
        0,
        informative_rl(
            loss_type="dapo", epsilon_low=1.0, epsilon_high=1.0, covariance={"rule": "clip"}
        ),
    ),
    "kl-cov": (
        0,
        informative_rl(
            loss_type="dapo", epsilon_low=1.0, epsilon_high=1e6, covariance={"rule": "kl"}
        ),
    ),
    "dppo": (0, informative_rl(loss_type="dppo_tv", epsilon_low=0.15, epsilon_high=0.15)),
    "off-policy-masking": (0, informative_rl(off_policy_threshold=0.5)),
    "oreal": (73, informative_rl(loss_type="reinforce", advantage="oreal", kl_coef=0.01)),
    # other policy gradients
    "rloo": (173, rl(loss_type="rloo", advantage="rloo", reward_kl_coef=0.05)),
    "reinforce++": (
        102,
        rl(loss_type="reinforce++", advantage="reinforce++", reward_kl_coef=0.01),
    ),
    "reinforce++-baseline": (102, rl(loss_type="reinforce++", advantage="reinforce++_baseline")),
    "reinforce-rej": (
        0,
        informative_rl(loss_type="grpo", advantage="constant", reward_baseline=0.5),
    ),
    "raft++": (
        0,
        {
            "algorithm": "rl",
            "selection": {"rule": "threshold", "min_reward": 0.5},
            "rl": {"loss_type": "grpo", "advantage": "imitation"},
        },
    ),
    "remax": (
        25,
        {
            **rl(loss_type="remax", advantage="remax", reward_kl_coef=0.05),
            "generation": {"sampler": {"kind": "greedy_extra"}},
        },
    ),
    "a-lol": (9, rl(loss_type="a_lol", advantage="dr_grpo")),
    "ppo": (130, rl(**PPO)),
    "n-step": (0, rl(**PPO, num_steps=5)),
    "ma-rlhf": (68, rl(**PPO, macro_tokens=5)),
    "pf-ppo": (55, {**rl(**PPO), "selection": {"rule": "best_random"}}),
    "dr-po": (118, {**rl(**PPO), "generation": {"sampler": {"kind": "prefix_reset"}}}),
    # imitation and ranked lists
    "raft": (126, {"algorithm": "nll", "selection": {"rule": "top"}}),
    "expert-iteration": (
        54,
        {"algorithm": "nll", "selection": {"rule": "threshold", "min_reward": 0.5}},
    ),
    "sharpening": (137, {"algorithm": "nll", "selection": {"rule": "top"}}),
    "rcrl": (54, {"algorithm": "nll", "selection": RESPONSES, "condition": {"bounds": [0.5]}}),
    "superhf": (
        77,
        {
            "algorithm": "rl",
            "selection": {"rule": "top"},
            "rl": {"loss_type": "reinforce", "advantage": "imitation", "kl_coef": 0.1},
        },
    ),
    "lipo": (188, {"algorithm": "list", "selection": RESPONSES}),
    "rrhf": (
        26,
        {
            "algorithm": "list",
            "selection": RESPONSES,
            "list": {"loss_type": "rrhf", "nll_weight": 1.0},
        },
    ),
    "pro": (
        31,
        {
            "algorithm": "list",
            "selection": RESPONSES,
            "list": {"loss_type": "pro", "nll_weight": 0.05},
        },
    ),
    # desirable and undesirable responses
    "kto": (0, {"algorithm": "unpaired", "selection": RESPONSES}),
    "bco": (
        0,
        {"algorithm": "unpaired", "selection": RESPONSES, "unpaired": {"loss_type": "bco_pair"}},
    ),
    # samplers
    "pilaf": (171, {"generation": {"sampler": {"kind": "pilaf", "strength": 0.1}}}),
    "nash-md": (
        84,
        {
            **rl(
                loss_type="reinforce",
                advantage="constant",
                reward_baseline=0.5,
                reward_kl_coef=0.01,
            ),
            "reward": {"ranking": "opponents"},
            "selection": {**RESPONSES, "own_samples_only": True},
            "generation": {"sampler": {"kind": "mixture", "strength": 0.125}},
        },
    ),
    # references
    "salsa": (89, {"reference": {"rule": "soup", "models": ["sft", "SECOND_SFT_MODEL"]}}),
    "warp": (57, {"reference": {"rule": "ema", "decay": 0.5}}),
    "apo": (176, {"reference": {"extrapolation": 0.3}}),
    # merging inside the optimiser
    "online-dare": (
        104,
        {"dpo": {"optimizer": {"merging": {"rule": "dare", "density": 0.01, "strength": 1e-7}}}},
    ),
    "online-ties": (
        104,
        {"dpo": {"optimizer": {"merging": {"rule": "ties", "density": 0.01, "strength": 1e-7}}}},
    ),
    "async": (76, {"overlap": True}),
}
