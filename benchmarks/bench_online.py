"""Online iterations, ours against scripts around TRL and vLLM: seconds of every stage.

Both do the same work: the same model, prompts, samples per prompt and settings. The rival samples
from its own policy; it scores the responses and trains on the pairs that ours has just made, and
rewards and losses must agree before a time is printed. Their iterations alternate, so a busy moment
hits both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from benchmarks import harness
from benchmarks.online_parts import Settings, read, write

STAGES = (
    *("process start", "engine start", "loading models", "generation", "scoring", "selection"),
    *("reference", "training", "saving", "weight update"),
)
WORK = ("scoring", "selection", "reference", "training")
"""Outside generation, without starting, loading and saving."""
REWARD_TOLERANCE, LOSS_TOLERANCE = 0.25, 0.1
"""Of the rewards' deviation, and of the first loss: bf16 rounds differently in every layout."""
ROOT = Path(__file__).resolve().parents[1]
TITLES = {"work": "score to train alone"}
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def run(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = prepare(args, Path(folder))
        ours = Ours(settings, args.python_vllm)
        contestants: list[Ours | Rival] = [ours]
        if can_import("trl", args.python_trl):
            contestants.append(Rival(settings, args))
        else:
            print(f"no TRL in {args.python_trl}: ours runs alone (--python-trl names another)")
        if ours.facts["engine"] != "vLLM":
            print(f"no vLLM in {args.python_vllm}: all sample by transformers' generate instead")
        for number in range(1, args.iterations + 1):
            for contestant in contestants:
                contestant.iterate(number)
                seconds = sum(contestant.iterations[-1]["seconds"].values())
                print(f"iteration {number}, {contestant.name}: {seconds:.1f} s", flush=True)
            if len(contestants) > 1:
                check(number, *contestants)
        ours.finish()
    report(settings, args, contestants)


def prepare(args, folder: Path) -> Settings:
    """Writes the prompts and a reward model: the policy's decoder with a random head."""
    from rlhf_fast.recipes.quickstart import model as quickstart_model
    from rlhf_fast.recipes.quickstart import prompts
    from rlhf_fast.recipes.quickstart_topics import DEMONSTRATIONS

    sizes = {"generations": args.generations, "new_tokens": args.new_tokens}
    sizes |= {"batch": 8, "micro_batch": 2, "micro_batch_tokens": 1024, "epochs": 2}
    model, num_prompts, num_shots = args.model, args.prompts, args.shots
    if args.quick:
        model, num_prompts, num_shots = tiny(folder), 4, 1
        sizes |= {"generations": 3, "new_tokens": 4, "batch": 2, "micro_batch": 1, "epochs": 1}
    elif model == "smollm2":
        model = quickstart_model()
    shown = list(DEMONSTRATIONS.items())[:num_shots]
    context = "".join(f"A sentence about {topic}: {text}\n" for topic, text in shown)
    write(
        folder / "prompts.jsonl",
        [
            {
                "id": row["id"],
                "messages": [{"role": "user", "content": context + row["prompt"]}],
                "metadata": {},
            }
            for row in prompts()[:num_prompts]
        ],
    )
    save_reward_model(model, folder / "reward_model")
    return Settings(model, str(folder / "reward_model"), str(folder), temperature=1.0, **sizes)


def save_reward_model(model: str, folder: Path) -> None:
    import torch
    import transformers

    from rlhf_fast.models.chat import load_tokenizer
    from rlhf_fast.models.checkpoint import save_model
    from rlhf_fast.models.reward_model import HEAD_NAMES, fresh_reward_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    reward_model, tokenizer = fresh_reward_model(model), load_tokenizer(model)
    head = next(getattr(reward_model, name) for name in HEAD_NAMES if hasattr(reward_model, name))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(head.weight, std=head.in_features**-0.5, generator=generator)
    # transformers finds a text's end by the pad token, which must not be the end of a turn.
    others = (i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id)
    reward_model.config.pad_token_id = next(others)
    save_model(folder, reward_model.to(torch.bfloat16), tokenizer)


def tiny(folder: Path) -> str:
    from tests.tiny import tiny_model, tiny_tokenizer

    tiny_model(head_dim=32).save_pretrained(folder / "tiny")  # vLLM has no smaller heads
    tiny_tokenizer().save_pretrained(folder / "tiny")
    return str(folder / "tiny")


def can_import(package: str, python: str) -> bool:
    code = f"import importlib.util as u; raise SystemExit(u.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


class Contestant:
    """Iterations of one side: seconds by stage, and what it answered."""

    name: str
    engine_starts = 0

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log = (settings.path / f"{self.name}.log").open("w+")
        self.start: Counter[str] = Counter()
        self.iterations: list[dict] = []

    def launch(self, python: str, module: str, *arguments: str) -> subprocess.Popen:
        command = [python, "-m", f"benchmarks.{module}"]
        command += [json.dumps(asdict(self.settings)), *arguments]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=ENVIRONMENT,
            cwd=ROOT,
        )

    def answer(self, process: subprocess.Popen) -> dict:
        for line in process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        self.log.seek(0)
        print(self.log.read()[-4000:])
        program = " ".join([process.args[2], *process.args[4:]])
        raise SystemExit(f"{self.name}: {program} ended with {process.wait()}, no answer")

    def seconds(self) -> Counter[str]:
        """Of all iterations, and of the start before them."""
        return sum((Counter(i["seconds"]) for i in self.iterations), Counter(self.start))


