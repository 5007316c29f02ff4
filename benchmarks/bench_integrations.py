"""Step time and peak memory of TRL's trainers, patched and not, each run in a process of its own.

    python -m benchmarks.bench_integrations --model PATH --trainer DPO --length 1024

Without --model a random Llama of --hidden, --layers and --vocab is made. The losses of both
variants must agree, or nothing is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import harness

WARMUP_STEPS = 2
VARIANTS = ("unpatched", "patched")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trainer", nargs="+", default=["SFT", "DPO", "ORPO"])
    parser.add_argument("--model", help="a Hugging Face model's folder")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=2, help="examples or pairs per step")
    parser.add_argument("--length", type=int, default=512, help="tokens, a quarter of them prompt")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2, help="processes per variant")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(args) -> None:
    """For `python -m benchmarks integrations`: random models of the given vocabularies."""
    for vocab in args.vocab:
        given = ["--vocab", str(vocab), "--length", str(min(args.length, args.tokens))]
        measure(options([*given, *(["--save"] if args.save else [])]))


def measure(args: argparse.Namespace) -> None:
    rows = []
    for trainer in args.trainer:
        results: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
        for _ in range(args.repeats):
            for variant in VARIANTS:
                results[variant].append(in_child(args, trainer, variant))
        check(trainer, results)
        rows += report(args, trainer, results)
    if args.save:
        print("saved to", harness.record("integrations", rows))


def in_child(args: argparse.Namespace, trainer: str, variant: str) -> dict:
    given = [f"--{k}={v}" for k, v in vars(args).items() if v and not isinstance(v, bool | list)]
    given += ["--lora"] if args.lora else []
    command = [sys.executable, "-m", "benchmarks.bench_integrations", *given]
    command += ["--trainer", trainer, "--child", variant]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def check(trainer: str, results: dict[str, list[dict]]) -> None:
    losses = [results[variant][0]["losses"] for variant in VARIANTS]
    for a, b in zip(*losses):
        assert math.isclose(a, b, rel_tol=0.02, abs_tol=1e-3), f"{trainer}: losses {losses}"


def report(args, trainer: str, results: dict[str, list[dict]]) -> list[dict[str, object]]:
    rows = []
    for variant in VARIANTS:
        steps = [t for run in results[variant] for t in run["step_ms"]]
        row = {
            "trainer": trainer,
            "variant": variant,
            "model": args.model or f"llama {args.layers}x{args.hidden}, {args.vocab} words",
            "lora": args.lora,
            "dtype": args.dtype,
            "batch": args.batch,
            "length": args.length,
            "step_ms": round(statistics.median(steps), 1),
            "step_ms_min": round(min(steps), 1),
            "peak_mib": round(min(run["peak_bytes"] for run in results[variant]) / 2**20),
            **harness.describe(),
        }
        rows.append(row)
        print(f"{trainer:<6} {variant:<10} {row['step_ms']:9.1f} ms {row['peak_mib']:8} MiB")
    return rows


# ---- one run, in its own process -----------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    import importlib

    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    from rlhf_fast.integrations import trl as integration

    if args.child == "patched":
        integration.patch()
    name = args.trainer[0]
    home = trl if hasattr(trl, f"{name}Trainer") else f"trl.experimental.{name.lower()}"
    home = importlib.import_module(home) if isinstance(home, str) else home
    step_ms: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            harness.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            harness.synchronize()
            step_ms.append((time.perf_counter() - self.start) * 1e3)

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = model_and_tokenizer(args, folder)
        config = getattr(home, f"{name}Config")(
            output_dir=folder,
            max_steps=args.steps + WARMUP_STEPS,
            per_device_train_batch_size=args.batch,
            max_length=args.length,
            logging_steps=1,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = getattr(home, f"{name}Trainer")(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(examples(args, name, tokenizer)),
            processing_class=tokenizer,
            callbacks=[Clock()],
            peft_config=lora() if args.lora else None,
        )
        reset_peak()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"step_ms": step_ms[WARMUP_STEPS:], "peak_bytes": peak_bytes(), "losses": losses}
    print(json.dumps(result))


def lora():
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")


def model_and_tokenizer(args, folder: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(args.model)
    # TRL loads the reference model from where the model came from.
    LlamaForCausalLM(llama(args)).to(dtype).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, word_tokenizer(args.vocab)


def llama(args):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )


def word_tokenizer(vocab: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, **{f"w{i}": i for i in range(1, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="w1"
    )


def examples(args, trainer: str, tokenizer) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(0)

    def text(num_tokens: int) -> str:
        ids = torch.randint(1, len(tokenizer), (num_tokens,), generator=generator)
        return " ".join(f"w{i}" for i in ids.tolist()) if not args.model else tokenizer.decode(ids)

    prompt, response = args.length // 4, args.length - args.length // 4 - 2
    count = args.batch * (args.steps + WARMUP_STEPS)
    if trainer == "SFT":
        return [{"prompt": text(prompt), "completion": " " + text(response)} for _ in range(count)]
    keys = ("chosen", "rejected")
    return [
        {"prompt": text(prompt)} | {k: " " + text(response) for k in keys} for _ in range(count)
    ]


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest resident size


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    parsed = options()
    child(parsed) if parsed.child else measure(parsed)
