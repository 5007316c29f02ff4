"""One contestant of the training benchmark, in a process of its own.

`python -m benchmarks.training_contestants NAME SETTINGS` prepares itself, then makes an optimiser
step for each line it reads and answers as `stopwatch.py` says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.stopwatch import Stopwatch, answer, peak_bytes
from rlhf_fast.models.batches import TokenGroup

BETA, LEARNING_RATE = 0.1, 1e-5
PAD = 0  # no pair holds it
MEDIANS, SPREAD, LIMIT = (100, 120, 120), 0.8, 400
"""Of the lengths `mixed`: prompt, chosen, rejected log-normal and independent, as in a set of chats
from short questions to pasted documents; the logarithms' standard deviation; the longest."""


@dataclass
class Settings:
    task: str  # dpo, reward or sft (on the chosen responses)
    model: str
    dtype: str
    lengths: str
    num_pairs: int
    num_steps: int
    threads: int


def main() -> None:
    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    torch.set_num_threads(settings.threads)
    parts = CONTESTANTS[name](settings)
    answer(peak_bytes=peak_bytes(), parts=parts() if parts else {})


def make_pairs(settings: Settings, vocab_size: int) -> list[TokenGroup]:
    """One optimiser step's pairs: every step trains on them, so the order has no influence."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(20, vocab_size, (count,), generator=generator).tolist()

    if settings.lengths == "mixed":
        factors = torch.randn(settings.num_pairs, 3, generator=generator).mul_(SPREAD).exp_()
        lengths = (torch.tensor(MEDIANS) * factors).round_().clamp_(4, LIMIT)
        shapes = [tuple(map(int, row)) for row in lengths]
    else:
        prompt, response = map(int, settings.lengths.split("/"))
        shapes = [(prompt, response, response)] * settings.num_pairs
    pairs = [TokenGroup(tokens(p), [tokens(c), tokens(r)]) for p, c, r in shapes]
    if settings.task == "sft":
        return [TokenGroup(pair.prompt_ids, pair.responses[:1]) for pair in pairs]
    return pairs


def load(settings: Settings) -> torch.nn.Module:
    from rlhf_fast.models.language_model import load_causal_lm
    from tests.tiny import tiny_config, tiny_model

    if settings.task == "reward":
        torch.manual_seed(0)
        kind, options = AutoModelForSequenceClassification, {"num_labels": 1}
        if settings.model == "tiny":
            model = kind.from_config(tiny_config(**options), dtype=torch.float32)
        else:
            model = kind.from_pretrained(settings.model, dtype=torch.float32, **options)
        model.config.pad_token_id = PAD
    elif settings.model == "tiny":
        model = tiny_model()
    else:
        model = load_causal_lm(settings.model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def run_rlhf_fast(settings: Settings, **changes: object) -> Callable[[], dict[str, float]]:
    from benchmarks.training_parts import parts_of_a_step
    from rlhf_fast.memory import reuse_freed_memory
    from rlhf_fast.models.language_model import LanguageModel
    from rlhf_fast.models.reward_model import RewardModel
    from rlhf_fast.training.fit import OptimizerConfig
    from rlhf_fast.training.preference import DPOConfig, train_preference
    from rlhf_fast.training.reward import RewardTrainingConfig, train_reward_model
    from rlhf_fast.training.sft import train_sft

    reuse_freed_memory()
    options = {
        "precision": "bf16" if settings.dtype == "bfloat16" else "fp32",
        "micro_batch_tokens": 8192,
        "row_tokens": 8192,
        **changes,
    }
    model = load(settings)
    pairs = make_pairs(settings, model.config.vocab_size)
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

    if settings.task == "reward":
        reward_model = RewardModel(model, tokenizer(settings), **options)
        training = RewardTrainingConfig(holdout_share=0.0, optimizer=config)
        watch.start()
        train_reward_model(reward_model, pairs, config=training, seed=0, on_step=on_step)
        return lambda: parts_of_a_step(reward_model, pairs, config)
    policy = LanguageModel(model, pad_token_id=PAD, **options)
    dpo = DPOConfig(beta=BETA, optimizer=config)
    watch.start()  # the first step includes the reference, which is not computed again
    if settings.task == "sft":
        train_sft(policy, pairs, config=config, seed=0, on_step=on_step)
    else:
        train_preference(policy, pairs, config=dpo, seed=0, on_step=on_step)
    return lambda: parts_of_a_step(policy, pairs, config)


def run_plain(settings: Settings) -> None:
    """The textbook: full logits, one padded row per response, the reference in every step."""
    policy = load(settings)
    reference = load(settings) if settings.task == "dpo" else None
    pairs = make_pairs(settings, policy.config.vocab_size)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    rows = [(g.prompt_ids, g.responses[k]) for k in range(len(pairs[0].responses)) for g in pairs]
    length = max(len(p) + len(r) for p, r in rows)
    ids = torch.tensor([[*p, *r] + [0] * (length - len(p) - len(r)) for p, r in rows])
    mask = torch.tensor([[len(p) <= i < len(p) + len(r) for i in range(length)] for p, r in rows])
    attended = torch.tensor([[i < len(p) + len(r) for i in range(length)] for p, r in rows])
    ids, mask, attended = (t.to(policy.device) for t in (ids, mask, attended))

    def scores(model):
        """[2, P] log-probabilities or rewards of chosen and rejected; [1, P] for sft."""
        with torch.autocast(
            policy.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"
        ):
            logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits
        if settings.task == "reward":
            return logits.float().view(2, -1)
        tokens = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (tokens * mask[:, 1:]).sum(1).view(len(pairs[0].responses), -1)

    def loss_of_step() -> torch.Tensor:
        if settings.task == "sft":
            return -scores(policy).sum() / mask.sum()
        chosen, rejected = scores(policy)
        margin = chosen - rejected
        if reference is not None:
            with torch.no_grad():
                chosen, rejected = scores(reference)
            margin = BETA * (margin - (chosen - rejected))
        return -torch.nn.functional.logsigmoid(margin).mean()

    watch = Stopwatch()
    for _ in range(settings.num_steps):
        watch.start()
        loss = loss_of_step()
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

    class DPOTrainer(trl.DPOTrainer):
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
    rows = []
    for group in make_pairs(settings, model.config.vocab_size):
        chosen, rejected = group.responses[0], group.responses[-1]
        if settings.task == "sft":
            labels = [-100] * len(group.prompt_ids) + chosen
            rows.append({"input_ids": [*group.prompt_ids, *chosen], "labels": labels})
        elif settings.task == "reward":
            chosen, rejected = ([*group.prompt_ids, *ids] for ids in (chosen, rejected))
            rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
        else:
            ids = {"prompt_ids": group.prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}
            rows.append({"prompt": "", **ids})
    with tempfile.TemporaryDirectory() as directory:
        common = {
            "output_dir": directory,
            "per_device_train_batch_size": settings.num_pairs,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "num_train_epochs": settings.num_steps,
            "weight_decay": 0.0,
            "bf16": settings.dtype == "bfloat16",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": False,
            **changes,
        }
        data = {
            "model": model,
            "train_dataset": datasets.Dataset.from_list(rows),
            "processing_class": tokenizer(settings),
            "callbacks": [Steps()],
        }
        if settings.task == "dpo":
            config = trl.DPOConfig(beta=BETA, **common)
            reference = None if config.precompute_ref_log_probs else load(settings)
            trainer = DPOTrainer(ref_model=reference, args=config, **data)
        elif settings.task == "sft":
            config = trl.SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **common)
            trainer = trl.SFTTrainer(args=config, **data)
        else:
            trainer = trl.RewardTrainer(args=trl.RewardConfig(**common), **data)
        trainer.train()


def tokenizer(settings: Settings):
    if settings.model == "tiny":
        from tests.tiny import tiny_tokenizer

        return tiny_tokenizer()
    from rlhf_fast.models.chat import load_tokenizer

    return load_tokenizer(settings.model)


def run_trl_tuned(settings: Settings, **changes: object) -> None:
    """The settings that make it fastest on a CPU: its parent also tunes malloc for it."""
    torch.set_float32_matmul_precision("medium")  # oneDNN, exact where there are no tiles
    run_trl(settings, gradient_checkpointing=False, **changes)


CONTESTANTS: dict[str, Callable[[Settings], Callable[[], dict[str, float]] | None]] = {
    "rlhf_fast": run_rlhf_fast,
    "rlhf_fast_checkpointing": lambda s: run_rlhf_fast(s, gradient_checkpointing=True),
    "plain": run_plain,
    "trl": run_trl,
    "trl_tuned": run_trl_tuned,
    "trl_tuned_reference_once": lambda s: run_trl_tuned(s, precompute_ref_log_probs=True),
}


def available(task: str) -> list[str]:
    has_trl = importlib.util.find_spec("trl") is not None
    names = [name for name in CONTESTANTS if has_trl or not name.startswith("trl")]
    return [name for name in names if task == "dpo" or not name.endswith("reference_once")]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
