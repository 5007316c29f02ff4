"""Named runs: functions that return a complete configuration."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.recipes.methods import METHODS
from rlhf_fast.recipes.paper import rlhf_workflow
from rlhf_fast.recipes.quickstart import quickstart

RECIPES: dict[str, Callable[[], OnlineConfig]] = {
    "quickstart": quickstart,
    "rlhf-workflow": rlhf_workflow,
}

__all__ = ["METHODS", "RECIPES", "quickstart", "rlhf_workflow"]
