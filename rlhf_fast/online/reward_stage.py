"""Where the run's rewards come from: a function, a given model, or one trained in this run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from rlhf_fast.data import load_preference_pairs
from rlhf_fast.errors import UserError
from rlhf_fast.io import write_jsonl
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import load_tokenizer
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.online.config import OnlineConfig, RewardConfig
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.protocols import Generator, Scorer
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.selectors import SelectionConfig, select
from rlhf_fast.rewards import FunctionScorer, RewardModelScorer
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.reward import train_reward_model
from rlhf_fast.types import (
    PreferencePair,
    Prompt,
    ScoredGroup,
    preference_pair_from_json,
)


def make_scorer(
    run: RunFolder,
    config: OnlineConfig,
    sft_path: Path | str,
    prompts: Sequence[Prompt],
    generator: Generator,
    progress: Progress,
) -> Scorer:
    """The scorer that the configuration names, trained first where it has to be."""
    reward = config.reward
    if reward.function:
        return FunctionScorer(reward.function)
    options = {"precision": config.precision, "micro_batch_tokens": config.micro_batch_tokens}
    if reward.model:
        return RewardModelScorer(RewardModel.load(reward.model, **options))

    def train(path: Path) -> None:
        model = _fresh_reward_model(sft_path, config, options)
        pairs = _labelled_pairs(run, config, prompts, generator, model)
        metrics = train_reward_model(
            model,
            pairs,
            config=reward.training,
            seed=derive_seed(config.seed, "reward_model"),
            on_step=progress.step,
        )
        write_jsonl(path.parent / "metrics.jsonl", [metrics])
        save_model(path, model.model, model.tokenizer)
        progress.reward_model(metrics)

    return run.directory(
        "reward_model/model",
        train,
        lambda path: RewardModelScorer(RewardModel.load(str(path), **options)),
    )


def _fresh_reward_model(sft_path: Path | str, config: OnlineConfig, options: dict) -> RewardModel:
    """The SFT model with a zero head; float32 where the whole model is trained."""
    tokenizer = load_tokenizer(str(sft_path))
    dtype = torch.float32 if config.reward.training.parameters == "all" else torch.bfloat16
    model = AutoModelForSequenceClassification.from_pretrained(
        sft_path, num_labels=1, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    result = RewardModel(model.eval(), tokenizer, **options)
    torch.nn.init.zeros_(result.head.weight)
    # Other tools find the response's end by the pad token, so it must differ from the end token.
    others = [i for i in tokenizer.all_special_ids if i != result.chat.end_token_id]
    if tokenizer.pad_token_id != result.chat.end_token_id:
        model.config.pad_token_id = tokenizer.pad_token_id
    elif others:
        model.config.pad_token_id = others[0]
    return result


def _labelled_pairs(
    run: RunFolder,
    config: OnlineConfig,
    prompts: Sequence[Prompt],
    generator: Generator,
    model: RewardModel,
) -> list[TokenGroup]:
    reward = config.reward
    if reward.pairs:
        pairs = load_preference_pairs(reward.pairs, system_prompt=config.data.system_prompt)
        return [
            model.token_group(p.prompt.messages, [p.chosen, p.rejected], [True, True])
            for p in pairs
        ]

    def label() -> list[PreferencePair]:
        samples = generator.generate(
            prompts,
            num_generations=reward.labelled_samples_per_prompt,
            seed=derive_seed(config.seed, "labelled_samples"),
        )
        labelled = FunctionScorer(reward.labeller).score(samples)
        return [pair for group in labelled for pair in pairs_by_gap(group, reward)]

    pairs = run.records("reward_model/pairs", preference_pair_from_json, label)
    if not pairs:
        raise UserError(
            f"the labeller {reward.labeller} gave no two responses to a prompt labels at least "
            f"{reward.labelled_min_gap} apart: lower reward.labelled_min_gap or sample more"
        )
    return [
        model.token_group(
            p.chosen.prompt.messages,
            [p.chosen.text, p.rejected.text],
            [p.chosen.finished, p.rejected.finished],
        )
        for p in pairs
    ]


def pairs_by_gap(group: ScoredGroup, reward: RewardConfig) -> list[PreferencePair]:
    """The pairs of one prompt whose labels differ enough, widest gaps first."""
    config = SelectionConfig(
        "widest_gaps",
        pairs_per_prompt=reward.labelled_max_pairs_per_prompt,
        min_gap=reward.labelled_min_gap,
    )
    return select([group], config, seed=0)
