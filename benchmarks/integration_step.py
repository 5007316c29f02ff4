"""One contestant of bench_integrations, in a process of its own: a framework, patched or not.

`python -m benchmarks.integration_step NAME SETTINGS` answers like benchmarks.training_contestants:
an optimiser step for each line it reads.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import transformers

from benchmarks.stopwatch import Stopwatch

PATCHED = "rlhf_fast in "
NAMES = {"trl": "TRL", "llamafactory": "LLaMA-Factory", "openrlhf": "OpenRLHF", "verl": "verl"}
STEPS = {
    "trl": "benchmarks.trl_step",
    "llamafactory": "benchmarks.llamafactory_step",
    "openrlhf": "benchmarks.actor_step",
    "verl": "benchmarks.actor_step",
}
"""Modules with `train(settings, folder)`."""


@dataclass
class Settings:
    framework: str
    trainer: str
    model: str
    """A Hugging Face model's folder, or empty for a random Llama of the sizes below."""
    width: int
    layers: int
    vocab: int
    batch: int
    """Examples or pairs of a step; prompts where responses are sampled."""
    length: int
    """Tokens of an example, a quarter of them prompt."""
    completion: int
    """Tokens that GRPO and RLOO sample."""
    dtype: str
    lora: bool
    steps: int
    threads: int

    @property
    def max_steps(self) -> int:
        """One more than are timed: there a process waits, and does not end while others work."""
        return self.steps + 1

    @property
    def on_gpu(self) -> bool:
        return torch.cuda.is_available()


def main() -> None:
    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    train = import_module(STEPS[settings.framework]).train
    if name.startswith(PATCHED):
        import_module(f"rlhf_fast.integrations.{settings.framework}").patch()
    with tempfile.TemporaryDirectory() as folder:
        train(settings, folder)


def stopwatch_callback():
    """What Hugging Face's trainer calls: each step waits to be asked for, and is timed."""
    watch = Stopwatch()

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            forget_peak()

        def on_step_begin(self, *_, **__):
            watch.start()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                watch.stop(logs["loss"], grad_norm=logs["grad_norm"])

    return Steps()


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest resident size


# ---- models and texts ----------------------------------------------------------------------------


def model_folder(settings: Settings, folder: str) -> str:
    """Where the model lies: the frameworks load it, and the reference model, from there."""
    if settings.model:
        return settings.model
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.width,
        intermediate_size=settings.width * 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(1, settings.width // 64),
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, settings.dtype))
    model.save_pretrained(folder)
    word_tokenizer(settings.vocab).save_pretrained(folder)
    return folder


def word_tokenizer(vocab: int):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<end>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )


def make_text(tokenizer, seed: int = 0):
    """A function that returns a text of so many tokens: words that are one token each."""
    generator = torch.Generator().manual_seed(seed)
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    starts = " " if any(piece.startswith(" ") for piece in pieces) else ""
    words = [p.strip() for p in pieces if p.startswith(starts) and p.strip().isalnum()]

    def text(num_tokens: int) -> str:
        chosen = torch.randint(len(words), (num_tokens,), generator=generator)
        return " " + " ".join(words[i] for i in chosen.tolist())

    return text


if __name__ == "__main__":
    main()
