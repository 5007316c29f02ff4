"""Model cards: what the hub reads of them, what they tell, and whose files they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from rlhf_fast.models.adapters import LoraConfig, add_lora
from rlhf_fast.models.card import Card, write_card
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from tests.tiny import tiny_model, tiny_tokenizer

CARD = Card(
    "dpo",
    "Trained on pairs.",
    ["org/base"],
    {"pairs": "/home/me/pairs.jsonl", "prompts": "org/prompts:train", "none": None},
    {"dpo": {"beta": 0.1, "merged": (1, 2)}},
    {"loss": 0.51234567, "seconds_update": 3.0, "step": 7, "note": "x", "odd": float("nan")},
)


def of_adapters(path, model_path, trained=()):
    if trained:
        model = fresh_reward_model(model_path, num_outputs=1, seed=0)
    else:
        model = tiny_model()
        model.name_or_path = model_path
    add_lora(model, LoraConfig(rank=2), trained_modules=trained, seed=0)
    save_model(path, model, tiny_tokenizer())


def members(path, model_path):
    model = RewardModel(fresh_reward_model(model_path, num_outputs=1, seed=0), tiny_tokenizer())
    names = [model.add_member(k, LoraConfig(rank=2), seed=k) for k in (1, 2)]
    model.become_ensemble(names)
    model.save(path)


KINDS = {
    "whole": lambda path, base: save_model(path, tiny_model(), tiny_tokenizer()),
    "adapters": of_adapters,
    "reward": lambda path, base: RewardModel(
        fresh_reward_model(base, num_outputs=1, seed=0), tiny_tokenizer()
    ).save(path),
    "reward adapters": lambda path, base: of_adapters(path, base, ("score",)),
    "members": members,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_reads_the_card_and_its_program_runs(kind, model_path, tmp_path, monkeypatch):
    KINDS[kind](tmp_path / "model", model_path)
    write_card(tmp_path / "model", CARD)
    monkeypatch.chdir(tmp_path / "model")
    card = ModelCard.load("README.md")
    is_reward_model = kind in ("reward", "reward adapters", "members")
    task = "text-classification" if is_reward_model else "text-generation"
    assert card.data.base_model == "org/base" or card.data.base_model == ["org/base"]
    assert card.data.library_name == ("transformers" if kind in ("whole", "reward") else "peft")
    assert card.data.pipeline_tag == task and {"rlhf_fast", "dpo"} < set(card.data.tags)
    (program,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(compile(program, "README.md", "exec"), {})


def test_a_card_tells_data_settings_and_metrics_but_no_local_paths(model_path, tmp_path):
    save_model(tmp_path / "model", tiny_model(), tiny_tokenizer())
    write_card(tmp_path / "model", Card(**{**vars(CARD), "base": [model_path, "quickstart:model"]}))
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.base_model is None  # the hub would refuse what is no name there
    assert f"Made from `{Path(model_path).name}`, `quickstart:model` by" in card.text
    assert f"# {Path(model_path).name}-dpo\n\nTrained on pairs. " in card.text
    (settings,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    assert yaml.safe_load(settings) == {"dpo": {"beta": 0.1, "merged": [1, 2]}}
    assert "- pairs: `pairs.jsonl`\n- prompts: `org/prompts:train`\n\n" in card.text
    assert card.text.endswith("| name | value |\n|---|---:|\n| loss | 0.5123 |\n")
    assert "/home" not in card.text and str(tmp_path) not in card.text


def test_a_card_of_somebody_else_stays(model_path, tmp_path):
    save_model(tmp_path / "model", tiny_model(), tiny_tokenizer())
    path = tmp_path / "model" / "README.md"
    write_card(tmp_path / "model", CARD)
    write_card(tmp_path / "model", Card("rl", "Anew.", ["org/base"]))
    assert "Anew." in path.read_text() and "Trained on pairs" not in path.read_text()
    path.write_text("My own.")
    write_card(tmp_path / "model", CARD)
    assert path.read_text() == "My own."
    assert json.loads((tmp_path / "model" / "config.json").read_text())
