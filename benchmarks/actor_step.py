"""An update of OpenRLHF's or verl's actor as a contestant of bench_integrations.

Their trainers want several GPUs, Ray and DeepSpeed or FSDP; what is timed here is the part of them
that the patch touches, called as their actors call it, on one process and with torch's AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.integration_step import Settings, forget_peak, model_folder
from benchmarks.stopwatch import Stopwatch
from tests.integrations.standins import OPENRLHF_IMPORTS, stub_missing

stub_missing(OPENRLHF_IMPORTS)


def train(settings: Settings, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, settings.dtype)
    source = model_folder(settings, folder)
    device = "cuda" if settings.on_gpu else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device)
    model.gradient_checkpointing_disable()
    update = {"openrlhf": openrlhf_loss, "verl": verl_loss}[settings.framework](settings, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6 if settings.model else 1e-4)
    generator = torch.Generator().manual_seed(0)
    shape = settings.batch, settings.length
    ids = torch.randint(1, model.config.vocab_size, shape, generator=generator).to(device)
    advantages = torch.randn(settings.batch, 1, generator=generator).to(device)
    watch, old_logps = Stopwatch(), None
    forget_peak()
    for _ in range(settings.max_steps):
        watch.start()
        logps, loss_of = update(ids)
        if old_logps is None:
            old_logps = logps.detach()
        loss = loss_of(old_logps, advantages.expand_as(logps))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.stop(loss.item(), grad_norm=norm.item())


def openrlhf_loss(settings: Settings, model):
    """`Actor.forward` and `PolicyLoss`, as in its `ActorPPOTrainer.training_step`."""
    from openrlhf.models import Actor, PolicyLoss

    actor, criterion = Actor(model), PolicyLoss(0.2, 0.28)
    actor.packing_samples = False
    response = settings.length - settings.length // 4

    def update(ids: Tensor):
        mask = torch.ones(len(ids), response, dtype=torch.bool, device=ids.device)
        logps = actor(ids, mask, attention_mask=torch.ones_like(ids))
        return logps, lambda old, advantages: criterion(logps, old, advantages, mask)[0]

    return update


def verl_loss(settings: Settings, model):
    """Log-probs, entropy and the policy loss `vanilla`, as in its FSDP engine.

    All positions, as verl takes the responses out afterwards; `PPO fused` with
    `use_fused_kernels: True`.
    """
    from verl.models.transformers.dense_common import forward_with_torch_backend
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils import torch_functional
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    prompt = settings.length // 4
    policy_loss = get_policy_loss_fn("vanilla")

    def of_tokens(ids: Tensor) -> tuple[Tensor, Tensor]:
        if settings.trainer == "PPO fused":
            out = forward_with_torch_backend(model, ids, use_cache=False, return_dict=True)
            return out.log_probs, out.entropy
        logits = model(ids, use_cache=False).logits.flatten(0, 1)
        entropy = torch_functional.entropy_from_logits(logits).view_as(ids)
        labels = ids.roll(-1, dims=-1).flatten()
        logps = torch_functional.logprobs_from_logits(logits, labels, inplace_backward=False)
        return logps.view_as(ids), entropy

    def update(ids: Tensor):
        logps, entropy = (x[:, prompt - 1 : -1] for x in of_tokens(ids))
        mask = torch.ones_like(logps)

        def loss_of(old: Tensor, advantages: Tensor) -> Tensor:
            loss, _ = policy_loss(old, logps, advantages, mask, "token-mean", config)
            return loss - 0.001 * entropy.mean()

        return logps, loss_of

    return update
