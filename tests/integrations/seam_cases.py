"""For every seam of every framework a call of it, on stand-ins or on the real packages.

`CASES[target](original)` calls whatever stands at the seam now and returns tensors: results, and
gradients of their sum where there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import torch

from tests.tiny import VOCAB_SIZE, tiny_model

ROWS, LENGTH, VOCAB, WIDTH = 4, 7, 61, 16
Results = dict[str, torch.Tensor]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


def mask() -> torch.Tensor:
    mask = torch.ones(ROWS, LENGTH)
    mask[0, 5:] = 0
    mask[2, 1:] = 0
    return mask


def with_gradients(function: Callable, *leaves: torch.Tensor) -> Results:
    """Tensors among the results of `function`, flat, and the gradients of the differentiable."""
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    found = function(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    found = [x for x in found if isinstance(x, torch.Tensor)]
    total = sum(((i + 1) * x).sum() for i, x in enumerate(found) if x.requires_grad)
    grads = torch.autograd.grad(total, leaves) if isinstance(total, torch.Tensor) else ()
    named = {f"result {i}": x.detach().float() for i, x in enumerate(found)}
    return named | {f"gradient {i}": g for i, g in enumerate(grads)}


def of_logits(*more: object, labels: bool = True, **options: object) -> Callable:
    def case(function) -> Results:
        given = (integers(VOCAB, ROWS, LENGTH), *more) if labels else more
        return with_gradients(
            lambda x: function(x * 1, *given, **options), draw(ROWS, LENGTH, VOCAB)
        )

    return case


def of_rows(function) -> Results:
    return with_gradients(function, draw(ROWS * LENGTH, VOCAB))


def of_head(bias: bool, *settings: object, **options: object) -> Callable:
    def case(function) -> Results:
        tensors = [draw(ROWS, WIDTH), draw(VOCAB, WIDTH), *([draw(VOCAB)] if bias else [])]
        targets = integers(VOCAB, ROWS)
        call = lambda *t: function.apply(*t, targets, 0.7, 32, *settings, **options)  # noqa: E731
        return with_gradients(call, *tensors)

    return case


def of_model(*more: object, call: Callable | None = None) -> Callable:
    """A method whose logits wait: results and gradients of the model's parameters."""
    ids = integers(VOCAB_SIZE - 20, ROWS, LENGTH) + 20

    def case(function) -> Results:
        model = tiny_model()
        trainer = SimpleNamespace(ref_model=None)
        found = call(function, model, ids) if call else function(trainer, model, ids, *more)
        found.square().sum().backward()
        return {"result": found.detach()} | {n: p.grad for n, p in model.named_parameters()}

    return case


# ---- TRL -----------------------------------------------------------------------------------------


def chunked_nll(function) -> Results:
    labels = integers(VOCAB, ROWS, LENGTH)
    labels[:, :2] = -100

    def call(hidden, weight, bias):
        return function(
            hidden, weight, 256, labels, num_items_in_batch=17, logit_scale=0.5, lm_head_bias=bias
        )

    # Before 1.16 the bias is added unscaled or scaled; 0 is the same for both.
    return with_gradients(call, draw(ROWS, LENGTH, WIDTH), draw(VOCAB, WIDTH), torch.zeros(VOCAB))


def batch_logps(function) -> Results:
    labels = integers(VOCAB, ROWS, LENGTH)
    labels[:, :2] = -100
    labels[1, 5:] = -100
    call = lambda x: function(x * 1, labels, True)  # noqa: E731
    return with_gradients(call, draw(ROWS, LENGTH, VOCAB))


def pairs_forward(name: str) -> Callable:
    """Log-probs, means of logits (all that TRL takes of them), NLL and gradients of a call."""

    def call(function, model, ids):
        labels = ids.masked_fill(torch.arange(LENGTH) < 2, -100)
        trainer = SimpleNamespace(get_batch_logps=trainer_class(name).get_batch_logps)
        logps, rejected, *logits, nll = function(trainer, model, {"ids": ids, "labels": labels})
        means = torch.stack([x.detach().mean() for x in logits])
        return torch.cat((logps, rejected, means, nll[None]))

    return of_model(call=call)


def trainer_class(name: str):
    folders = (f"trl.experimental.{name.lower()}", "trl.trainer")
    folder = folders[find_spec(folders[0].rpartition(".")[0]) is None]
    return getattr(import_module(f"{folder}.{name.lower()}_trainer"), f"{name}Trainer")


