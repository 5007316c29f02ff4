"""A folder of LoRA adapters, as training with `lora` or PEFT leaves it, made a model of its own."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.models.checkpoint import UNREADABLE, save_model
from rlhf_fast.models.language_model import load_causal_lm
from rlhf_fast.models.names import home_of_tokenizer
from rlhf_fast.models.reward_model import load_classifier


def merge_folder(adapters: Path, output: Path) -> None:
    """Writes the adapters' base with them merged in, in the base's dtype."""
    from transformers import AutoTokenizer

    settings = json.loads((adapters / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("task_type") == "SEQ_CLS":
        model = load_classifier(str(adapters))
    else:
        model = load_causal_lm(str(adapters), dtype="auto")
    source = home_of_tokenizer(adapters)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"cannot load a tokenizer from {source}: {error}") from error
    save_model(output, model, tokenizer)
