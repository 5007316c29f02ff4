"""A LLaMA-Factory run as a contestant of bench_integrations."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.integration_step import Settings, make_text, model_folder, stopwatch_callback

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "it"}
COLUMNS = {
    "DPO": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
    "KTO": {"messages": "messages", "kto_tag": "label"},
}


def train(settings: Settings, folder: str) -> None:
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")  # of packages that training does not need
    from llamafactory.train.tuner import run_exp
    from transformers import AutoTokenizer

    source = model_folder(settings, folder)
    write_data(settings, Path(folder), AutoTokenizer.from_pretrained(source))
    options = {
        "model_name_or_path": source,
        "stage": settings.trainer.lower(),
        "do_train": True,
        "finetuning_type": "lora" if settings.lora else "full",
        "pure_bf16": settings.dtype == "bfloat16",
        "template": "empty",
        "dataset": "examples",
        "dataset_dir": folder,
        "cutoff_len": settings.length,
        "output_dir": f"{folder}/out",
        "per_device_train_batch_size": settings.batch,
        "learning_rate": 1e-6 if settings.model else 1e-4,
        "lr_scheduler_type": "constant",
        "max_steps": settings.max_steps,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_gradient_checkpointing": True,
        "use_cpu": not settings.on_gpu,
        "disable_tqdm": True,
    }
    run_exp(options, callbacks=[stopwatch_callback()])


def write_data(settings: Settings, folder: Path, tokenizer) -> None:
    text = make_text(tokenizer)
    prompt = settings.length // 4
    response = settings.length - prompt - 2

    def said(who: str, num_tokens: int) -> dict[str, str]:
        return {"role": who, "content": text(num_tokens).strip()}

    rows = []
    for number in range(settings.batch * settings.max_steps):
        messages = [said("user", prompt)]
        if settings.trainer == "KTO":
            messages.append(said("it", response))
            rows.append({"messages": messages, "label": number % 2 == 0})
        else:
            pair = {"chosen": said("it", response), "rejected": said("it", response)}
            rows.append({"messages": messages, **pair})
    (folder / "examples.json").write_text(json.dumps(rows))
    columns = COLUMNS[settings.trainer]
    info = {"file_name": "examples.json", "formatting": "sharegpt", "tags": TAGS}
    info |= {"columns": columns, "ranking": settings.trainer == "DPO"}
    (folder / "dataset_info.json").write_text(json.dumps({"examples": info}))
