"""Liger's classes, called from its package, against ours."""

from __future__ import annotations

import pytest
import torch
from liger_kernel import chunked_loss as theirs

from rlhf_fast.losses import liger as ours
from rlhf_fast.losses import liger_distillation as ours_distillation
from rlhf_fast.losses import liger_policy as ours_policy
from tests.ops.conftest import assert_as_accurate

pytestmark = pytest.mark.peers

ROWS, LENGTH, WIDTH, VOCAB = 6, 7, 16, 97


def inputs(dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    target = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    target[:, :2] = -100
    target[1, 4:] = -100
    policy = [draw(ROWS, LENGTH, WIDTH), draw(VOCAB, WIDTH), draw(VOCAB) if bias else None]
    reference = [draw(ROWS, LENGTH, WIDTH), draw(VOCAB, WIDTH), draw(VOCAB) if bias else None]
    return policy, reference, target


def run(loss, arguments, policy):
    leaves = [None if t is None else t.clone().requires_grad_() for t in policy]
    value, *metrics = loss(*arguments(*leaves))
    if isinstance(metrics[0], tuple):
        (metrics,) = metrics
    (value * 0.7).backward()
    return [value, *metrics, *(t.grad for t in leaves if t is not None)]


def compare(name, options, arguments, policy):
    module = {"GRPO": ours_policy, "JSD": ours_distillation}.get(name[11:-4], ours)
    classes = (getattr(module, name), getattr(theirs, f"Liger{name}"))
    results = [run(c(compiled=False, **options), arguments, policy) for c in classes]
    assert len(results[0]) == len(results[1])
    for i, (got, expected) in enumerate(zip(*results)):
        assert got.dtype == expected.dtype or i > 0
        scale = max(expected.abs().max().item(), 1.0)
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, i=i: f"result {i}: {m}"
        )


@pytest.mark.parametrize("loss_type", ours.FusedLinearDPOLoss.LOSS_TYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_dpo(loss_type, bias):
    policy, reference, target = inputs(bias=bias)
    smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
    compare(
        "FusedLinearDPOLoss",
        {"loss_type": loss_type, "beta": 0.05, **smoothing},
        lambda h, w, b: (w, h, target, b, *reference),
        policy,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"compute_nll_loss": True, "alpha": 0.3},
        {"average_log_prob": True, "label_smoothing": 0.2},  # which sigmoid ignores
        {"use_ref_model": False},
    ],
)
def test_dpo_options(options):
    policy, reference, target = inputs()
    reference = reference if options.get("use_ref_model", True) else []
    compare("FusedLinearDPOLoss", options, lambda h, w, b: (w, h, target, b, *reference), policy)


def test_dpo_refuses_what_liger_refuses():
    with pytest.raises(ValueError, match="loss_type must be one of"):
        ours.FusedLinearDPOLoss(loss_type="ipo")


@pytest.mark.parametrize("with_nll_target", [False, True])
@pytest.mark.parametrize("compute_nll_loss", [False, True])
def test_orpo(with_nll_target, compute_nll_loss):
    policy, _, target = inputs()
    nll_target = torch.randint(VOCAB, target.shape) if with_nll_target else None
    compare(
        "FusedLinearORPOLoss",
        {"beta": 0.2, "compute_nll_loss": compute_nll_loss},
        lambda h, w, b: (w, h, target, b, nll_target),
        policy,
    )


@pytest.mark.parametrize(
    "name, options",
    [
        ("CPO", {}),
        ("CPO", {"label_smoothing": 0.1, "alpha": 0.5, "beta": 0.3}),
        ("CPO", {"average_log_prob": True, "compute_nll_loss": False}),
        ("SimPO", {}),
        ("SimPO", {"gamma": 1.3, "beta": 2.0, "label_smoothing": 0.1, "compute_nll_loss": False}),
    ],
)
def test_cpo_and_simpo(name, options):
    policy, _, target = inputs()
    arguments = lambda h, w, b: (w, h, target, b)  # noqa: E731
    compare(f"FusedLinear{name}Loss", options, arguments, policy)


@pytest.mark.parametrize("kl", [None, "one", "each"])
@pytest.mark.parametrize("average", [False, True])
def test_kto(kl, average):
    policy, reference, target = inputs()
    labels = torch.tensor([True, False, True, True, False, False])
    kl = {None: None, "one": torch.tensor(0.7), "each": torch.rand(ROWS)}[kl]
    compare(
        "FusedLinearKTOLoss",
        # Liger pairs each chunk with all of kl, so only one chunk tells sequences apart.
        {"use_ref_model": True, "average_log_prob": average, "beta": 0.05, "chunk_size": ROWS},
        lambda h, w, b: (h, w, target, b, labels, *reference, kl),
        policy,
    )


