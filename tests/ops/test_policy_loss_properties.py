"""What holds for every policy loss: splits, orders, masks, dispatcher, compiler, bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import PolicyLossParams, policy_loss, policy_loss_coefficients
from rlhf_fast.ops.policy_params import AGGREGATIONS, LOSS_TYPES
from tests.ops.policy_batches import make, run


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss_type", ["ppo", "gspo", "vespo"])
def test_the_split_into_micro_batches_changes_nothing(device, loss_type, aggregation):
    inputs = make(6, 30, device)
    params = PolicyLossParams(
        aggregation=aggregation, kl_coef=0.1, entropy_coef=0.01, max_length=30
    )
    kwargs = dict(loss_type=loss_type, params=params)
    whole = run(policy_loss, inputs, **kwargs)
    mask = inputs["mask"]
    sequences = mask.any(1).sum()
    normalizer = {
        "token-mean": mask.sum(),
        "token-sum": 1,
        "seq-mean-token-sum-norm": sequences * 30,
    }.get(aggregation, sequences)
    for sizes in ([1] * 6, [2, 4], [5, 1]):
        parts = [
            run(policy_loss, part, normalizer=normalizer, **kwargs) for part in split(inputs, sizes)
        ]
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
        for k in (2, 3):
            torch.testing.assert_close(torch.cat([p[k] for p in parts]), whole[k])


def split(inputs, sizes):
    pieces = {name: x.split(sizes) for name, x in inputs.items()}
    return [{name: x[i] for name, x in pieces.items()} for i in range(len(sizes))]


@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 40),
    loss_type=st.sampled_from(sorted(LOSS_TYPES)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_properties(batch, length, loss_type, seed):
    inputs = make(batch, length, seed=seed, spread=0.1)
    loss, metrics, grad, _ = run(policy_loss, inputs, loss_type=loss_type)
    assert (grad[~inputs["mask"]] == 0).all()
    # The order of sequences does not matter.
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    shuffled = {name: x[order] for name, x in inputs.items()}
    again = run(policy_loss, shuffled, loss_type=loss_type)
    torch.testing.assert_close(again[0], loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(again[2], grad[order])
    # Equal policies: ratio 1, nothing clipped, no KL; the gradient is that of -A logp but for vespo
    # and a_lol, which weigh sequences by their advantage's sign.
    same = {k: inputs[k] for k in ("logps", "advantages", "mask")} | {"old_logps": inputs["logps"]}
    params = PolicyLossParams(aggregation="token-sum", ratio_level="token")
    _, metrics, grad, _ = run(policy_loss, same, loss_type=loss_type, params=params)
    counted = bool(inputs["mask"].any())
    assert metrics["ratio"] == float(counted) and metrics["clip_low"] + metrics["clip_high"] == 0
    assert metrics["old_kl_k3"] == metrics["old_kl_k1"] == 0
    want = -inputs["advantages"] * inputs["mask"]
    if loss_type == "a_lol":
        want = want.clamp(max=0)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_empty_and_fully_masked_batches_stay_connected(device, loss_type):
    for batch, length in ((0, 5), (3, 0), (3, 7)):
        inputs = make(max(batch, 1), length, device)
        inputs = {name: x[:1].expand(batch, length).clone() for name, x in inputs.items()}
        inputs["mask"] = torch.zeros(batch, length, dtype=torch.bool, device=device)
        loss, metrics, grad, _ = run(policy_loss, inputs, loss_type=loss_type)
        assert loss == 0 and (grad == 0).all() and grad.shape == (batch, length)
        assert all(float(x) == 0 for x in metrics.values())


def test_masked_tokens_may_hold_anything(device):
    inputs = make(5, 40, device)
    params = PolicyLossParams(kl_coef=0.1, entropy_coef=0.1)
    masked = ~inputs["mask"]
    for value in (torch.nan, torch.inf, -torch.inf):
        other = {
            k: x.masked_fill(masked, value) if x.is_floating_point() else x
            for k, x in inputs.items()
        }
        for loss_type in ("ppo", "gspo", "gmpo", "vespo", "sapo"):
            a, b = (
                run(policy_loss, x, loss_type=loss_type, params=params) for x in (inputs, other)
            )
            assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])


def test_nan_logps_show_in_the_loss_and_stay_in_their_token(device):
    inputs = make(3, 40, device)
    inputs["mask"][:] = True
    inputs["logps"][1, 5] = torch.nan
    for loss_type, spread in (("ppo", 1), ("gspo", 40)):
        loss, _, grad, _ = run(policy_loss, inputs, loss_type=loss_type)
        assert loss.isnan() and grad.isnan().sum() <= spread


def test_coefficients_are_the_gradient(device):
    inputs = make(5, 40, device)
    params = PolicyLossParams(kl_coef=0.1, entropy_coef=0.1)
    for loss_type in ("ppo", "gspo"):
        loss, _, d_logps, d_entropy = run(policy_loss, inputs, loss_type=loss_type, params=params)
        args = dict(inputs)
        out = policy_loss_coefficients(
            args.pop("logps"), args.pop("old_logps"), args.pop("advantages"), **args,
            loss_type=loss_type, params=params,
        )  # fmt: skip
        assert torch.equal(out.loss, loss) and torch.equal(out.d_logps, d_logps)
        assert torch.equal(out.d_entropy, d_entropy)


def test_upstream_gradient_and_other_dtypes(device):
    inputs = make(4, 33, device)
    for dtype in (torch.bfloat16, torch.float64):
        x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        logps = x["logps"].requires_grad_()
        loss = policy_loss(logps, x["old_logps"], x["advantages"], mask=x["mask"]).loss
        (3 * loss).backward()
        plain = {k: x[k].detach().float() for k in ("logps", "old_logps", "advantages")}
        want = run(policy_loss, plain | {"mask": x["mask"]})[2]
        assert logps.grad.dtype == dtype and loss.dtype == torch.float32
        torch.testing.assert_close(logps.grad, (3 * want).to(dtype))


def test_bitwise_repeatable_and_independent_of_threads(device):
    inputs = make(40, 300, device)
    first = run(policy_loss, inputs, loss_type="gspo")
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            again = run(policy_loss, inputs, loss_type="gspo")
            assert torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])
    finally:
        torch.set_num_threads(threads)


# ---- dispatcher, compiler, bad input -------------------------------------------------------------


def test_opcheck(device):
    x = make(3, 20, device)
    params = PolicyLossParams(kl_coef=0.1, entropy_coef=0.1)
    given = [x[k] for k in ("logps", "old_logps", "advantages", "mask")]
    rest = [x[k] for k in ("ref_logps", "sampling_logps", "entropy")]
    numbers = params.choices("gspo", False), params.settings()
    how = (None, None, 1, False, 1.0)
    op = torch.ops.rlhf_fast.policy_loss
    for wanted in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(op, (*given, None, *rest, *how, *numbers, *wanted))
    cu_seqlens = torch.tensor([0, 25, 60], device=device)
    flat = [t.reshape(-1) for t in given[:3]]
    one = torch.ones((), device=device)
    args = (
        *flat,
        None,
        cu_seqlens,
        None,
        None,
        None,
        one,
        None,
        0,
        True,
        0.5,
        *numbers,
        True,
        False,
    )
    torch.library.opcheck(op, args)


def test_torch_compile_without_graph_breaks(device):
    params = PolicyLossParams(entropy_coef=0.1)

    def loss(logps, old, advantages, mask, entropy):
        out = policy_loss(
            logps * 2, old * 2, advantages, mask=mask, entropy=entropy * 2, params=params
        )
        return out.loss + out.metrics.old_kl_k3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = make(6, 20, device)
    for n in (6, 4):
        args = [x[k][:n] for k in ("old_logps", "advantages", "mask")]
        grads = []
        for function in (compiled, loss):
            logps = x["logps"][:n].clone().requires_grad_()
            entropy = x["entropy"][:n].clone().requires_grad_()
            function(logps, *args, entropy).backward()
            grads.append((logps.grad, entropy.grad))
        torch.testing.assert_close(grads[0], grads[1])


def p(x, old=None, advantages=None, **kwargs):
    advantages = torch.ones(3) if advantages is None else advantages
    settings = {k: kwargs.pop(k) for k in list(kwargs) if k in PolicyLossParams.__annotations__}
    return policy_loss(x, old, advantages, params=PolicyLossParams(**settings), **kwargs)


BAD = {
    "loss_type must be one of": lambda x: p(x, loss_type="poo"),
    r"logps must have shape \(B, T\)": lambda x: p(x[0]),
    "old_logps must have shape": lambda x: p(x, x[:, 1:]),
    r"advantages must have shape \(3,\)": lambda x: p(x, advantages=torch.ones(4)),
    r"advantages must have shape \(3, 10\)": lambda x: p(x, advantages=torch.ones(3, 1)),
    "mask must be bool": lambda x: p(x, mask=torch.ones(3, 10)),
    "mask must be on cpu": lambda x: p(x, mask=torch.ones(3, 10, device="meta").bool()),
    "ref_logps must be given for a coefficient of 0.1": lambda x: p(x, kl_coef=0.1),
    "entropy must be given": lambda x: p(x, entropy_coef=0.1),
    "epsilon_low must lie in": lambda x: p(x, epsilon_low=1.5),
    "epsilon_high must be finite": lambda x: p(x, epsilon_high=-0.1),
    "dual_clip must exceed": lambda x: p(x, dual_clip=1.1),
    "sampling_high must exceed": lambda x: p(x, sampling_low=2.0),
    "kl_estimator must be one of": lambda x: p(x, kl_estimator="k4"),
    "sampling_level must be token for vespo": lambda x: p(
        x, loss_type="vespo", sampling_logps=x, sampling_level="sequence"
    ),
    "aggregation must be one of": lambda x: p(x, aggregation="mean"),
    "kl_coef must be a number": lambda x: p(x, kl_coef=float("nan")),
    "vespo_k_pos must be positive": lambda x: p(x, vespo_k_pos=0.0),
    "dro_beta must be positive": lambda x: p(x, dro_beta=-1.0),
    "normalizer must be positive": lambda x: p(x, normalizer=0),
    r"normalizer must have shape \(\)": lambda x: p(x, normalizer=torch.ones(1)),
    "max_length must be given": lambda x: p(
        x[0], advantages=x[0], cu_seqlens=torch.tensor([0, 10]), loss_type="dr_grpo"
    ),
    "cu_seqlens must rise": lambda x: p(x[0], advantages=x[0], cu_seqlens=torch.tensor([0, 9])),
    "cu_segments must hold the boundaries": lambda x: p(x, cu_segments=torch.tensor([0, 15, 30])),
    "advantages must be finite": lambda x: p(x, advantages=torch.tensor([1.0, torch.nan, 1.0])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    logps = -torch.rand(3, 10)
    with pytest.raises(ValueError, match=rf"policy_loss: .*{message}.*got .*;"):
        BAD[message](logps)


def test_nan_advantage_is_named():
    inputs = make(3, 10)
    inputs["mask"][:] = True
    inputs["advantages"][1, 4] = torch.inf
    with pytest.raises(ValueError, match="got inf at token 4 of sequence 1"):
        run(policy_loss, inputs)
    inputs["mask"][1, 4] = False
    assert run(policy_loss, inputs)[0].isfinite()


@pytest.mark.parametrize("body", ["portable", "avx2"])
def test_the_bodies_for_older_processors(body):
    script = (
        "from tests.ops import test_policy_loss as t, test_policy_loss_properties as p\n"
        "for loss_type in t.LOSS_TYPES:\n"
        "  for length in (1, 45): t.test_every_loss_matches_float64('cpu', loss_type, length)\n"
        "p.test_masked_tokens_may_hold_anything('cpu')\n"
    )
    env = {**os.environ, "RLHF_FAST_CPU": body}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