class Ours(Contestant):
    """One process, which makes an iteration when asked."""

    name = "rlhf_fast"

    def __init__(self, settings: Settings, python: str) -> None:
        super().__init__(settings)
        begin = time.perf_counter()
        self.process = self.launch(python, "online_ours")
        self.facts = self.answer(self.process)
        self.start = whole(self.facts["seconds"], time.perf_counter() - begin)
        self.engine_starts = 1

    def iterate(self, number: int) -> None:
        begin = time.perf_counter()
        self.process.stdin.write("iterate\n")
        self.process.stdin.flush()
        result = self.answer(self.process)
        result["seconds"] = whole(result["seconds"], time.perf_counter() - begin)
        self.iterations.append(result)

    def finish(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Rival(Contestant):
    """Scripts around TRL and vLLM: every stage of every iteration is a process."""

    name = "trl_vllm"

    def __init__(self, settings: Settings, args) -> None:
        super().__init__(settings)
        self.pythons = {
            "generate": args.python_vllm,
            "score": args.python_trl,
            "train": args.python_trl,
        }

    def iterate(self, number: int) -> None:
        result = {"seconds": Counter()}
        for stage, python in self.pythons.items():
            begin = time.perf_counter()
            process = self.launch(python, "online_rival", stage, str(number))
            facts = self.answer(process)
            process.stdin.close()
            process.wait()
            result["seconds"] += whole(facts.pop("seconds"), time.perf_counter() - begin)
            result |= facts
        self.engine_starts += 1
        self.iterations.append(result)


def whole(seconds: dict[str, float], wall: float) -> Counter[str]:
    """What no stage took was spent on starting the process and ending it."""
    rest = wall - sum(seconds.values())
    return Counter(seconds) + Counter({"process start": max(rest, 0.0)})


def check(number: int, ours: Ours, rival: Rival) -> None:
    """Stops where the two do not compute the same."""
    groups = read(ours.settings.iteration(number, ours.name) / "scored.jsonl")
    pairs = list(zip((g["rewards"] for g in groups), rival.iterations[-1]["rewards"], strict=True))
    spread = statistics.pstdev([x for row, _ in pairs for x in row])
    off = max(abs(x - y) for mine, theirs in pairs for x, y in zip(mine, theirs, strict=True))
    if off > REWARD_TOLERANCE * spread:
        raise SystemExit(f"iteration {number}: rewards differ by {off}; they deviate by {spread}")
    mine, theirs = (c.iterations[-1]["losses"] for c in (ours, rival))
    if len(mine) != len(theirs) or abs(mine[0] - theirs[0]) > LOSS_TOLERANCE * theirs[0]:
        raise SystemExit(f"iteration {number}: losses {mine} against {theirs}")


def summary(contestant: Contestant, settings: Settings) -> dict[str, object]:
    seconds = contestant.seconds()
    later = [sum(i["seconds"].values()) for i in contestant.iterations[1:]]
    outside = sum(seconds.values()) - seconds["generation"]
    return {
        **harness.describe(),
        "model": Path(settings.model).name,
        "batch": settings.generations * len(contestant.iterations[0]["losses"]),
        "contestant": contestant.name,
        "runs": len(contestant.iterations),
        "median_ms": round(1e3 * statistics.median(later or [sum(seconds.values())]), 1),
        "outside_generation_s": round(outside, 2),
        "work_s": round(sum(seconds[name] for name in WORK), 2),
        "engine_starts": contestant.engine_starts,
        "sampled_tokens": sum(iteration["tokens"] for iteration in contestant.iterations),
        **{f"{name.replace(' ', '_')}_s": round(seconds[name], 2) for name in STAGES},
    }


def report(settings: Settings, args, contestants: list[Contestant]) -> None:
    rows = [summary(contestant, settings) for contestant in contestants]
    facts = [contestant.iterations[-1] for contestant in contestants]
    steps = len(facts[0]["losses"])
    print(
        f"\n{args.iterations} iterations: {facts[0]['pairs']} prompts x {settings.generations} "
        f"responses of up to {settings.new_tokens} tokens, {steps} steps of DPO"
    )
    if len(rows) > 1:
        print("rewards and losses agree")
    print(f"  {'seconds':24}" + "".join(f"{row['contestant']:>12}" for row in rows))
    for name in (*STAGES, "outside generation", "work"):
        values = [row[f"{name.replace(' ', '_')}_s"] for row in rows]
        line = f"  {TITLES.get(name, name):24}" + "".join(f"{value:12.2f}" for value in values)
        print(line + (f"{values[0] / values[1]:8.2f}" if len(values) > 1 and values[1] else ""))
    print(f"  {'engine starts':24}" + "".join(f"{row['engine_starts']:12}" for row in rows))
    tokens = [fact["tokens"] for fact in facts]
    print(f"  {'tokens, last iteration':24}" + "".join(f"{count:12}" for count in tokens))
    if args.save:
        print(f"\nwritten to {harness.record('online', rows)}")