GRPO = [
    {},
    {"loss_type": "grpo", "beta": 0.0},
    {"loss_type": "bnpo", "delta": 1.5},
    {"loss_type": "dr_grpo", "max_completion_length": 20},
    {"loss_type": "cispo", "epsilon_high": 1.5, "beta": 0.0},
    {"loss_type": "sapo"},
    {"loss_type": "vespo"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "temperature": 0.7, "epsilon_low": 0.1, "epsilon_high": 0.28},
]


@pytest.mark.parametrize("options", GRPO, ids=str)
@pytest.mark.parametrize("given", ["nothing", "old and reference", "everything"])
def test_grpo(options, given):
    policy, reference, _ = inputs()
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, 3:] = 0
    advantages = torch.randn(ROWS)
    near = ours.linear_logps(*policy[:2], ids, bias=policy[2]).logps
    ref, old = near + 0.3 * torch.randn(2, ROWS, LENGTH)
    ratio = torch.rand(ROWS, LENGTH) + 0.5
    ratio[mask == 0] = 1.0  # Liger counts them for vespo
    if options.get("loss_type") == "luspo":
        ratio = ratio[:, :1]
    more = {
        "nothing": (None, None, *reference),
        "old and reference": (ref, old, None, None, None),
        "everything": (ref, old, None, None, None, ratio, 31.0),
    }[given]
    compare(
        "FusedLinearGRPOLoss",
        options,
        lambda h, w, b: (h, w, ids, mask, advantages, b, *more),
        policy,
    )


def test_grpo_refuses_what_it_would_compute_otherwise():
    for options in (
        {"loss_type": "luspo"},
        {"loss_type": "sapo", "importance_sampling_level": "x"},
        {"loss_type": "cispo"},
    ):
        with pytest.raises(ValueError, match="FusedLinearGRPOLoss: .* must be"):
            ours_policy.FusedLinearGRPOLoss(**options)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("words_missing", [0, 5])
def test_jsd(beta, words_missing):
    (h, w, b), (th, tw, tb), target = inputs()
    student = [h.flatten(0, 1), w[: VOCAB - words_missing], b[: VOCAB - words_missing]]
    target = target.flatten().clamp(max=VOCAB - words_missing - 1)
    compare(
        "FusedLinearJSDLoss",
        {"beta": beta, "temperature": 1.5, "weight_hard_loss": 0.2, "return_soft_hard_loss": True},
        lambda h, w, b: (h, w, th.flatten(0, 1), tw, target, b, tb),
        student,
    )


# ---- adversarial inputs --------------------------------------------------------------------------


def large(policy, reference, target):
    """Logits of hundreds: probabilities are 0 or 1 in float32."""
    for hidden in (policy[0], reference[0]):
        hidden *= 30
    return policy, reference, target


def tiny(policy, reference, target):
    """Nearly uniform."""
    for hidden in (policy[0], reference[0]):
        hidden *= 1e-4
    return policy, reference, target


def same_policies(policy, reference, target):
    return policy, [None if t is None else t.clone() for t in policy], target


def one_token_each(policy, reference, target):
    target[:, :-1] = -100
    target[:, -1] = 5
    return policy, reference, target


