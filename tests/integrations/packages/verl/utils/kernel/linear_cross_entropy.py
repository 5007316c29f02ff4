from verl.utils.experimental.torch_functional import FusedLinearForPPO


def linear_cross_entropy(
    hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
):
    return FusedLinearForPPO()(hidden.flatten(0, -2), weight, labels.flatten(), temperature)
