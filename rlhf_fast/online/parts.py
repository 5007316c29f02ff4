"""Builds what the stages need: tokenizer, models, generator, policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from rlhf_fast.data import Demonstration
from rlhf_fast.errors import UserError
from rlhf_fast.generation.chat import ChatGenerator, make_generator, resolve_backend
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.io import write_jsonl
from rlhf_fast.launch import Launch
from rlhf_fast.models.adapters import add_lora
from rlhf_fast.models.backbone import Attention, Precision
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat, load_tokenizer
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.models.condition import ConditionConfig, ConditionedChat
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.models.names import resolve_model
from rlhf_fast.online.config import AdapterConfig, GenerationConfig
from rlhf_fast.online.protocols import Policy
from rlhf_fast.rewards import Compute
from rlhf_fast.training.engine_state import gathered
from rlhf_fast.training.fit import FitOptions, OptimizerConfig
from rlhf_fast.training.on_policy import make_rl_policy
from rlhf_fast.training.online_merging import merging_between
from rlhf_fast.training.policy import DPOPolicy
from rlhf_fast.training.preference import DPOConfig
from rlhf_fast.training.rl_config import RLConfig
from rlhf_fast.training.selected import ListConfig, ListPolicy, NLLPolicy, UnpairedPolicy
from rlhf_fast.training.sft import train_sft
from rlhf_fast.training.unpaired import ScoredUnpairedConfig
from rlhf_fast.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnStep = Callable[[dict[str, float], int], None]


class UpdateConfig(Protocol):
    """What a configuration says about the policy update."""

    algorithm: str
    dpo: DPOConfig
    rl: RLConfig
    nll: OptimizerConfig
    list: ListConfig
    unpaired: ScoredUnpairedConfig
    lora: AdapterConfig


class ComputeConfig(Protocol):
    """What a configuration says about where and how models are computed."""

    device: str
    precision: Precision
    micro_batch_tokens: int
    attention: Attention
    gradient_checkpointing: bool


class Parts:
    """One model's tokenizer and chat format, and whatever is built around its checkpoints."""

    def __init__(
        self,
        model: str,
        compute: Compute,
        condition: ConditionConfig | None = None,
        launch: Launch | None = None,
    ) -> None:
        self.model_path = resolve_model(model)
        self.compute = compute
        self.launch = launch or Launch()
        self.options = FitOptions(accelerator=self.launch.accelerator)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.model_path)
        self.chat = ChatFormat(self.tokenizer)
        if condition and condition.bounds:
            self.chat = ConditionedChat(self.tokenizer, condition)

    def language_model(self, path: Path | str) -> LanguageModel:
        return self.compute.language_model(str(path), self.chat)

    def generator(
        self,
        path: Path | str,
        config: GenerationConfig,
        *,
        seed: int,
        prompts: Sequence[Prompt],
        reference: Path | str | None = None,
    ) -> ChatGenerator:
        """For `prompts`, or none where others come too; `reference` is the second model of samplers
        that mix two."""
        mixes = config.sampler.needs_reference
        longest = None
        if resolve_backend(config.backend) == "vllm" and config.sampler.keeps_prompts:
            lengths = (len(self.chat.prompt_ids(prompt.messages)) for prompt in prompts)
            longest = max(lengths, default=None)
        return make_generator(
            config.backend,
            str(path),
            self.chat,
            launch=self.launch,
            dtype=config.dtype,
            device=self.compute.device,
            batch_size=config.batch_size,
            sampling=config.sampling,
            seed=seed,
            server_url=config.server_url,
            server_model=config.server_model,
            reference_path=str(reference or path) if mixes else None,
            longest_prompt=longest,
        )

    def policy(
        self,
        path: Path | str,
        reference: Path | str,
        config: UpdateConfig,
        *,
        seed: int,
        on_step: OnStep,
        sampling: SamplingConfig | None = None,
    ) -> Policy:
        """The policy that learns by `config.algorithm` from responses that are sampled so."""
        settings = getattr(config, config.algorithm)
        if config.algorithm == "rl" and sampling:
            settings = settings.for_sampling(sampling.temperature, sampling.max_new_tokens)
        optimizer = settings if config.algorithm == "nll" else settings.optimizer
        if config.lora.rank and optimizer.merging.rule:
            raise UserError("lora: optimizer.merging merges whole weights; give one of them")
        optimizer = merging_between(optimizer, self.model_path, reference)
        if config.algorithm == "nll":
            settings = optimizer
        else:
            settings = replace(settings, optimizer=optimizer)
        models = *self._policy_and_reference(path, reference, config.lora, seed), self.tokenizer
        if config.algorithm == "rl":
            return make_rl_policy(
                *models,
                config=settings,
                critic_path=path,
                seed=seed,
                on_step=on_step,
                options=self.options,
            )
        policies = {
            "nll": partial(NLLPolicy, chat=self.chat),
            "list": ListPolicy,
            "unpaired": UnpairedPolicy,
            "dpo": DPOPolicy,
        }
        kind = policies[config.algorithm]
        return kind(*models, config=settings, on_step=on_step, options=self.options)

    def _policy_and_reference(
        self, path: Path | str, reference: Path | str, lora: AdapterConfig, seed: int
    ) -> tuple[LanguageModel, LanguageModel]:
        if not lora.rank:
            return self.language_model(path), self.language_model(reference)
        adapt = partial(add_lora, config=lora, seed=seed)
        model = self.compute.language_model(str(path), self.chat, prepare=adapt)
        return model, model

    def train_sft(
        self,
        path: Path,
        demonstrations: list[Demonstration],
        config: OptimizerConfig,
        *,
        seed: int,
        on_step: OnStep,
        log: Path,
    ) -> list[dict[str, float]]:
        """Fine-tunes the model on demonstrations; writes its steps to `log` and it to `path`."""
        policy = self.language_model(self.model_path)
        groups = [
            TokenGroup(
                self.chat.prompt_ids(d.prompt.messages), [self.chat.response_ids(d.response)]
            )
            for d in demonstrations
        ]
        rows = train_sft(
            policy, groups, config=config, seed=seed, on_step=on_step, options=self.options
        )
        model = gathered(policy.model, keep=self.launch.is_main)
        if self.launch.is_main:
            write_jsonl(log, rows)  # first: the stage is complete with its model
            save_model(path, model, self.tokenizer)
        return rows


def compute_of(config: ComputeConfig) -> Compute:
    names = [field.name for field in fields(Compute) if field.name != "device"]
    return Compute(find_device(config.device), **{name: getattr(config, name) for name in names})


def find_device(name: str) -> str:
    """`auto` becomes cuda where there is a GPU, else cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: no CUDA device is available; use --device cpu or auto")
    return name
