"""An iteration of online DPO as scripts make it that use TRL and vLLM.

Every stage of every iteration is a process of its own, which loads its model, works and writes a
file: `python -m benchmarks.online_rival SETTINGS STAGE ITERATION` answers with a line of JSON after
an `@`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from benchmarks.online_parts import (
    BETA,
    LEARNING_RATE,
    SEED,
    Clock,
    Settings,
    device,
    has_vllm,
    read,
    write,
)


def generate(settings: Settings, number: int) -> None:
    """vLLM started on the latest checkpoint, prompts as texts; transformers where it is absent."""
    clock = Clock()
    with clock("process start"):
        from transformers import AutoTokenizer

        if has_vllm():
            from rlhf_fast.generation.vllm_process import import_vllm, platform_defaults

            vllm = import_vllm()
    policy = settings.latest(number)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    messages = [row["messages"] for row in read(settings.path / "prompts.jsonl")]
    prompts = [
        tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True)
        for m in messages
    ]
    n, temperature = settings.generations, settings.temperature
    if has_vllm():
        with clock("engine start"):
            options = platform_defaults(policy, settings.new_tokens, dtype="bfloat16")
            engine = vllm.LLM(model=policy, dtype="bfloat16", seed=SEED, **options)
        with clock("generation"):
            sampling = vllm.SamplingParams(
                n=n, temperature=temperature, max_tokens=settings.new_tokens
            )
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
        texts = [[sample.text for sample in output.outputs] for output in outputs]
        tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    else:
        texts, tokens = generate_with_transformers(settings, clock, policy, tokenizer, prompts)
    with clock("saving"):
        write(
            settings.iteration(number, "rival") / "responses.jsonl", [{"texts": t} for t in texts]
        )
    clock.answer(tokens=tokens)


def generate_with_transformers(settings, clock, policy, tokenizer, prompts) -> tuple[list, int]:
    from transformers import AutoModelForCausalLM

    with clock("engine start"):
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).to(device())
    n, texts, tokens = settings.generations, [], 0
    with clock("generation"):
        torch.manual_seed(SEED)
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        out = model.generate(
            input_ids=batch["input_ids"].to(device()),
            attention_mask=batch["attention_mask"].to(device()),
            do_sample=True,
            temperature=settings.temperature,
            top_k=0,
            max_new_tokens=settings.new_tokens,
            num_return_sequences=n,
        )[:, batch["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(out, skip_special_tokens=True)
        texts = [decoded[i : i + n] for i in range(0, len(decoded), n)]
        tokens = int((out != tokenizer.pad_token_id).sum())
    return texts, tokens


def score(settings: Settings, number: int) -> None:
    """A sequence classifier over padded batches of conversations, as texts; picks the pairs too."""
    clock = Clock()
    with clock("process start"):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    with clock("loading models"):
        tokenizer = AutoTokenizer.from_pretrained(settings.reward_model)
        model = AutoModelForSequenceClassification.from_pretrained(
            settings.reward_model, dtype=torch.bfloat16
        ).to(device())
        tokenizer.pad_token_id = model.config.pad_token_id
    groups = read(settings.iteration(number, "rlhf_fast") / "scored.jsonl")
    rewards = []
    with clock("scoring"), torch.inference_mode():
        texts = [
            tokenizer.apply_chat_template(
                group["prompt"]["messages"], tokenize=False, add_generation_prompt=True
            )
            + completion["text"]
            + (tokenizer.eos_token if completion["finished"] else "")
            for group in groups
            for completion in group["completions"]
        ]
        for start in range(0, len(texts), settings.batch):
            part = texts[start : start + settings.batch]
            batch = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=False)
            rewards += model(**batch.to(device())).logits[:, 0].float().tolist()
    with clock("selection"):
        n = settings.generations
        rows = [rewards[i : i + n] for i in range(0, len(rewards), n)]
        pairs = [(row.index(max(row)), row.index(min(row))) for row in rows]
    with clock("saving"):
        path = settings.iteration(number, "rival") / "scored.jsonl"
        write(path, [{"rewards": row, "pair": pair} for row, pair in zip(rows, pairs)])
    clock.answer(rewards=rows)


def train(settings: Settings, number: int) -> None:
    """TRL's DPOTrainer with the fixed reference, on the tokens that ours trains on."""
    clock = Clock()
    with clock("process start"):
        import datasets
        import transformers
        import trl
    rows = tokens_of_pairs(settings.iteration(number, "rlhf_fast") / "pairs.jsonl")
    folder, losses = settings.iteration(number, "rival"), []

    class DPOTrainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # it is tokens already

    class Losses(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    with clock("loading models"):
        load = transformers.AutoModelForCausalLM.from_pretrained
        policy = load(settings.latest(number), dtype=torch.float32)
        reference = load(settings.model, dtype=torch.float32)
        watch_reference(reference, clock)
        trainer = DPOTrainer(
            policy,
            ref_model=reference,
            args=trl.DPOConfig(**trainer_options(settings, folder)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(settings.model),
            callbacks=[Losses()],
        )
    with clock("training"):
        trainer.train()
    clock.seconds["training"] -= clock.seconds["reference"]
    with clock("saving"):
        trainer.save_model(str(folder / "policy"))
    clock.answer(losses=losses, pairs=len(rows), trl=trl.__version__)


def tokens_of_pairs(path: Path) -> list[dict]:
    return [
        {
            "prompt": "",
            "prompt_ids": pair["chosen"]["prompt_token_ids"],
            "chosen_ids": pair["chosen"]["token_ids"],
            "rejected_ids": pair["rejected"]["token_ids"],
        }
        for pair in read(path)
    ]


def trainer_options(settings: Settings, folder: Path) -> dict:
    return {
        "output_dir": str(folder / "trainer"),
        "beta": BETA,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.batch // settings.micro_batch,
        "num_train_epochs": settings.epochs,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_length": None,
        # Its default recomputes the activations; a model this small need not.
        "gradient_checkpointing": False,
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": SEED,
    }


def watch_reference(model: torch.nn.Module, clock: Clock) -> None:
    """Times its forwards."""
    starts = []
    model.register_forward_pre_hook(lambda *args: starts.append(time.perf_counter()))

    def stop(*args) -> None:
        clock.seconds["reference"] += time.perf_counter() - starts.pop()

    model.register_forward_hook(stop)


STAGES = {"generate": generate, "score": score, "train": train}

if __name__ == "__main__":
    STAGES[sys.argv[2]](Settings.from_json(sys.argv[1]), int(sys.argv[3]))
