"""From a scorer's configuration to the scorer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Attention, Precision
from rlhf_fast.models.chat import ChatFormat, load_tokenizer
from rlhf_fast.models.language_model import LanguageModel, load_causal_lm
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.rewards.config import SourceConfig
from rlhf_fast.rewards.density_ratio import DensityRatioScorer
from rlhf_fast.rewards.function import FunctionScorer
from rlhf_fast.rewards.judge import LLMJudge
from rlhf_fast.rewards.model import RewardModelScorer
from rlhf_fast.rewards.pair_model import PairModel
from rlhf_fast.rewards.pairwise import PairwiseScorer
from rlhf_fast.rewards.policy_judge import AnswersOfPolicy, PolicyJudge
from rlhf_fast.rewards.rules import RuleScorer
from rlhf_fast.rewards.scorer import Scorer
from rlhf_fast.rewards.segments import Segmenter, SegmentScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Compute:
    """Where and how models are computed."""

    device: str = "cpu"
    precision: Precision = "bf16"
    micro_batch_tokens: int = 8192
    attention: Attention = "dense"
    gradient_checkpointing: bool = False

    @property
    def backbone_options(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "device"}

    def reward_model(self, path: str) -> RewardModel:
        return RewardModel.load(path, device=self.device, **self.backbone_options)

    def language_model(
        self,
        path: str,
        chat: ChatFormat,
        *,
        prepare: Callable[[PreTrainedModel], None] = lambda model: None,
    ) -> LanguageModel:
        """The model at `path`; `prepare(model)` changes it before it is wrapped."""
        model = load_causal_lm(path)
        prepare(model)
        return LanguageModel(
            model.to(self.device).eval(),
            pad_token_id=chat.end_token_id,
            **self.backbone_options,
        )


def make_source(
    config: SourceConfig,
    compute: Compute,
    *,
    seed: int,
    answers: Path | None = None,
    ask_policy: AnswersOfPolicy | None = None,
) -> Scorer:
    """The scorer of a configuration that names exactly one ready source.

    `answers` is the file in which a judge's answers are kept; `ask_policy` gives those of a policy
    that judges itself.
    """
    if config.function:
        return FunctionScorer(
            config.function,
            steps=config.steps,
            step_limit=config.step_limit,
            per_token=config.per_token,
        )
    if config.rule.kind:
        return RuleScorer(config.rule)
    if config.model:
        model = compute.reward_model(config.model)
        if model.segments is None and config.segments is None:
            return RewardModelScorer(model)
        return SegmentScorer(model, _segmenter(model, config, compute))
    if config.pairwise_model:
        chat = ChatFormat(load_tokenizer(config.pairwise_model))
        model = PairModel(compute.language_model(config.pairwise_model, chat), chat)
        return PairwiseScorer(model, config.ranking)
    if config.strong_model:
        names = config.strong_model, config.weak_model
        chats = [ChatFormat(load_tokenizer(name)) if name else None for name in names]
        strong = compute.language_model(config.strong_model, chats[0])
        weak = compute.language_model(config.weak_model, chats[1]) if config.weak_model else None
        return DensityRatioScorer(
            strong, weak, *chats, criteria=config.criteria, scale=config.scale
        )
    if not config.judge.policy:
        judge = LLMJudge(config.judge, seed=seed, answers=answers)
    elif ask_policy:
        judge = PolicyJudge(config.judge, ask_policy, seed=seed)
    else:
        raise UserError("judge.policy is for online runs: here no policy is loaded to be asked")
    return PairwiseScorer(judge, config.ranking) if config.judge.mode == "compare" else judge


def _segmenter(model: RewardModel, config: SourceConfig, compute: Compute) -> Segmenter:
    known = model.segments or {}
    boundary = known.get("boundary", config.segments)
    if boundary == "sentences":
        return Segmenter(model.tokenizer)
    if not config.segment_model:
        raise UserError(
            "reward.model ends its segments by entropy: give reward.segment_model, the language "
            "model whose entropy it is (the SFT model)"
        )
    threshold = known.get("entropy_threshold", config.entropy_threshold)
    language_model = compute.language_model(config.segment_model, model.chat)
    return Segmenter(model.tokenizer, threshold, language_model)
