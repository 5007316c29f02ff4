"""Iterations of online DPO as this package makes them: one process that stays.

`python -m benchmarks.online_ours SETTINGS` answers with lines of JSON after an `@`: one when it has
loaded everything, then one for each line of its input.
"""

from __future__ import annotations

import sys

from benchmarks.online_parts import BETA, LEARNING_RATE, SEED, Clock, Settings, device, has_vllm


def run(settings: Settings) -> None:
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


if __name__ == "__main__":
    run(Settings.from_json(sys.argv[1]))
