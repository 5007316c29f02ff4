"""Preference losses of a batch with rewards, accuracies and margins, from sums and from tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from benchmarks import peers, small_losses
from benchmarks.small_losses import Contest
from rlhf_fast.ops import preference_loss, preference_loss_ref, token_preference_loss

BETA = 0.1


def eager(chosen, rejected, ref_chosen, ref_rejected):
    """What a trainer computes per step, as in TRL: the loss and four means for the log."""
    chosen_ratios, rejected_ratios = chosen - ref_chosen, rejected - ref_rejected
    loss = -logsigmoid(BETA * (chosen_ratios - rejected_ratios)).mean()
    rewards = BETA * chosen_ratios.detach(), BETA * rejected_ratios.detach()
    margins = rewards[0] - rewards[1]
    accuracies = (rewards[0] > rewards[1]).float()
    _ = [x.mean() for x in (*rewards, accuracies, margins)]
    return loss


def eager_tokens(logps, ref_logps, mask):
    sums = (logps * mask).sum(1)
    return eager(*sums.chunk(2), *ref_logps.chunk(2))


SWEEP = ("batch", "length")


def curves(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, object]:
    """From tokens; half of the batch is chosen."""
    batch, length = 2 * max(sizes["batch"] // 2, 1), sizes["length"]
    logps, ref_logps = -torch.rand(batch, length, dtype=dtype), -torch.rand(batch) * length
    mask = torch.ones(batch, length, dtype=torch.bool)

    def ours(x):
        return token_preference_loss(x, ref_logps, mask=mask, beta=BETA).loss

    losses = {"rlhf_fast": ours, "eager": lambda x: eager_tokens(x, ref_logps, mask)}
    return {name: lambda f=f: small_losses.gradients(f, [logps]) for name, f in losses.items()}


def run(args) -> None:
    pairs = args.batch // 2
    chosen, rejected, *ref = torch.randn(4, pairs).mul_(20).sub_(300)
    logps = -torch.rand(args.batch, args.length)
    mask = torch.arange(args.length) < torch.randint(1, args.length + 1, (args.batch, 1))
    ref_sums = (logps * mask).sum(1) + torch.randn(args.batch)
    compiled = torch.compile(eager, dynamic=False)
    compiled_tokens = torch.compile(eager_tokens, dynamic=False)
    contests = [
        Contest(
            f"{pairs} pairs",
            [chosen, rejected],
            lambda c, r: preference_loss_ref(c, r, *ref, beta=BETA).loss,
            {
                "rlhf_fast": lambda c, r: preference_loss(c, r, *ref, beta=BETA).loss,
                "eager": lambda c, r: eager(c, r, *ref),
                "torch.compile": lambda c, r: compiled(c, r, *ref),
                **{
                    name: lambda c, r, f=f: f(c, r, *ref)
                    for name, f in peers.dpo_losses(BETA).items()
                },
            },
            num_bytes=4 * 14 * pairs,
        ),
        Contest(
            f"{pairs} pairs of {args.length} tokens",
            [logps],
            lambda x: eager_tokens(x, ref_sums.double(), mask),
            {
                "rlhf_fast": lambda x: (
                    token_preference_loss(x, ref_sums, mask=mask, beta=BETA).loss
                ),
                "eager": lambda x: eager_tokens(x, ref_sums, mask),
                "torch.compile": lambda x: compiled_tokens(x, ref_sums, mask),
            },
            num_bytes=9 * logps.numel(),  # values and mask in, gradient out
        ),
    ]
    small_losses.run("preference_loss", contests, args)