UTILS = "trl.trainer.utils"
ONLINE = "online_dpo_trainer:OnlineDPOTrainer._forward"
TRL = {
    f"{UTILS}:selective_log_softmax": of_logits(),
    f"{UTILS}:entropy_from_logits": of_logits(labels=False),
    f"{UTILS}:selective_log_softmax_and_entropy": of_logits(True, 0.7, mask()),
    f"{UTILS}:_use_triton": lambda function: {},
    "trl.trainer.sft_trainer:_chunked_cross_entropy_loss": chunked_nll,
    **{
        f"trl.trainer.{name.lower()}_trainer:{name}Trainer.{method}": of_model(*more)
        for name, method, *more in (
            ("GRPO", "_get_per_token_logps_and_entropies"),
            ("RLOO", "_get_per_token_logps_and_entropies"),
            ("DPO", "_compute_loss", False),
            ("KTO", "_compute_loss", False),
            ("DPO", "concatenated_forward"),
            ("KTO", "forward"),
        )
    },
    **{
        f"trl.{folder}.{name.lower()}_trainer:{name}Trainer.{method}": case
        for name in ("ORPO", "CPO")
        for folder in ("trainer", f"experimental.{name.lower()}")
        for method, case in (
            ("concatenated_forward", pairs_forward(name)),
            ("get_batch_logps", batch_logps),
        )
    },
    f"trl.trainer.{ONLINE}": of_model(),
    f"trl.experimental.online_dpo.{ONLINE}": of_model(),
}
TRL_HEADS = {
    "1.6.0": of_head(False),
    "1.8.0": of_head(False, 3.0),
    "1.14.2": of_head(True),
    "1.15.0": of_head(True, outputs=("entropy",)),
    "1.16.0": of_head(True),
}


# ---- OpenRLHF ------------------------------------------------------------------------------------


def actor(function) -> Results:
    from openrlhf.models import Actor

    model = Actor(tiny_model())
    model.packing_samples, model.temperature = False, 1.0
    ids = integers(VOCAB_SIZE - 20, ROWS, LENGTH) + 20
    logps = model(ids, torch.ones(ROWS, 3), torch.ones_like(ids))
    logps.square().sum().backward()
    return {"result": logps.detach()} | {n: p.grad for n, p in model.named_parameters()}


def of_pairs(function) -> Results:
    reference = draw(2, ROWS)
    call = lambda c, r: function(openrlhf_loss("DPO", 0.1), c, r, *reference)  # noqa: E731
    return with_gradients(call, *draw(2, ROWS, seed=1))


def openrlhf_loss(name: str, *args, **kwargs):
    return getattr(import_module(LOSS), f"{name}Loss")(*args, **kwargs)


def openrlhf_policy(function) -> Results:
    old, advantages = draw(ROWS, LENGTH), draw(ROWS, LENGTH, seed=3)
    loss = openrlhf_loss("Policy", dual_clip=2.0)
    call = lambda x: function(loss, x, old, advantages, mask())  # noqa: E731
    return with_gradients(call, old + 0.5 * draw(ROWS, LENGTH, seed=2))


def openrlhf_value(function) -> Results:
    old, returns = draw(ROWS, LENGTH), draw(ROWS, LENGTH, seed=3)
    loss = openrlhf_loss("Value", 0.2)
    call = lambda x: function(loss, x, old, returns, mask())  # noqa: E731
    return with_gradients(call, old + 0.5 * draw(ROWS, LENGTH, seed=2))


def advantages(function) -> Results:
    out = function(None, draw(ROWS, LENGTH), draw(ROWS, LENGTH, seed=1), mask(), 0.9, 0.8)
    return {name: x * mask() for name, x in zip(("advantages", "returns"), out)}


MAKER = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker"
LOSS = "openrlhf.models.loss"
OPENRLHF = {
    "openrlhf.models.utils:log_probs_from_logits": of_logits(0.7),
    "openrlhf.models.utils:compute_entropy": of_logits(labels=False),
    "openrlhf.models.actor:Actor.forward": actor,
    f"{LOSS}:DPOLoss.forward": of_pairs,
    f"{LOSS}:PairWiseLoss.forward": lambda f: with_gradients(
        lambda *rewards: f(openrlhf_loss("PairWise"), *rewards), *draw(2, ROWS)
    ),
    f"{LOSS}:PolicyLoss.forward": openrlhf_policy,
    f"{LOSS}:ValueLoss.forward": openrlhf_value,
    f"{MAKER}.get_advantages_and_returns": advantages,
    f"{MAKER}.get_cumulative_returns": lambda f: {
        "returns": f(None, draw(ROWS, LENGTH), mask(), 0.9) * mask()
    },
}


# ---- verl ----------------------------------------------------------------------------------------


class VerlConfig(SimpleNamespace):
    def get(self, name, default):
        return getattr(self, name, default)


