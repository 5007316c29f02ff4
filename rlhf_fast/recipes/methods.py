"""Published methods as changes to a configuration: `rlhf-fast online --method NAME`.

The number is the method's id in docs/paper_index.md. What a method needs from the user (models,
functions, a judge's address) is left out and asked for when the run starts.
"""

from __future__ import annotations

from rlhf_fast.recipes.policy_methods import POLICY_METHODS
from rlhf_fast.recipes.reward_methods import REWARD_METHODS

METHODS = POLICY_METHODS | REWARD_METHODS
