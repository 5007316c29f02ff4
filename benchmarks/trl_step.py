"""One contestant of bench_integrations, in a process of its own: a TRL trainer, patched or not.

`python -m benchmarks.trl_step NAME SETTINGS` answers like benchmarks.training_contestants: an
optimiser step for each line it reads.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers

from benchmarks.training_contestants import Stopwatch, answer, peak_bytes

PATCHED, UNPATCHED = "rlhf_fast in TRL", "TRL"
NUM_GENERATIONS = 4
SAMPLING = ("GRPO", "RLOO")
COLUMNS = {"SFT": ("completion",), "KTO": ("completion",), **dict.fromkeys(SAMPLING, ())}


@dataclass
class Settings:
    trainer: str
    model: str
    """A Hugging Face model's folder, or empty for a random Llama of the sizes below."""
    width: int
    layers: int
    vocab: int
    batch: int
    """Examples or pairs of a step; prompts with GRPO and RLOO."""
    length: int
    """Tokens of an example, a quarter of them prompt."""
    completion: int
    """Tokens that GRPO and RLOO sample."""
    dtype: str
    lora: bool
    steps: int
    threads: int

    @property
    def on_gpu(self) -> bool:
        return torch.cuda.is_available()


def main() -> None:
    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if name == PATCHED:
        from rlhf_fast.integrations import trl as integration

        integration.patch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, folder)
        forget_peak()
        trainer.train()
    answer(peak_bytes=peak_bytes())


def make_trainer(settings: Settings, folder: str):
    import trl
    from transformers import TrainerCallback

    watch = Stopwatch()

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            watch.start()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                watch.stop(logs["loss"])

    name = settings.trainer
    samples = name in SAMPLING
    home = trl
    if not hasattr(trl, f"{name}Trainer"):
        home = importlib.import_module(f"trl.experimental.{name.lower()}")
    model, tokenizer = model_and_tokenizer(settings, folder)
    options, more = {"max_length": settings.length}, {}
    if samples:
        options = {
            "num_generations": NUM_GENERATIONS,
            "max_completion_length": settings.completion,
            "beta": 0.04,
        }
        more["reward_funcs"] = even_tokens
    if settings.lora:
        from peft import LoraConfig

        task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
        more["peft_config"] = LoraConfig(task_type=task, target_modules="all-linear")
    config = getattr(home, f"{name}Config")(
        output_dir=folder,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch * (NUM_GENERATIONS if samples else 1),
        logging_steps=1,
        learning_rate=1e-4,
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
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(examples(settings, tokenizer)),
        processing_class=tokenizer,
        callbacks=[Steps()],
        **more,
    )


def even_tokens(completion_ids, **_) -> list[float]:
    """A reward that differs within a group."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def model_and_tokenizer(settings: Settings, folder: str):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    if settings.model:
        return load(settings, settings.model), AutoTokenizer.from_pretrained(settings.model)
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.width,
        intermediate_size=settings.width * 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(1, settings.width // 64),
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    # TRL loads the reference model from where the model came from.
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return load(settings, folder), word_tokenizer(settings.vocab)


def load(settings: Settings, folder: str):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = getattr(torch, settings.dtype)
    if settings.trainer == "Reward":
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def word_tokenizer(vocab: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )


def examples(settings: Settings, tokenizer) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(0)

    def text(num_tokens: int) -> str:
        ids = torch.randint(1, len(tokenizer), (num_tokens,), generator=generator)
        if settings.model:
            return tokenizer.decode(ids)
        return " ".join(f"w{i}" for i in ids.tolist())

    prompt = settings.length // 4
    response = settings.length - prompt - 2
    columns = COLUMNS.get(settings.trainer, ("chosen", "rejected"))
    rows = [
        {"prompt": text(prompt)} | {column: " " + text(response) for column in columns}
        for _ in range(settings.batch * settings.steps)
    ]
    if settings.trainer == "KTO":
        return [row | {"label": number % 2 == 0} for number, row in enumerate(rows)]
    return rows


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest resident size


if __name__ == "__main__":
    main()
