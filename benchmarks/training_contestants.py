"""One contestant of the training benchmark, in a process of its own.

`python -m benchmarks.training_contestants NAME SETTINGS` prepares itself, then makes an optimiser
step for each line it reads, answering with loss and times as a line of JSON. When its input ends it
reports its peak memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlhf_fast.models.batches import TokenGroup

BETA, LEARNING_RATE = 0.1, 1e-5
MIXED = [(40, 90, 60), (310, 120, 210), (75, 30, 180), (150, 260, 35)]
"""Prompt, chosen, rejected: lengths as in a set of chats, each pair different."""


@dataclass
class Settings:
    model: str
    dtype: str
    lengths: str
    num_pairs: int
    num_steps: int
    threads: int


def main() -> None:
    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    torch.set_num_threads(settings.threads)
    CONTESTANTS[name](settings)
    answer(peak_bytes=peak_bytes())


def answer(**values: object) -> None:
    print("@" + json.dumps(values), flush=True)


def wait() -> bool:
    """Until the parent asks for a step; False if it wants no more."""
    return bool(sys.stdin.readline())


class Stopwatch:
    """Answers the parent's requests, one per optimiser step."""

    def start(self) -> None:
        if not wait():
            answer(peak_bytes=peak_bytes())
            sys.exit(0)
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self, loss: float) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        answer(loss=loss, wall_ms=wall * 1e3, cpu_ms=cpu * 1e3)


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) << 10


def make_pairs(settings: Settings, vocab_size: int) -> list[TokenGroup]:
    """One optimiser step's pairs: every step trains on them, so the order has no influence."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(20, vocab_size, (count,), generator=generator).tolist()

    if settings.lengths == "mixed":
        shapes = [MIXED[i % len(MIXED)] for i in range(settings.num_pairs)]
    else:
        prompt, response = map(int, settings.lengths.split("/"))
        shapes = [(prompt, response, response)] * settings.num_pairs
    return [TokenGroup(tokens(p), [tokens(c), tokens(r)]) for p, c, r in shapes]


def load(settings: Settings) -> torch.nn.Module:
    from rlhf_fast.models.language_model import load_causal_lm

    if settings.model == "tiny":
        from tests.tiny import tiny_model

        model = tiny_model(num_hidden_layers=2)
    else:
        model = load_causal_lm(settings.model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def run_rlhf_fast(settings: Settings) -> None:
    from rlhf_fast.memory import reuse_freed_memory
    from rlhf_fast.models.language_model import LanguageModel
    from rlhf_fast.training.fit import OptimizerConfig
    from rlhf_fast.training.preference import DPOConfig, train_preference

    reuse_freed_memory()
    model = LanguageModel(
        load(settings),
        pad_token_id=0,
        precision="bf16" if settings.dtype == "bfloat16" else "fp32",
        micro_batch_tokens=8192,
        row_tokens=512,
    )
    pairs = make_pairs(settings, model.head.weight.shape[0])
    config = OptimizerConfig(
        learning_rate=LEARNING_RATE,
        num_epochs=settings.num_steps,
        batch_size=settings.num_pairs,
        schedule="constant",
    )
    watch = Stopwatch()

    def on_step(row: dict[str, float], total: int) -> None:
        watch.stop(row["loss"])
        if row["step"] < total:
            watch.start()

    watch.start()  # the first step includes the reference, which is not computed again
    train_preference(
        model, pairs, config=DPOConfig(beta=BETA, optimizer=config), seed=0, on_step=on_step
    )


def run_plain(settings: Settings) -> None:
    """The textbook: full logits, one padded row per response, the reference in every step."""
    policy, reference = load(settings), load(settings)
    pairs = make_pairs(settings, policy.config.vocab_size)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    rows = [(g.prompt_ids, g.responses[k]) for k in (0, 1) for g in pairs]
    length = max(len(p) + len(r) for p, r in rows)
    ids = torch.tensor([[*p, *r] + [0] * (length - len(p) - len(r)) for p, r in rows])
    mask = torch.tensor([[len(p) <= i < len(p) + len(r) for i in range(length)] for p, r in rows])
    attended = torch.tensor([[i < len(p) + len(r) for i in range(length)] for p, r in rows])
    ids, mask, attended = (t.to(policy.device) for t in (ids, mask, attended))

    def logps(model):
        with torch.autocast(
            policy.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"
        ):
            logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits
        tokens = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (tokens * mask[:, 1:]).sum(1).view(2, -1)

    watch = Stopwatch()
    for _ in range(settings.num_steps):
        watch.start()
        with torch.no_grad():
            expected = logps(reference)
        ratio = logps(policy) - expected
        loss = -torch.nn.functional.logsigmoid(BETA * (ratio[0] - ratio[1])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.stop(loss.item())


def run_trl(settings: Settings, **changes: object) -> None:
    import tempfile

    import datasets
    import transformers
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # it is tokens already

    watch = Stopwatch()

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            watch.start()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                watch.stop(logs["loss"])

    model = load(settings)
    rows = [
        {"prompt": "", "prompt_ids": g.prompt_ids, "chosen_ids": c, "rejected_ids": r}
        for g in make_pairs(settings, model.config.vocab_size)
        for c, r in [g.responses]
    ]
    with tempfile.TemporaryDirectory() as directory:
        config = trl.DPOConfig(
            output_dir=directory,
            per_device_train_batch_size=settings.num_pairs,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            num_train_epochs=settings.num_steps,
            beta=BETA,
            bf16=settings.dtype == "bfloat16",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            **changes,
        )
        trainer = Trainer(
            model=model,
            ref_model=None if config.precompute_ref_log_probs else load(settings),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=_tokenizer(settings),
            callbacks=[Steps()],
        )
        trainer.train()


def _tokenizer(settings: Settings):
    if settings.model == "tiny":
        from tests.tiny import tiny_tokenizer

        return tiny_tokenizer()
    from rlhf_fast.models.chat import load_tokenizer

    return load_tokenizer(settings.model)


def run_trl_tuned(settings: Settings, **changes: object) -> None:
    """The settings that make it fastest on a CPU: its parent also tunes malloc for it."""
    torch.set_float32_matmul_precision("medium")  # oneDNN, exact where there are no tiles
    run_trl(settings, gradient_checkpointing=False, **changes)


CONTESTANTS: dict[str, Callable[[Settings], None]] = {
    "rlhf_fast": run_rlhf_fast,
    "plain": run_plain,
    "trl": run_trl,
    "trl_tuned": run_trl_tuned,
    "trl_tuned_reference_once": lambda s: run_trl_tuned(s, precompute_ref_log_probs=True),
}


def available() -> list[str]:
    has_trl = importlib.util.find_spec("trl") is not None
    return [name for name in CONTESTANTS if has_trl or not name.startswith("trl")]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
