"""List losses of groups of 8 responses."""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from benchmarks import small_losses
from benchmarks.small_losses import Contest
from rlhf_fast.ops import list_loss, list_loss_ref

SIZE = 8


def plackett_luce(scores, order):
    """For groups of one size; the loop over unequal ones is the reference."""
    s = scores.view(-1, SIZE).gather(1, order)
    return (s.flip(1).logcumsumexp(1).flip(1) - s).sum() / len(s)


def lipo_lambda(scores, labels):
    s, y = scores.view(-1, SIZE), labels.view(-1, SIZE)
    rank = s.argsort(1, descending=True).argsort(1) + 1
    discount = 1 / torch.log1p(rank.to(s.dtype))
    gain = torch.exp2(y)
    weight = (gain[:, :, None] - gain[:, None]) * (discount[:, :, None] - discount[:, None])
    phi = softplus(s[:, None] - s[:, :, None]) * weight.abs().detach()
    return phi.masked_fill(y[:, :, None] <= y[:, None], 0.0).sum() / len(s)


SWEEP = ("batch", "generations")


def curves(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, object]:
    """`batch` groups of as many responses as are generated for a prompt."""
    groups, size = sizes["batch"], sizes["generations"]
    scores, labels = torch.randn(2, groups * size, dtype=dtype)
    cu_groups = torch.arange(0, groups * size + 1, size)

    def loss_of(name):
        return lambda x: list_loss(x, labels, cu_groups, loss_type=name)

    losses = {name: loss_of(name) for name in ("plackett_luce", "lipo_lambda")}
    return {name: lambda f=f: small_losses.gradients(f, [scores]) for name, f in losses.items()}


def run(args) -> None:
    groups = max(args.batch // SIZE, 1)
    scores = torch.randn(groups * SIZE)
    labels = torch.rand(groups * SIZE)
    cu_groups = torch.arange(0, groups * SIZE + 1, SIZE)
    order = labels.view(-1, SIZE).argsort(1, descending=True)
    contests = []
    for name, eager in (
        ("plackett_luce", lambda x: plackett_luce(x, order)),
        ("lipo_lambda", lambda x: lipo_lambda(x, labels.to(x.dtype))),
    ):
        compiled = torch.compile(eager, dynamic=False)
        contests.append(
            Contest(
                f"{name}, {groups} groups of {SIZE}",
                [scores],
                lambda x, name=name: list_loss_ref(x, labels, cu_groups, loss_type=name),
                {
                    "rlhf_fast": lambda x, name=name: list_loss(
                        x, labels, cu_groups, loss_type=name
                    ),
                    "eager": eager,
                    "torch.compile": compiled,
                },
                num_bytes=16 * scores.numel(),
            )
        )
    small_losses.run("list_loss", contests, args)