def verl_policy(function) -> Results:
    config = VerlConfig(
        clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.3, tau_pos=1.0, tau_neg=1.05,
        global_batch_info={"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9},
        policy_loss=SimpleNamespace(
            clip_cov_ratio=0.1, clip_cov_lb=0.2, clip_cov_ub=5.0, kl_cov_ratio=0.2, ppo_kl_coef=2.0,
            dro_beta=0.5,
        ),
    )  # fmt: skip
    old = draw(ROWS, LENGTH) - 2
    advantages = draw(ROWS, 1, seed=3).expand(ROWS, LENGTH)
    torch.manual_seed(0)  # clip_cov draws
    metrics = {}

    def call(logps):
        loss, found = function(old, logps, advantages, mask(), config=config)
        metrics.update({name: torch.tensor(value) for name, value in found.items()})
        return loss

    return with_gradients(call, old + 0.5 * draw(ROWS, LENGTH, seed=2)) | metrics


def verl_value(function) -> Results:
    old, returns = draw(ROWS, LENGTH), draw(ROWS, LENGTH, seed=3)
    call = lambda x: function(x, returns, old, mask(), 0.2, "seq-mean-token-sum")  # noqa: E731
    return with_gradients(call, old + 0.5 * draw(ROWS, LENGTH, seed=2))


def verl_gae(function) -> Results:
    out = function(draw(ROWS, LENGTH), draw(ROWS, LENGTH, seed=1), mask(), 0.9, 0.8)
    return {name: x * mask() for name, x in zip(("advantages", "returns"), out)}


def verl_groups(names: str = "abac") -> Callable:
    def case(function) -> Results:
        index = np.array(list(names), dtype=object)
        given = (draw(ROWS, LENGTH) * mask(), mask(), index)
        return dict(zip("ab", function(*given, config=VerlConfig())))

    return case


def verl_reinforce_plus_plus(function) -> Results:
    given = (draw(ROWS, LENGTH) * mask(), mask())
    out = function(*given, config=VerlConfig(gamma=0.9), index=None)
    return dict(zip(("advantages", "returns"), out))


def verl_head(function) -> Results:
    hidden, weight = draw(ROWS, LENGTH, WIDTH), draw(VOCAB, WIDTH)
    ids = integers(VOCAB, ROWS, LENGTH)
    return with_gradients(lambda h, w: function(h, w, ids, 0.7), hidden, weight)


FUNCTIONAL, CORE = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
VERL = {
    f"{FUNCTIONAL}:logprobs_from_logits": of_logits(),
    f"{FUNCTIONAL}:entropy_from_logits": of_rows,
    f"{FUNCTIONAL}:entropy_from_logits_with_chunking": of_rows,
    "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward": (
        lambda f: verl_head(lambda *args: f(None, *args))
    ),
    "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy": verl_head,
    f"{CORE}:compute_gae_advantage_return": verl_gae,
    f"{CORE}:compute_value_loss": verl_value,
    **{
        f"{CORE}:compute_{name}_outcome_advantage": verl_groups()
        for name in (
            "grpo",
            "grpo_vectorized",
            "rloo",
            "rloo_vectorized",
            "opo",
            "gpg",
            "reinforce_plus_plus_baseline",
        )  # fmt: skip
    },
    f"{CORE}:compute_grpo_passk_outcome_advantage": verl_groups("abab"),
    f"{CORE}:compute_reinforce_plus_plus_outcome_advantage": verl_reinforce_plus_plus,
    **{
        f"{CORE}:compute_policy_loss_{name}": verl_policy
        for name in (
            "vanilla",
            "cispo",
            "sapo",
            "gspo",
            "dppo_tv",
            "dppo_kl",
            "gpg",
            "dro",
            "clip_cov",
            "kl_cov",
            "geo_mean",
            "reinforce",
        )  # fmt: skip
    },
}


# ---- LLaMA-Factory -------------------------------------------------------------------------------


def llamafactory_labels(ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[:, :2] = -100
    return labels


def llamafactory_forward(function, model, ids):
    return function(None, model, {"input_ids": ids, "labels": llamafactory_labels(ids)})["logps"]


def batch_logps(function) -> Results:
    labels = llamafactory_labels(integers(VOCAB, ROWS, LENGTH))
    return with_gradients(lambda x: function(x, labels), draw(ROWS, LENGTH, VOCAB))


TRAIN = "llamafactory.train"
LLAMAFACTORY = {
    f"{TRAIN}.trainer_utils:get_batch_logps": batch_logps,
    f"{TRAIN}.dpo.trainer:CustomDPOTrainer.concatenated_forward": of_model(
        call=llamafactory_forward
    ),
    f"{TRAIN}.kto.trainer:CustomKTOTrainer.forward": of_model(call=llamafactory_forward),
}
