"""Stages of responses: sample them, score them, select among them."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_fast.data import load_prompts
from rlhf_fast.errors import UserError
from rlhf_fast.generation.samplers import SAMPLERS
from rlhf_fast.io import write_jsonl
from rlhf_fast.models.condition import ConditionConfig
from rlhf_fast.models.names import resolve_model
from rlhf_fast.online.config import GenerationConfig, RewardConfig
from rlhf_fast.online.metrics import mean_reward
from rlhf_fast.online.parts import Parts
from rlhf_fast.online.selectors import SelectionConfig, select
from rlhf_fast.online.stages.base import RowStage, Stage, make_scorer, read_scored, records_of
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import group_from_json, to_json


@dataclass(frozen=True)
class Generate(RowStage):
    """Responses: prompts and a model -> completions (.jsonl)."""

    model: str = ""
    """Model that responds."""
    reference: str | None = None
    """Second model of the samplers that mix two."""
    prompts: str = ""
    """Rows with `prompt` or `messages`."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Sampling."""
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    """Prompts that say how good the answer is to be, as the model was trained."""

    def run(self) -> str:
        path = self.start("model", "prompts")
        kind = self.generation.sampler.kind
        if self.generation.sampler.needs_reference != bool(self.reference):
            raise UserError(
                f"--reference is the second model of the samplers mixture and pilaf, got "
                f"{self.reference or 'none'} with generation.sampler.kind {kind}"
            )
        prompts = self.read(load_prompts, self.prompts)
        parts = Parts(self.model, self.compute(), self.condition)
        reference = self.reference and resolve_model(self.reference, "reference")
        generator = parts.generator(
            parts.model_path,
            self.generation,
            seed=self.seed,
            prompts=prompts,
            reference=reference,
        )
        count = self.generation.num_generations
        seed = derive_seed(self.seed, "generate")
        sampler = self.generation.sampler
        sample = SAMPLERS[sampler.kind](generator, sampler)
        groups = sample.generate(prompts, num_generations=count, seed=seed)
        generator.close()
        write_jsonl(path, map(to_json, groups))
        return f"completions: {path}, {len(groups)} prompts x {count}"


@dataclass(frozen=True)
class Score(Stage):
    """Rewards: completions (.jsonl) -> scored groups (.jsonl)."""

    completions: str = ""
    """What `generate` wrote."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Where rewards come from; nothing is trained here."""
    baseline: str | None = None
    """Scored responses of the model to compare with, for reward.shaping.baseline_samples."""

    def run(self) -> str:
        path = self.start("completions")
        groups = records_of(self.completions, group_from_json)
        options = {"output": path, "baseline": self.baseline}
        scored = make_scorer(self.reward, self.compute(), self.seed, **options).score(groups)
        write_jsonl(path, map(to_json, scored))
        return f"scored: {path}, mean reward {mean_reward(scored):.4f}"


@dataclass(frozen=True)
class Select(Stage):
    """Selection: scored groups (.jsonl) -> preference pairs or chosen responses (.jsonl)."""

    scored: str = ""
    """What `score` wrote."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """The rule."""

    def run(self) -> str:
        path = self.start("scored")
        scored = read_scored(self.scored)
        selected = select(scored, self.selection, seed=derive_seed(self.seed, "select"))
        if not selected:
            raise UserError(f"{self.scored}: rule {self.selection.rule} selects nothing")
        write_jsonl(path, map(to_json, selected))
        what = "pairs" if self.selection.makes_pairs else "groups"
        return f"selected: {path}, {len(selected)} {what} of {len(scored)} prompts"
