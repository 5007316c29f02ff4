"""A TRL trainer as a contestant of bench_integrations."""

from __future__ import annotations

import importlib

import datasets
import torch

from benchmarks.integration_step import Settings, make_text, model_folder, stopwatch_callback

NUM_GENERATIONS = 4
SAMPLING = ("GRPO", "RLOO")
COLUMNS = {"SFT": ("completion",), "KTO": ("completion",), **dict.fromkeys(SAMPLING, ())}


def train(settings: Settings, folder: str) -> None:
    datasets.disable_progress_bars()
    make_trainer(settings, folder).train()


def make_trainer(settings: Settings, folder: str):
    import trl
    from transformers import AutoTokenizer

    name = settings.trainer
    samples = name in SAMPLING
    home = trl
    if not hasattr(trl, f"{name}Trainer"):
        home = importlib.import_module(f"trl.experimental.{name.lower()}")
    source = model_folder(settings, folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    options, more = {"max_length": settings.length}, {}
    if samples:
        options = {
            "num_generations": NUM_GENERATIONS,
            "max_completion_length": settings.completion,
            "generation_kwargs": {"min_new_tokens": settings.completion},
            "beta": 0.04,
        }
        more["reward_funcs"] = even_tokens
    if settings.lora:
        from peft import LoraConfig

        task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
        more["peft_config"] = LoraConfig(task_type=task, target_modules="all-linear")
    config = getattr(home, f"{name}Config")(
        output_dir=folder,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch * (NUM_GENERATIONS if samples else 1),
        logging_steps=1,
        learning_rate=1e-6 if settings.model else 1e-4,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    return getattr(home, f"{name}Trainer")(
        model=load(settings, source),
        args=config,
        train_dataset=datasets.Dataset.from_list(examples(settings, tokenizer)),
        processing_class=tokenizer,
        callbacks=[stopwatch_callback()],
        **more,
    )


def even_tokens(completion_ids, **_) -> list[float]:
    """A reward that differs within a group."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def load(settings: Settings, folder: str):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)  # of the reward head
    dtype = getattr(torch, settings.dtype)
    if settings.trainer == "Reward":
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def examples(settings: Settings, tokenizer) -> list[dict[str, str]]:
    text = make_text(tokenizer)
    prompt = settings.length // 4
    response = settings.length - prompt - 2
    columns = COLUMNS.get(settings.trainer, ("chosen", "rejected"))
    rows = [
        {"prompt": text(prompt)} | {column: text(response) for column in columns}
        for _ in range(settings.batch * settings.max_steps)
    ]
    if settings.trainer == "KTO":
        return [row | {"label": number % 2 == 0} for number, row in enumerate(rows)]
    return rows
