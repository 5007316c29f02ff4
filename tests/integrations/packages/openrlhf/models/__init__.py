from .actor import Actor
from .loss import DPOLoss, PairWiseLoss, PolicyLoss, ValueLoss

__all__ = ["Actor", "DPOLoss", "PairWiseLoss", "PolicyLoss", "ValueLoss"]