def same_answers(policy, reference, target):
    """Chosen and rejected are the same: margins of exactly 0."""
    policy[0][ROWS // 2 :] = policy[0][: ROWS // 2]
    target[ROWS // 2 :] = target[: ROWS // 2]
    return policy, reference, target


ADVERSARIAL = [large, tiny, same_policies, one_token_each, same_answers]
PAIR_LOSSES = [
    *(("DPO", {"loss_type": kind}) for kind in ours.FusedLinearDPOLoss.LOSS_TYPES),
    ("ORPO", {}),
    ("CPO", {}),
    ("SimPO", {}),
]


@pytest.mark.parametrize("adversary", ADVERSARIAL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name, options", PAIR_LOSSES, ids=str)
def test_pairs_on_adversarial_inputs(name, options, adversary):
    if options.get("loss_type") in ("exo_pair", "robust"):
        options = options | {"label_smoothing": 0.1}
    policy, reference, target = adversary(*inputs(seed=3))
    given = reference if name == "DPO" else []
    arguments = lambda h, w, b: (w, h, target, b, *given)  # noqa: E731
    compare(f"FusedLinear{name}Loss", options, arguments, policy)


@pytest.mark.parametrize("adversary", ADVERSARIAL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("labels", ["mixed", "all desirable", "all undesirable"])
def test_kto_on_adversarial_inputs(labels, adversary):
    policy, reference, target = adversary(*inputs(seed=3))
    desirable = torch.full((ROWS,), labels == "all desirable")
    if labels == "mixed":
        desirable[::2] = True
    compare(
        "FusedLinearKTOLoss",
        {"use_ref_model": True, "chunk_size": ROWS},
        lambda h, w, b: (h, w, target, b, desirable, *reference, torch.tensor(0.3)),
        policy,
    )


def grpo_arguments(policy, options, *, spread=0.1, is_row_empty=False):
    """What GRPO's classes are called with; log-probs of the others lie `spread` around ours."""
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, 3:] = 0
    if is_row_empty:
        mask[2] = 0
    advantages = torch.tensor([-3.0, 2.0, 0.0, 1e-3, 5.0, -1e-3])
    temperature = options.get("temperature", 1.0)
    near = ours.linear_logps(*policy[:2], ids, bias=policy[2], temperature=temperature).logps
    generator = torch.Generator().manual_seed(7)
    ref, old = near + spread * torch.randn(2, ROWS, LENGTH, generator=generator)
    return lambda h, w, b: (h, w, ids, mask, advantages, b, ref, old)


@pytest.mark.parametrize("options", GRPO, ids=str)
@pytest.mark.parametrize("case", [{"spread": 3.0}, {"is_row_empty": True}], ids=str)
def test_grpo_on_adversarial_inputs(options, case):
    policy, _, _ = inputs(seed=5)
    arguments = grpo_arguments(policy, options, **case)
    compare("FusedLinearGRPOLoss", options, arguments, policy)


@pytest.mark.parametrize("options", GRPO, ids=str)
def test_grpo_of_large_logits_is_as_accurate_as_liger(options):
    """Over many batches: the error of one loss is chance, and differs with the threads."""
    loss = ours_policy.FusedLinearGRPOLoss(**options)
    liger = theirs.LigerFusedLinearGRPOLoss(compiled=False, **options)
    results = [], [], []
    for seed in range(16):
        policy, _, _ = large(*inputs(seed=seed))
        arguments = grpo_arguments(policy, options)
        exact = [t.double() for t in policy]
        for found, function, leaves in zip(results, (loss, liger, liger), (policy, policy, exact)):
            found.append(run(function, arguments, leaves))
    for i in range(len(results[0][0])):
        triple = (torch.stack([r[i].double() for r in found]) for found in results)
        assert_as_accurate(f"result {i}", *triple, factor=3.0)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("adversary", [large, tiny, same_policies], ids=lambda f: f.__name__)
def test_jsd_on_adversarial_inputs(beta, adversary):
    policy, (th, tw, tb), target = adversary(*inputs(seed=3))
    compare(
        "FusedLinearJSDLoss",
        {"beta": beta, "return_soft_hard_loss": True},
        lambda h, w, b: (h, w, th.flatten(0, 1), tw, target.flatten(), b, tb),
        [policy[0].flatten(0, 1), *policy[1:]],
    )


@pytest.mark.parametrize("name", ["DPO", "ORPO", "CPO", "SimPO", "KTO"])
def test_bfloat16_is_as_accurate_as_liger(name):
    """Against Liger in float64: loss, log-probs and gradients of many small batches."""
    desirable = torch.arange(ROWS) % 2 == 0
    options = {"use_ref_model": True} if name == "KTO" else {}
    losses = [getattr(ours, f"FusedLinear{name}Loss")(compiled=False, **options)]
    losses += [getattr(theirs, f"LigerFusedLinear{name}Loss")(compiled=False, **options)] * 2
    results = [], [], []
    for seed in range(24):
        policy, reference, target = inputs(torch.bfloat16, seed=seed)

        def arguments(hidden, weight, bias):
            ref = [t.to(hidden.dtype) for t in reference]  # noqa: B023
            if name == "KTO":
                return hidden, weight, target, bias, desirable, *ref, None  # noqa: B023
            return weight, hidden, target, bias, *(ref if name == "DPO" else [])  # noqa: B023

        for found, loss, dtype in zip(results, losses, (None, None, torch.float64)):
            found.append(run(loss, arguments, [t.to(dtype or t.dtype) for t in policy]))
    for i in (0, 1, 2, -3, -2, -1):
        triple = (torch.stack([r[i].double() for r in found]) for found in results)
        assert_as_accurate(f"result {i}", *triple, 3.0 if i < 0 else 2.0)
