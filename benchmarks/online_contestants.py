"""One iteration of online DPO, ours and its rival's, for the benchmark `online`.

Ours is one process that stays. The rival is written as scripts are that use TRL and vLLM: every
stage of every iteration is a process of its own, which loads its model, works and writes a file.

`python -m benchmarks.online_contestants WHAT SETTINGS` answers with lines of JSON after an `@`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

BETA, LEARNING_RATE = 0.1, 1e-5
SEED = 0


@dataclass
class Settings:
    model: str
    reward_model: str
    folder: str
    """prompts.jsonl, and what the contestants hand to each other."""
    generations: int
    new_tokens: int
    temperature: float
    batch: int
    """Pairs per optimiser step; the rival also scores this many responses at a time."""
    micro_batch: int
    """Pairs that the rival computes at a time."""
    micro_batch_tokens: int
    """Tokens that ours computes at a time: about as many."""
    epochs: int

    @property
    def path(self) -> Path:
        return Path(self.folder)

    def iteration(self, number: int, who: str) -> Path:
        path = self.path / f"iteration_{number}" / who
        path.mkdir(parents=True, exist_ok=True)
        return path

    def prompts(self) -> list:
        from rlhf_fast.types import prompt_from_json

        return [prompt_from_json(row) for row in read(self.path / "prompts.jsonl")]

    def latest(self, number: int) -> str:
        """The rival's policy before an iteration."""
        return str(self.iteration(number - 1, "rival") / "policy") if number > 1 else self.model


class Clock:
    """Seconds by the name of what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def answer(self, **facts: object) -> None:
        print("@" + json.dumps({"seconds": dict(self.seconds), **facts}), flush=True)
        self.seconds.clear()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


# ---- ours ----------------------------------------------------------------------------------------


def run_rlhf_fast(settings: Settings) -> None:
    """Loads everything once, then makes an iteration for each line of its input."""
    clock = Clock()
    with clock("process start"):
        from rlhf_fast.generation.sampling import SamplingConfig
        from rlhf_fast.memory import reuse_freed_memory
        from rlhf_fast.online.config import GenerationConfig, OnlineConfig
        from rlhf_fast.online.parts import Parts
        from rlhf_fast.rewards import Compute, RewardModelScorer
        from rlhf_fast.training.fit import OptimizerConfig
        from rlhf_fast.training.preference import DPOConfig

        reuse_freed_memory()
    compute = Compute(device(), micro_batch_tokens=settings.micro_batch_tokens)
    parts = Parts(settings.model, compute)
    sampling = SamplingConfig(temperature=settings.temperature, max_new_tokens=settings.new_tokens)
    with clock("engine start"):
        generation = GenerationConfig(sampling=sampling)
        prompts = settings.prompts()
        generator = parts.generator(settings.model, generation, seed=SEED, prompts=prompts)
    with clock("loading models"):
        scorer = RewardModelScorer(compute.reward_model(settings.reward_model))
        optimizer = OptimizerConfig(
            learning_rate=LEARNING_RATE,
            num_epochs=settings.epochs,
            batch_size=settings.batch,
            schedule="constant",
        )
        config = OnlineConfig(dpo=DPOConfig(beta=BETA, optimizer=optimizer))
        policy = parts.policy(
            settings.model, settings.model, config, seed=SEED, on_step=lambda row, total: None
        )
    time_the_reference(clock)
    clock.answer(engine="vLLM" if has_vllm() else "transformers")
    for number, _ in enumerate(sys.stdin, 1):
        iterate(settings, number, clock, generator, scorer, policy)


def time_the_reference(clock: Clock) -> None:
    """It is computed within the update; its time is taken off that of the training."""
    from rlhf_fast.training import preference

    reference_logps = preference.reference_logps

    def timed(*args, **kwargs):
        with clock("reference"):
            return reference_logps(*args, **kwargs)

    preference.reference_logps = timed


def iterate(settings: Settings, number: int, clock: Clock, generator, scorer, policy) -> None:
    from rlhf_fast.io import write_jsonl
    from rlhf_fast.online.selectors import SelectionConfig, select
    from rlhf_fast.types import to_json

    folder = settings.iteration(number, "rlhf_fast")
    with clock("generation"):
        groups = generator.generate(
            settings.prompts(), num_generations=settings.generations, seed=number
        )
    with clock("scoring"):
        scored = scorer.score(groups)
    with clock("selection"):
        pairs = select(scored, SelectionConfig(), seed=SEED)
    with clock("training"):
        rows = policy.update(pairs, seed=SEED)
    clock.seconds["training"] -= clock.seconds["reference"]
    with clock("saving"):
        write_jsonl(folder / "scored.jsonl", map(to_json, scored))
        write_jsonl(folder / "pairs.jsonl", map(to_json, pairs))
        policy.save(folder / "policy")
    with clock("weight update"):
        generator.load_weights(policy)
    tokens = sum(len(c.token_ids) for group in groups for c in group)
    clock.answer(tokens=tokens, pairs=len(pairs), losses=[row["loss"] for row in rows])


# ---- the rival: each function is a process -------------------------------------------------------


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
    pairs = read(settings.iteration(number, "rlhf_fast") / "pairs.jsonl")
    rows = [
        {
            "prompt": "",
            "prompt_ids": pair["chosen"]["prompt_token_ids"],
            "chosen_ids": pair["chosen"]["token_ids"],
            "rejected_ids": pair["rejected"]["token_ids"],
        }
        for pair in pairs
    ]
    folder, losses = settings.iteration(number, "rival"), []

    class DPOTrainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # it is tokens already

    class Losses(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    with clock("loading models"):
        before = (
            settings.iteration(number - 1, "rival") / "policy" if number > 1 else settings.model
        )
        load = transformers.AutoModelForCausalLM.from_pretrained
        policy, reference = (
            load(before, dtype=torch.float32),
            load(settings.model, dtype=torch.float32),
        )
        watch_reference(reference, clock)
        config = trl.DPOConfig(
            output_dir=str(folder / "trainer"),
            beta=BETA,
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=settings.batch // settings.micro_batch,
            num_train_epochs=settings.epochs,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_length=None,
            # Its default recomputes the activations; a model this small need not.
            gradient_checkpointing=False,
            bf16=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=SEED,
        )
        trainer = DPOTrainer(
            policy,
            ref_model=reference,
            args=config,
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


def watch_reference(model: torch.nn.Module, clock: Clock) -> None:
    """Times its forwards."""
    starts = []
    model.register_forward_pre_hook(lambda *args: starts.append(time.perf_counter()))

    def stop(*args) -> None:
        clock.seconds["reference"] += time.perf_counter() - starts.pop()

    model.register_forward_hook(stop)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    what, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    if what == "rlhf_fast":
        run_rlhf_fast(settings)
    else:
        {"generate": generate, "score": score, "train": train}[what](settings, int(sys.argv[3]))


if __name__ == "__main__":
    main()
