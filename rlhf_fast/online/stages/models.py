"""Stages that make models: SFT, reward model, policy update, merging."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from rlhf_fast.data import load_demonstrations
from rlhf_fast.errors import UserError
from rlhf_fast.io import write_jsonl
from rlhf_fast.models.card import Card, with_card, write_card
from rlhf_fast.models.condition import ConditionConfig
from rlhf_fast.models.names import resolve_model
from rlhf_fast.online.config import AdapterConfig
from rlhf_fast.online.merging import MergeConfig, merge_checkpoints
from rlhf_fast.online.parts import Parts
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.reward_training import RewardData, train_reward_checkpoint
from rlhf_fast.online.reward_voting import VoteConfig, all_corrected, differences
from rlhf_fast.online.stages.base import RowStage, Stage, new_output, records_of
from rlhf_fast.rewards import RewardModelScorer
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig
from rlhf_fast.training.reward_config import RewardTrainingConfig
from rlhf_fast.training.rl_config import RLConfig
from rlhf_fast.training.selected import ListConfig
from rlhf_fast.training.unpaired import ScoredUnpairedConfig
from rlhf_fast.types import preference_pair_from_json, scored_group_from_json


@dataclass(frozen=True)
class SFT(RowStage):
    """Supervised fine-tuning: demonstrations -> model."""

    model: str = ""
    """Model to start from."""
    data: str = ""
    """Rows with `prompt` and `response`, or `messages`."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-5, batch_size=128)
    )
    """Optimiser."""

    def run(self) -> str:
        path = self.start("model", "data")
        demonstrations = self.read(load_demonstrations, self.data)
        parts = Parts(self.model, self.compute())

        def train(directory: Path) -> Card:
            steps = parts.train_sft(
                directory,
                demonstrations,
                self.optimizer,
                seed=derive_seed(self.seed, "sft"),
                on_step=Progress().step,
                log=path.parent / f"{path.name}.training.jsonl",
            )
            return self.card("sft", self.optimizer, steps[-1], rows=self.data)

        return f"model: {path}, last loss {with_card(path, train).metrics['loss']:.4f}"


@dataclass(frozen=True)
class Reward(RowStage):
    """Reward model: preference pairs or scored responses -> model."""

    model: str = ""
    """Language model to start from, e.g. the SFT model."""
    pairs: str = ""
    """Rows with `prompt`, `chosen`, `rejected`."""
    scores: str = ""
    """Rows with `prompt`, `response` or `responses`, `score` or `scores`, for the objectives
    attributes, quantiles, rankings and binary."""
    training: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)
    """How it is trained."""
    vote: VoteConfig = field(default_factory=VoteConfig)
    """What ready reward models correct in the pairs beforehand."""
    member: int | None = None
    """Number of an ensemble's member: it learns from a bootstrap sample of its own."""

    def run(self) -> str:
        path = self.start("model", *([] if self.scores else ["pairs"]))
        base, data = resolve_model(self.model), self._data()

        def train(directory: Path) -> Card:
            metrics = train_reward_checkpoint(
                directory,
                base,
                self.training,
                data,
                compute=self.compute(),
                seed=self.seed,
                member=self.member,
                on_step=Progress().step,
                log=path.parent / f"{path.name}.metrics.jsonl",
            )
            sources = {"pairs": self.pairs, "scores": self.scores}
            return self.card("reward-model", self.training, metrics, **sources)

        accuracy = with_card(path, train).metrics["held_out_accuracy"]
        return f"reward model: {path}, held-out accuracy {accuracy:.3f}"

    def _data(self) -> RewardData:
        data, vote = self.read(RewardData.load, self.pairs, self.scores), self.vote
        if not vote.corrections:
            return data
        vote.check_objective(self.training)
        if vote.members:
            raise UserError("vote.members: train them with --member, and give them as vote.models")
        compute = self.compute()
        models = [resolve_model(name, "vote.models") for name in vote.models]
        voters = (RewardModelScorer(compute.reward_model(path)) for path in models)
        return replace(data, pairs=all_corrected(data.pairs, differences(voters, data.pairs), vote))


@dataclass(frozen=True)
class Train(Stage):
    """Policy update: preference pairs or scored responses (.jsonl) -> model."""

    model: str = ""
    """Policy to start from."""
    reference: str | None = None
    """Reference of the KL tie; None takes `model`."""
    selected: str = ""
    """What `select` wrote."""
    algorithm: Literal["dpo", "rl", "nll", "list", "unpaired"] = "dpo"
    """dpo learns from pairs, the others from responses."""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """Of algorithm dpo."""
    rl: RLConfig = field(default_factory=RLConfig)
    """Of algorithm rl."""
    nll: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-6, batch_size=64)
    )
    """Of algorithm nll."""
    list: ListConfig = field(default_factory=ListConfig)
    """Of algorithm list."""
    unpaired: ScoredUnpairedConfig = field(default_factory=ScoredUnpairedConfig)
    """Of algorithm unpaired."""
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    """Of algorithm nll: prompts that say how good the answer is."""
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA: adapters instead of all weights."""

    def run(self) -> str:
        path = self.start("model", "selected")
        if self.lora.rank and self.reference not in (None, self.model):
            raise UserError("lora: the reference is --model itself; leave out --reference")
        reference = self.reference and resolve_model(self.reference, "reference")
        is_dpo = self.algorithm == "dpo"
        if self.condition.bounds and self.algorithm != "nll":
            raise UserError(f"condition is for algorithm nll, got {self.algorithm}")
        parts = Parts(self.model, self.compute(), self.condition)
        selected = records_of(
            self.selected, preference_pair_from_json if is_dpo else scored_group_from_json
        )
        policy = parts.policy(
            parts.model_path,
            reference or parts.model_path,
            self,
            seed=derive_seed(self.seed, "critic"),
            on_step=Progress().step,
        )
        for name in getattr(policy, "companions", ()):  # which it writes beside its own place
            new_output(str(path.parent / name))
        steps = policy.update(selected, seed=derive_seed(self.seed, "update"))
        write_jsonl(path.parent / f"{path.name}.training.jsonl", steps)
        settings = getattr(self, self.algorithm)
        card = self.card(self.algorithm, settings, steps[-1], rows=self.selected)
        policy.save(path, add=lambda directory: write_card(directory, card))
        return f"model: {path}, last loss {steps[-1]['loss']:.4f}"


@dataclass(frozen=True)
class Merge:
    """Merging: models -> model; one parameter of each model in memory at a time."""

    models: tuple[str, ...] = ()
    """Model directories or hub names; folders of LoRA adapters stand for their base with them."""
    base: str | None = None
    """Where task vectors start: the SFT model, mostly."""
    output: str = ""
    """Model directory to write; it must not exist."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    """The rule."""

    def run(self) -> str:
        if not self.models or not self.output:
            raise UserError(f"--{'output' if self.models else 'models'} is missing")
        path = new_output(self.output)

        def merge(directory: Path) -> Card:
            merge_checkpoints(directory, self.models, self.merge, base=self.base)
            return Card("merge", "Merged weights.", self.models, {}, asdict(self.merge))

        with_card(path, merge)
        return f"model: {self.output}"
