"""Fused heads on two processes: gathered weights, DTensors, and rows divided over ranks."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from rlhf_fast.ops import linear_logps, linear_policy_loss, linear_preference_loss
from tests.ops.heads import make
from tests.ops.test_linear_preference_loss import LENGTHS, offsets, references

RANKS = 2


def token_loss(problem, rows):
    """A sum over rows with the normaliser of all rows: ranks and micro-batches add up."""
    found = linear_logps(problem.hidden[rows], problem.weight, problem.labels[rows])
    return -found.logps.sum() / len(problem.labels)


def pair_loss(problem, pairs):
    starts = offsets(LENGTHS)
    first, last = starts[2 * pairs.start], starts[2 * pairs.stop]
    refs = (t[pairs] for t in references("sigmoid"))
    return linear_preference_loss(
        problem.hidden[first:last],
        problem.weight,
        problem.labels[first:last],
        starts[2 * pairs.start : 2 * pairs.stop + 1] - first,
        *refs,
        num_pairs=len(LENGTHS) // 2,
    ).loss


def policy_loss(loss_type):
    def loss(problem, rows):
        """Sequences of 10 tokens."""
        count = (rows.stop - rows.start) // 10
        generator = torch.Generator().manual_seed(9)
        advantages = torch.randn(len(problem.labels) // 10, generator=generator)
        return linear_policy_loss(
            problem.hidden[rows].view(count, 10, -1),
            problem.weight,
            problem.labels[rows].view(count, 10),
            None,
            advantages[rows.start // 10 : rows.stop // 10],
            loss_type=loss_type,
            normalizer=30.0,
        ).loss

    return loss


LOSSES = {
    "tokens": (token_loss, [slice(0, 130), slice(130, 300)]),
    "pairs": (pair_loss, [slice(0, 2), slice(2, 6)]),
    "ppo": (policy_loss("ppo"), [slice(0, 130), slice(130, 300)]),
    "gspo": (policy_loss("gspo"), [slice(0, 130), slice(130, 300)]),
}


def expected(name):
    loss, (first, second) = LOSSES[name]
    leaves = make().leaves()
    loss(leaves, slice(first.start, second.stop)).backward()
    return leaves.gradients()


def sharded(rank, name):
    """Each rank owns half of the weight, as with fully_shard; the gradient is a DTensor as well."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    leaves = make().leaves()
    leaves.weight = distribute_tensor(leaves.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    loss, parts = LOSSES[name]
    loss(leaves, parts[rank]).backward()
    grad = leaves.weight.grad
    assert isinstance(grad, DTensor) and grad.placements == (Shard(0),)
    return leaves.hidden.grad, grad.full_tensor()


def gathered(rank, name):
    """The weight is whole inside a context only, as with ZeRO-3, and the engine sums gradients."""
    leaves = make().leaves()
    own = leaves.weight.detach().tensor_split(RANKS)[rank].contiguous()
    with pytest.raises(ValueError, match="gather a partitioned weight"):
        linear_logps(leaves.hidden, own[:0], leaves.labels)
    shards = [torch.empty(rows.shape) for rows in leaves.weight.tensor_split(RANKS)]
    for owner, shard in enumerate(shards):
        dist.broadcast(own if owner == rank else shard, owner)
    shards[rank] = own
    leaves.weight = torch.cat(shards).requires_grad_()
    loss, parts = LOSSES[name]
    loss(leaves, parts[rank]).backward()
    dist.all_reduce(leaves.weight.grad)
    return leaves.hidden.grad, leaves.weight.grad


def work(rank, port, case, path):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    results = {}
    for name in LOSSES:
        d_hidden, d_weight = case(rank, name)
        dist.all_reduce(d_hidden)  # each rank has its own rows
        results |= {f"{name} hidden": d_hidden, f"{name} weight": d_weight}
    if rank == 0:
        save_file(results, path)
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("case", [sharded, gathered], ids=["dtensor", "gathered"])
def test_two_ranks_give_the_gradient_of_one(case, tmp_path):
    path = tmp_path / "gradients.safetensors"
    mp.spawn(work, (free_port(), case, path), nprocs=RANKS)
    results = load_file(path)
    for name in LOSSES:
        for which, want in expected(name).items():
            torch.testing.assert_close(results[f"{name} {which}"], want, rtol=1e-4, atol=1e-6)
