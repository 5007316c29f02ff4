"""Model cards: the README.md beside saved weights, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

import rlhf_fast
from rlhf_fast import hub
from rlhf_fast.io import write_atomic, write_directory_atomic

CARD = "README.md"
MARK = "<!-- made by rlhf_fast, which leaves a card without this line alone -->"
LANGUAGE_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
messages = [{"role": "user", "content": "What is a kernel?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
"""
REWARD_MODEL = """\
from rlhf_fast.models.reward_model import RewardModel

path = "."  # this directory
model = RewardModel.load(path)
messages = [{"role": "user", "content": "What is a kernel?"}]
group = model.token_group(messages, ["A small program.", "No idea."], [True, True])
print(model.map_responses([group], model.rewards))
"""


@dataclass(frozen=True)
class Card:
    """What a card tells of a model."""

    method: str
    """By what it was trained, in a word: sft, dpo, ...; a tag of the card, and in its title."""
    summary: str
    """How it was made, in a sentence."""
    base: Sequence[str]
    """The models that it was made of: mostly the one that training started from."""
    data: Mapping[str, str | None] = field(default_factory=dict)
    """Sources of rows, by what they are."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters, nested as the configuration is."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """The last ones; what is no finite number is left out."""


def write_card(directory: Path, card: Card) -> None:
    """Writes the card of the model in `directory`, unless somebody wrote another one there.

    Local places are named by their last part alone: a card is to be shared.
    """
    path = directory / CARD
    if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_atomic(path, _text(directory, card))


def with_card(path: Path, make: Callable[[Path], Card]) -> Card:
    """Has `make` write a model and say what its card tells: both are at `path`, or neither."""
    cards: list[Card] = []

    def fill(directory: Path) -> None:
        cards.append(make(directory))
        write_card(directory, cards[0])

    write_directory_atomic(path, fill)
    return cards[0]


def _text(directory: Path, card: Card) -> str:
    is_reward_model = _is_reward_model(directory)
    has_adapters = any(directory.rglob(hub.ADAPTERS))
    on_hub = [name for name in card.base if _is_hub_name(name)]
    data = ModelCardData(
        base_model=on_hub or None,  # the hub refuses cards that name anything else
        library_name="peft" if has_adapters else "transformers",
        pipeline_tag="text-classification" if is_reward_model else "text-generation",
        tags=["rlhf_fast", "rlhf", card.method],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n{MARK}",
        f"# {Path(card.base[0]).name}-{card.method}",
        f"{card.summary} Made from {_listed(card.base)} by rlhf_fast {rlhf_fast.__version__}"
        f"{'; only adapters are saved here' if has_adapters else ''}.",
        "## Use",
        f"```python\n{REWARD_MODEL if is_reward_model else LANGUAGE_MODEL}```",
    ]
    if sources := {name: source for name, source in card.data.items() if source}:
        lines = [f"- {name}: {_listed([source])}" for name, source in sources.items()]
        parts += ["## Data", "\n".join(lines)]
    if card.settings:
        settings = yaml.safe_dump(dict(card.settings), sort_keys=False)
        parts += ["## Hyper-parameters", f"```yaml\n{settings}```"]
    if numbers := {name: value for name, value in card.metrics.items() if _is_result(name, value)}:
        lines = [f"| {name} | {value:.4g} |" for name, value in numbers.items()]
        parts += ["## Metrics", "\n".join(["| name | value |", "|---|---:|", *lines])]
    return "\n\n".join(parts) + "\n"


def _is_reward_model(directory: Path) -> bool:
    for name, key in (("*config.json", "architectures"), (hub.ADAPTERS, "task_type")):
        for file in directory.rglob(name):
            said = str(json.loads(file.read_text(encoding="utf-8")).get(key))
            if "SequenceClassification" in said or "SEQ_CLS" in said:
                return True
    return False


def _is_result(name: str, value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    about_the_run = name in ("step", "iteration") or name.startswith("seconds_")
    return is_number and math.isfinite(value) and not about_the_run


def _is_hub_name(name: str) -> bool:
    if "/" in name:
        name = name.partition(":")[0]  # the rest is a dataset's split
    return not hub.is_path(name) and not Path(name).exists()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name if _is_hub_name(name) else Path(name).name}`" for name in names)
