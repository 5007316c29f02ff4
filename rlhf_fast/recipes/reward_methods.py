"""Methods that say where rewards come from."""

from __future__ import annotations

from typing import Any

from rlhf_fast.recipes.policy_methods import PPO, Changes, rl

OTHER_SOURCES = (
    *("function", "model", "pairwise_model", "strong_model", "weak_model"),
    *("pairs", "scores", "labeller"),
)
"""What a method that brings a source of its own takes the place of."""


def trained(**settings: Any) -> Changes:
    """A reward model of another kind than one output on a frozen backbone, as a recipe may have."""
    return {"reward": {"training": {"parameters": "all", **settings}}}


REWARD_METHODS: dict[str, tuple[int, Changes]] = {
    "wco": (61, {"reward": {"ensemble": {"members": 3, "reduction": "min"}}}),
    "uwo": (61, {"reward": {"ensemble": {"members": 3, "reduction": "uwo", "coefficient": 0.5}}}),
    "lcb-ensemble": (49, {"reward": {"ensemble": {"members": 3, "reduction": "lcb"}}}),
    "reward-robust": (
        157,
        {"reward": {"ensemble": {"members": 3, "reduction": "robust", "coefficient": 0.4}}},
    ),
    "lcb-heads": (
        49,
        {"reward": {**trained(num_outputs=5)["reward"], "ensemble": {"reduction": "lcb"}}},
    ),
    "pairwise-model": (
        40,
        {"reward": {**trained(objective="pairwise")["reward"], "ranking": "tournament"}},
    ),
    "qrm": (152, trained(objective="quantiles", num_outputs=5)),
    "armorm": (13, trained(objective="attributes")),
    "segrm": (33, {**rl(**PPO), **trained(objective="segments")}),
    "fine-grained": (178, rl(**PPO)),
    "rluf": (190, trained(objective="binary")),
    "k-wise": (4, trained(objective="rankings")),
    "conservative-labels": (183, {"reward": {"training": {"label_smoothing": 0.1}}}),
    "contrastive-features": (183, trained(contrastive_weight=1.0)),
    "preference-votes": (
        183,
        {"reward": {"vote": {"members": 10, "corrections": ["flip", "margin"]}}},
    ),
    "ser": (71, {"reward": {"refresh": {"labels": "own"}}}),
    "ids": (39, trained(label_update_rate=0.1)),
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
    "self-rewarding": (
        0,
        {
            "reward": {
                **dict.fromkeys(OTHER_SOURCES),
                "models": [],
                "rule": {"kind": None},
                "judge": {
                    **{"url": None, "model": "", "policy": True},
                    **{"mode": "rate", "reasons": True, "samples": 3},
                },
            }
        },
    ),
    "rlbff": (193, {"reward": {"judge": {"mode": "entail"}}}),
    "genrm": (81, {"reward": {"judge": {"mode": "compare", "reasons": True, "samples": 8}}}),
}
