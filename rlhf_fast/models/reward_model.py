"""Reward models: a sequence-classification head on the last token of the response."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_directory_atomic
from rlhf_fast.models.adapters import LoraConfig, add_lora
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.batches import GroupBatch, TokenGroup
from rlhf_fast.models.chat import ChatFormat, load_tokenizer
from rlhf_fast.models.checkpoint import (
    ADAPTED_CONFIG,
    check_complete,
    load_pretrained,
    load_weights,
    save_model,
)
from rlhf_fast.models.gating import Gate
from rlhf_fast.models.names import base_of_adapters, model_directory
from rlhf_fast.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_NAMES = ("score", "classifier")
MEMBER = "member_"
GATE_FILE = "gate/gate.safetensors"  # not beside the weights: whoever reads all files there would


class RewardModel(Backbone):
    """A `*ForSequenceClassification` model, read at the response's last token.

    With several outputs (an ensemble, quantiles, attributes) the reward is their sum weighted by
    the model configuration's `reward_weights`, or by a gate that sees the prompt. The end is found
    from the lengths, never by looking for the pad token: with pad = eos that search stops at the
    wrong token. Models that were made elsewhere are read after all that the template writes, as
    transformers reads them; those made here after the end token.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = ChatFormat(tokenizer)
        self.head = _find_head(model)
        super().__init__(model, pad_token_id=self.chat.end_token_id, **options)
        self._check_features()
        weights = getattr(model.config, "reward_weights", None)
        self.closing_ids = self.chat.closing_ids if weights is None else []
        if weights is None and self.head.out_features == 1:
            weights = [1.0]
        if weights is None or len(weights) != self.head.out_features:
            raise UserError(
                f"{type(model).__name__} is not a reward model: it needs a linear head with one "
                f"output, or in its config.json as many `reward_weights` as outputs, "
                f"got {self.head.out_features} outputs and {weights}"
            )
        self.reward_weights = list(map(float, weights))
        self.num_outputs = self.head.out_features
        self.members: list[str] = []
        self.gate: Gate | None = None
        self.segments: dict | None = getattr(model.config, "reward_segments", None)

    @torch.no_grad()
    def _check_features(self) -> None:
        """The head must read the decoder's last state, not what else a model makes of states."""
        seen: list[Tensor] = []
        hook = self.head.register_forward_hook(lambda _, given, made: seen.extend((*given, made)))
        with self.evaluating():
            hidden = self.decoder(input_ids=self._few_tokens).last_hidden_state
            logits = self.model(input_ids=self._few_tokens).logits
        hook.remove()
        given, made = (tensor.flatten(0, -2)[-1] for tensor in seen)
        what = "its head does not read its decoder's hidden state of the last token"
        self._check_head(hidden[0, -1], given, what)
        own = self.read(given.float())
        self._check_head(own, made, "its head is not its weight and bias alone")
        self._check_head(own, logits[0], "it changes what its head gives")

    @classmethod
    def load(cls, path: str, *, device: str = "cpu", **options) -> RewardModel:
        """Loads a model with one label from a directory or a hub name."""
        tokenizer = load_tokenizer(path)
        directory = model_directory(path, files=(GATE_FILE, f"{MEMBER}*/*"))
        if adapters := sorted(directory.glob(f"{MEMBER}*/adapter_config.json")):
            return cls._load_members([file.parent for file in adapters], tokenizer, device, options)
        model = load_classifier(path)
        result = cls(model.to(device).eval(), tokenizer, **options)
        if (gate := directory / GATE_FILE).is_file():
            result.gate = Gate.load(gate).to(device)
        return result

    @classmethod
    def _load_members(cls, directories, tokenizer, device: str, options: dict) -> RewardModel:
        settings = [json.loads((d / "adapter_config.json").read_text()) for d in directories]
        model = fresh_reward_model(settings[0]["base_model_name_or_path"], dtype="auto")
        result = cls(model.to(device).eval(), tokenizer, **options)
        for number, (directory, own) in enumerate(zip(directories, settings), 1):
            targets = tuple(own["target_modules"])
            result.add_member(number, LoraConfig(own["r"], own["lora_alpha"], 0.0, targets), seed=0)
            load_weights(directory, model)
        result.become_ensemble([directory.name for directory in directories])
        return result

    def add_member(self, number: int, config: LoraConfig, *, seed: int) -> str:
        """Gives the model adapters and a head of their own, which are then in use."""
        name = f"{MEMBER}{number:03}"
        head = next(name for name in HEAD_NAMES if hasattr(self.model, name))
        add_lora(self.model, config, trained_modules=(head,), seed=seed, name=name)
        self._use(name)
        return name

    def become_ensemble(self, members: Sequence[str]) -> None:
        """From now on every member's adapters give an output, and the reward is their mean."""
        self.members = list(members)
        self.num_outputs = len(members)
        self.reward_weights = [1 / len(members)] * len(members)

    def _use(self, member: str) -> None:
        self.model.set_adapter(member)
        self.head = _find_head(self.model)

    def _save_members(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)
        for member in self.members:
            self._use(member)
            self.model.save_pretrained(directory / member)

    def save(self, path: Path) -> None:
        """Writes a directory that `load` reads, all or nothing; of members the adapters alone."""
        if self.members:
            return write_directory_atomic(path, self._save_members)
        gate = self.gate
        save_model(
            path,
            self.model,
            self.tokenizer,
            add=lambda directory: gate.save(directory / GATE_FILE) if gate else None,
        )

    def mark_padding(self) -> None:
        """Other tools find a response's end by the pad token, so it must not be the end token."""
        tokenizer, end = self.tokenizer, self.chat.end_token_id
        others = [i for i in (tokenizer.pad_token_id, *tokenizer.all_special_ids) if i is not None]
        self.model.config.pad_token_id = next((i for i in others if i != end), end)

    def features(self, batch: GroupBatch) -> Tensor:
        """[R, D] fp32 final hidden state at each response's last token."""
        return self.states(batch, batch.last).float()

    def outputs(self, batch: GroupBatch) -> Tensor:
        """[R, H] fp32 outputs of the head for each response; the mean over those of its segments,
        for a model of segments, whose ends the batch marks as its learned tokens.
        """
        if self.members:
            return torch.cat([self._member_outputs(member, batch) for member in self.members], 1)
        if self.segments is None:
            return self.read(self.features(batch))
        return torch.segment_reduce(self.segment_outputs(batch), "mean", offsets=batch.cu_seqlens)

    def _member_outputs(self, member: str, batch: GroupBatch) -> Tensor:
        self._use(member)
        return self.read(self.features(batch))

    def segment_outputs(self, batch: GroupBatch) -> Tensor:
        """[M, H] fp32 outputs of the head, read at each learned token."""
        return self.read(self.states(batch, batch.target).float())

    def gated_inputs(self, batch: GroupBatch) -> tuple[Tensor, Tensor]:
        """[R, D] fp32 states of the prompts' last tokens, and the outputs [R, H]."""
        hidden = self.hidden_states(batch)
        prompts = hidden[batch.source[batch.cu_seqlens[:-1]]].float()
        return prompts, self.read(hidden[batch.last].float())

    def rewards(self, batch: GroupBatch) -> Tensor:
        """[R] fp32 reward of each response."""
        if self.gate is None:
            return self.combine(self.outputs(batch))
        prompts, outputs = self.gated_inputs(batch)
        return (self.gate(prompts) * outputs).sum(1)

    def read(self, features: Tensor) -> Tensor:
        """[N, D] fp32 -> [N, H] fp32: the head alone."""
        bias = None if self.head.bias is None else self.head.bias.float()
        with torch.autocast(self.device.type, enabled=False):
            return F.linear(features, self.head.weight.float(), bias)

    def combine(self, outputs: Tensor) -> Tensor:
        """[R, H] -> [R]: the outputs' weighted sum."""
        return outputs @ self.floats(self.reward_weights)

    def check_ungated(self, use: str) -> None:
        """Raises if a gate weighs the outputs, which `use` takes by themselves."""
        if self.gate is not None:
            raise UserError(
                f"{use} takes a reward model's outputs without its gate, got one with a gate; "
                f"leave it out, or take a model without"
            )

    def token_group(
        self, messages: list[Message], texts: Sequence[str], finished: Sequence[bool]
    ) -> TokenGroup:
        """Tokenises with this model's own template; a response that was cut gets no end token."""
        closings = [self.closing_ids if ended else [] for ended in finished]
        responses = [
            self.chat.response_ids(text, finished=ended) + closing
            for text, ended, closing in zip(texts, finished, closings)
        ]
        # An empty response that was cut has no last token; the end token stands in for it.
        responses = [ids or [self.chat.end_token_id] for ids in responses]
        return TokenGroup(self.chat.prompt_ids(messages), responses)


