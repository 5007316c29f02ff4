"""Published methods as changes to a configuration: `rlhf-fast online --method NAME`.

The number is the method's id in docs/paper_index.md. What a method needs from the user (models,
functions, a judge's address) is left out and asked for when the run starts.
"""

from __future__ import annotations

from typing import Any

Changes = dict[str, Any]

RESPONSES: Changes = {"rule": "all"}
PPO: Changes = {"loss_type": "ppo", "advantage": "gae", "reward_kl_coef": 0.05}
METHODS: dict[str, tuple[int, Changes]] = {
    # updates from pairs
    "iterative-dpo": (64, {"algorithm": "dpo", "reference": {"rule": "sft"}}),
    "best-vs-random": (40, {"selection": {"rule": "best_vs_random"}}),
    "rpo": (172, {"dpo": {"nll_weight": 1.0}}),
    "inpo": (27, {"dpo": {"loss_type": "ipo_sum", "beta": 0.005, "previous_share": 0.5}}),
    "wpo": (135, {"dpo": {"weigh_by_policy": True}}),
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
    # policy gradients
    "grpo": (0, {"algorithm": "rl", "selection": {**RESPONSES, "drop_equal_groups": True}}),
    "rloo": (
        173,
        {
            "algorithm": "rl",
            "selection": RESPONSES,
            "rl": {"loss_type": "rloo", "advantage": "rloo", "reward_kl_coef": 0.05},
        },
    ),
    "reinforce++": (
        102,
        {
            "algorithm": "rl",
            "selection": RESPONSES,
            "rl": {"loss_type": "reinforce++", "advantage": "reinforce++", "reward_kl_coef": 0.01},
        },
    ),
    "remax": (
        25,
        {
            "algorithm": "rl",
            "selection": RESPONSES,
            "generation": {"sampler": {"kind": "greedy_extra"}},
            "rl": {"loss_type": "remax", "advantage": "remax", "reward_kl_coef": 0.05},
        },
    ),
    "ppo": (
        130,
        {
            "algorithm": "rl",
            "selection": RESPONSES,
            "rl": PPO,
        },
    ),
    "ma-rlhf": (
        68,
        {
            "algorithm": "rl",
            "selection": RESPONSES,
            "rl": {
                "loss_type": "ppo",
                "advantage": "gae",
                "reward_kl_coef": 0.05,
                "macro_tokens": 5,
            },
        },
    ),
    "a-lol": (
        9,
        {
            "algorithm": "rl",
            "selection": RESPONSES,
            "rl": {"loss_type": "a_lol", "advantage": "dr_grpo"},
        },
    ),
    "oreal": (
        73,
        {
            "algorithm": "rl",
            "selection": {**RESPONSES, "drop_equal_groups": True},
            "rl": {"loss_type": "reinforce", "advantage": "oreal", "kl_coef": 0.01},
        },
    ),
    "clip-cov": (
        0,
        {
            "algorithm": "rl",
            "selection": {**RESPONSES, "drop_equal_groups": True},
            "rl": {
                "loss_type": "dapo",
                "epsilon_low": 1.0,
                "epsilon_high": 1.0,
                "covariance": {"rule": "clip"},
            },
        },
    ),
    "kl-cov": (
        0,
        {
            "algorithm": "rl",
            "selection": {**RESPONSES, "drop_equal_groups": True},
            "rl": {
                "loss_type": "dapo",
                "epsilon_low": 1.0,
                "epsilon_high": 1e6,
                "covariance": {"rule": "kl"},
            },
        },
    ),
    "dppo": (
        0,
        {
            "algorithm": "rl",
            "selection": {**RESPONSES, "drop_equal_groups": True},
            "rl": {"loss_type": "dppo_tv", "epsilon_low": 0.15, "epsilon_high": 0.15},
        },
    ),
    "off-policy-masking": (
        0,
        {
            "algorithm": "rl",
            "selection": {**RESPONSES, "drop_equal_groups": True},
            "rl": {"off_policy_threshold": 0.5},
        },
    ),
    "n-step": (
        0,
        {
            "algorithm": "rl",
            "selection": RESPONSES,
            "rl": {**PPO, "num_steps": 5},
        },
    ),
    "pf-ppo": (
        55,
        {
            "algorithm": "rl",
            "selection": {"rule": "best_random"},
            "rl": PPO,
        },
    ),
    "dr-po": (
        118,
        {
            "algorithm": "rl",
            "selection": RESPONSES,
            "generation": {"sampler": {"kind": "prefix_reset"}},
            "rl": PPO,
        },
    ),
    # imitation and ranked lists
    "raft": (126, {"algorithm": "nll", "selection": {"rule": "top"}}),
    "expert-iteration": (54, {"algorithm": "nll", "selection": {"rule": "threshold"}}),
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
            "algorithm": "rl",
            "reward": {"ranking": "opponents"},
            "selection": {**RESPONSES, "own_samples_only": True},
            "generation": {"sampler": {"kind": "mixture", "strength": 0.125}},
            "rl": {
                "loss_type": "reinforce",
                "advantage": "constant",
                "reward_baseline": 0.5,
                "reward_kl_coef": 0.01,
            },
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
    # rewards
    "wco": (61, {"reward": {"ensemble": {"members": 3, "reduction": "min"}}}),
    "uwo": (61, {"reward": {"ensemble": {"members": 3, "reduction": "uwo", "coefficient": 0.5}}}),
    "lcb-ensemble": (49, {"reward": {"ensemble": {"members": 3, "reduction": "lcb"}}}),
    "reward-robust": (
        157,
        {"reward": {"ensemble": {"members": 3, "reduction": "robust", "coefficient": 0.4}}},
    ),
    "lcb-heads": (
        49,
        {"reward": {"training": {"num_outputs": 5}, "ensemble": {"reduction": "lcb"}}},
    ),
    "pairwise-model": (
        40,
        {"reward": {"training": {"objective": "pairwise"}, "ranking": "tournament"}},
    ),
    "qrm": (152, {"reward": {"training": {"objective": "quantiles", "num_outputs": 5}}}),
    "armorm": (13, {"reward": {"training": {"objective": "attributes"}}}),
    "segrm": (
        33,
        {
            "algorithm": "rl",
            "selection": RESPONSES,
            "reward": {"training": {"objective": "segments"}},
            "rl": PPO,
        },
    ),
    "fine-grained": (
        178,
        {
            "algorithm": "rl",
            "selection": RESPONSES,
            "rl": PPO,
        },
    ),
    "rluf": (190, {"reward": {"training": {"objective": "binary"}}}),
    "k-wise": (4, {"reward": {"training": {"objective": "rankings"}}}),
    "conservative-labels": (183, {"reward": {"training": {"label_smoothing": 0.1}}}),
    "contrastive-features": (183, {"reward": {"training": {"contrastive_weight": 1.0}}}),
    "preference-votes": (
        183,
        {"reward": {"vote": {"members": 10, "corrections": ["flip", "margin"]}}},
    ),
    "ser": (71, {"reward": {"refresh": {"labels": "own"}}}),
    "ids": (39, {"reward": {"training": {"label_update_rate": 0.1}}}),
    "maxmin": (65, {"reward": {"ensemble": {"reduction": "min"}}}),
    "contrastive-reward": (74, {"reward": {"shaping": {"baseline_samples": 4}}}),
    "cgpo": (
        8,
        {
            "reward": {
                "composition": {"violation_reward": -1e4},
                "shaping": {"baseline_samples": 4, "calibrated": True},
            }
        },
    ),
    "heron": (83, {"reward": {"composition": {"combination": "ranked"}}}),
    "clip-steps": (96, {"reward": {"steps": "clip", "step_limit": 0.5}}),
    "delta-steps": (96, {"reward": {"steps": "delta"}}),
    "rlaif": (163, {"reward": {"judge": {"mode": "compare", "reasons": True}}}),
    "d-rlaif": (163, {"reward": {"judge": {"mode": "rate"}}}),
    "rlbff": (193, {"reward": {"judge": {"mode": "entail"}}}),
    "genrm": (81, {"reward": {"judge": {"mode": "compare", "reasons": True, "samples": 8}}}),
}
