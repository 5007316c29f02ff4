"""A folder of LoRA adapters, as training with `lora` or PEFT leaves it, made a model of its own."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from rlhf_fast.errors import UserError
from rlhf_fast.models.checkpoint import UNREADABLE, save_model
from rlhf_fast.models.language_model import load_causal_lm
from rlhf_fast.models.reward_model import load_classifier

TASKS = {"CAUSAL_LM": lambda path: load_causal_lm(path, dtype="auto"), "SEQ_CLS": load_classifier}


def merge_folder(adapters: Path, output: Path) -> None:
    """Writes the adapters' base with them merged in, in the base's dtype."""
    settings = json.loads((adapters / "adapter_config.json").read_text(encoding="utf-8"))
    kind, task = settings.get("peft_type"), settings.get("task_type") or "CAUSAL_LM"
    if kind != "LORA" or task not in TASKS:
        raise UserError(
            f"{adapters}: adapters must be LORA of a task among {', '.join(TASKS)}, got {kind} "
            f"of {task}; merge them with PEFT's merge_and_unload"
        )
    model = TASKS[task](str(adapters))
    has_tokenizer = (adapters / "tokenizer_config.json").is_file()
    source = adapters if has_tokenizer else settings["base_model_name_or_path"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"cannot load a tokenizer from {source}: {error}") from error
    save_model(output, model, tokenizer)