def load_classifier(path: str) -> PreTrainedModel:
    """A sequence classifier from a directory or a hub name, adapters merged into their base."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    purpose, head = "load a reward model", {}
    if base_of_adapters(path) is not None:
        own_config = model_directory(path) / ADAPTED_CONFIG
        if own_config.is_file():
            head["config"] = AutoConfig.from_pretrained(own_config, trust_remote_code=False)
        else:  # what PEFT saves does not say
            head["num_labels"] = 1
    kind = AutoModelForSequenceClassification
    model, new = load_pretrained(kind, path, purpose, dtype="auto", **head)
    check_complete(path, model, new)
    return model


def fresh_reward_model(
    path: str, *, num_outputs: int = 1, dtype: torch.dtype | str = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A language model's decoder with a new head that gives zeros (one output) or is small.

    Several outputs start different from each other, drawn from `seed`, and count equally in the
    reward.
    """
    from transformers import AutoModelForSequenceClassification

    kind, settings = AutoModelForSequenceClassification, {"num_labels": num_outputs, "dtype": dtype}
    model, _ = load_pretrained(kind, path, "make a reward model", **settings)
    head = _find_head(model)
    if num_outputs == 1:
        nn.init.zeros_(head.weight)
    else:
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(head.weight, std=head.in_features**-1, generator=generator)
    model.config.reward_weights = [1 / num_outputs] * num_outputs
    return model.eval()


def _find_head(model: PreTrainedModel) -> nn.Linear:
    for name in HEAD_NAMES:
        head = getattr(model, name, None)
        if hasattr(head, "modules_to_save"):  # trained beside adapters
            head = head.modules_to_save[head.active_adapters[0]]
        if isinstance(head, nn.Linear):
            return head
    raise UserError(
        f"{type(model).__name__} is not a reward model: it needs a linear head named "
        f"{' or '.join(HEAD_NAMES)}"
    )
