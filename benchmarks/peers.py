"""The losses of verl and OpenRLHF, called as they are installed; None where they are not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

FAR = 1e9  # verl takes no None for a bound that is off


def _verl():
    """(its algorithms, a configuration of its actor)"""
    try:
        from verl.trainer.ppo import core_algos
        from verl.workers.config import ActorConfig
    except ImportError:
        return None
    sizes = dict(rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    return core_algos, ActorConfig(strategy="fsdp", clip_ratio_c=FAR, **sizes)


def _openrlhf() -> ModuleType | None:
    """Its file of losses alone: the package around it imports what needs a GPU to install."""
    if find_spec("openrlhf") is None:
        return None
    package = ModuleType("openrlhf_models")
    package.__path__ = [str(Path(find_spec("openrlhf").origin).parent / "models")]
    sys.modules[package.__name__] = package
    if "deepspeed" not in sys.modules and find_spec("deepspeed") is None:
        sys.modules["deepspeed"] = ModuleType("deepspeed")
    return importlib.import_module("openrlhf_models.loss")


def present(**functions: Callable | None) -> dict[str, Callable]:
    """The peers that are installed, by name."""
    return {name: function for name, function in functions.items() if function is not None}


def policy_losses(clip: float) -> dict[str, Callable]:
    """Of (logps, old logps, advantages per sequence, mask as float)."""
    verl, openrlhf = _verl(), _openrlhf()

    def of_verl(logps, old_logps, advantages, mask):
        algorithms, config = verl
        advantages = advantages[:, None].expand_as(logps)
        function = algorithms.compute_policy_loss_vanilla
        return function(old_logps, logps, advantages, mask, "token-mean", config)[0]

    loss = openrlhf and openrlhf.PolicyLoss(clip, clip)

    def of_openrlhf(logps, old_logps, advantages, mask):
        return loss(logps, old_logps, advantages[:, None], mask)[0]

    return present(verl=verl and of_verl, OpenRLHF=openrlhf and of_openrlhf)


def value_losses(clip: float) -> dict[str, Callable]:
    """Of (values, old values, returns, mask as float)."""
    verl, openrlhf = _verl(), _openrlhf()

    def of_verl(values, old_values, returns, mask):
        return verl[0].compute_value_loss(values, returns, old_values, mask, clip)[0]

    loss = openrlhf and openrlhf.ValueLoss(clip)

    def of_openrlhf(values, old_values, returns, mask):
        return loss(values, old_values, returns, mask)

    return present(verl=verl and of_verl, OpenRLHF=openrlhf and of_openrlhf)


def dpo_losses(beta: float) -> dict[str, Callable]:
    """Of (chosen, rejected, reference chosen, reference rejected) sums of log-probs."""
    openrlhf = _openrlhf()
    loss = openrlhf and openrlhf.DPOLoss(beta)
    return present(OpenRLHF=openrlhf and (lambda *logps: loss(*logps)[0]))


def gaes(gamma: float, lam: float) -> dict[str, Callable]:
    """Of (rewards, values, mask as float); verl whitens the advantages as well."""
    verl = _verl()

    def of_verl(rewards, values, mask):
        return verl[0].compute_gae_advantage_return(rewards, values, mask, gamma, lam)

    found = present(**{"verl (and whitening)": verl and of_verl})
    try:
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    except ImportError:
        return found
    method = RemoteExperienceMaker.get_advantages_and_returns

    def of_openrlhf(rewards, values, mask):
        return method(None, values, rewards, mask, gamma, lam)

    return found | {"OpenRLHF": of_openrlhf}
