"""OpenRLHF's own DPOLoss and PairWiseLoss, called as they are, against the kernels."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlhf_fast.ops import PreferenceParams, preference_loss, reward_model_loss

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def losses():
    """Its file of losses alone; what the package around it imports is not needed for them."""
    package = ModuleType("openrlhf_models")
    package.__path__ = [str(Path(find_spec("openrlhf").origin).parent / "models")]
    stand_ins = {package.__name__: package}
    if find_spec("deepspeed") is None:
        stand_ins["deepspeed"] = ModuleType("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("openrlhf_models.loss")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ipo", [False, True])
def test_same_dpo_loss(losses, ipo, smoothing):
    tensors = torch.randn(4, 9).unbind()
    leaves = [[t.clone().requires_grad_() for t in tensors[:2]] for _ in range(2)]
    want = losses.DPOLoss(0.3, smoothing, ipo)(*leaves[0], *tensors[2:])
    params = PreferenceParams(label_smoothing=0.0 if ipo else smoothing)  # its IPO ignores it
    loss_type = "ipo_sum" if ipo else "sigmoid"
    got = preference_loss(*leaves[1], *tensors[2:], loss_type=loss_type, beta=0.3, params=params)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    got.loss.backward()
    want[0].backward()
    for a, b in zip(leaves[1], leaves[0]):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("margin", [None, 0.5])
def test_same_reward_model_loss(losses, margin):
    rewards = torch.randn(2, 9).unbind()
    margins = None if margin is None else torch.full((9,), margin)
    got = reward_model_loss(*rewards, margins=margins).loss
    torch.testing.assert_close(got, losses.PairWiseLoss()(*rewards, margins))
