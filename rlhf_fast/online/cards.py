"""The cards of a run's models, from what its folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_fast.io import PARTIAL, read_jsonl
from rlhf_fast.models.card import Card, write_card
from rlhf_fast.online.config import OnlineConfig


def write_cards(folder: Path, config: OnlineConfig, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the card of every model of a run; `rows` are those of its metrics.jsonl."""
    data, base = config.data, [config.model]
    sft = Card(
        "sft",
        "Fine-tuned on demonstrations, where a run of online RLHF starts.",
        base,
        {"demonstrations": data.demonstrations},
        asdict(config.sft),
        _last(folder / "sft" / "training.jsonl"),
    )
    if (folder / "sft" / "model").is_dir():
        write_card(folder / "sft" / "model", sft)
    reward = config.reward
    judged = {"pairs": reward.pairs, "scores": reward.scores, "labeller": reward.labeller}
    models = (p for p in (folder / "reward_model").glob("*") if p.is_dir() and p.suffix != PARTIAL)
    for path in sorted(models):
        suffix = "" if path.name == "model" else f"_{path.name.removeprefix('model_')}"
        metrics = _last(path.parent / f"metrics{suffix}.jsonl")
        summary = "The reward of a run of online RLHF, trained before its iterations."
        settings = asdict(reward.training)
        write_card(path, Card("reward-model", summary, base, judged, settings, metrics))
    for row in rows:
        path = folder / f"iteration_{row['iteration']}" / "policy"
        if path.is_dir():
            write_card(path, _policy(config, row))


def _policy(config: OnlineConfig, row: dict[str, Any]) -> Card:
    iteration, data, reward = row["iteration"], config.data, config.reward
    names = ("algorithm", config.algorithm, "selection", "reference", "lora", "seed")
    generation, values = config.generation, asdict(config)
    settings = {name: values[name] for name in names}
    settings["generation"] = {
        "num_generations": generation.num_generations,
        **asdict(generation.sampling),
    }
    sources = {"prompts": data.prompts, "demonstrations": data.demonstrations}
    sources |= {f"reward {name}": getattr(reward, name, None) for name in reward.sources()}
    sources |= {"reward rule": reward.rule.kind, "reward judge": reward.judge.model}
    return Card(
        config.algorithm,
        f"The policy after {iteration} of {config.num_iterations} iterations of online RLHF: "
        f"generate, score, select, train (arXiv 2405.07863).",
        [config.model],
        {name: source for name, source in sources.items() if isinstance(source, str)},
        settings,
        row,
    )


def _last(path: Path) -> dict[str, Any]:
    rows = read_jsonl(path) if path.exists() else []
    return rows[-1] if rows else {}
