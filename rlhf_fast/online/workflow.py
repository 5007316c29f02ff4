"""The whole workflow: SFT -> reward model -> iterations -> report, each stage resumable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_fast.data import load_demonstrations
from rlhf_fast.endpoint import Endpoint
from rlhf_fast.errors import UserError
from rlhf_fast.generation.chat import resolve_backend
from rlhf_fast.generation.samplers import SAMPLERS
from rlhf_fast.launch import Launch, launched_with
from rlhf_fast.models.names import check_model_name
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.online.evaluate import Evaluator
from rlhf_fast.online.loop import OnlineLoop
from rlhf_fast.online.parts import Parts, compute_of
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.prompts import (
    fitting_prompts,
    load_all_prompts,
    too_long_for_rewards,
    trained_on,
)
from rlhf_fast.online.protocols import Generator, Policy
from rlhf_fast.online.reference import first_reference
from rlhf_fast.online.report import write_report
from rlhf_fast.online.reward_stage import RewardStage
from rlhf_fast.online.reward_training import RewardData
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.plugins import load_function
from rlhf_fast.rewards import FunctionScorer, RewardModelScorer, Scorer
from rlhf_fast.rewards.function import check_signature
from rlhf_fast.rewards.judge import principles_of
from rlhf_fast.rewards.rules import check_rows
from rlhf_fast.rows import RowReport
from rlhf_fast.seeds import derive_seed
from rlhf_fast.training.zero_config import zero_config
from rlhf_fast.types import Prompt


def run_online(config: OnlineConfig, progress: Progress | None = None) -> Path:
    """Starts a new run in `config.output_dir`; returns the path of its report."""
    config.check_complete()
    left_out = RowReport()
    check_sources(config, left_out)
    prompts, evaluation_prompts = load_all_prompts(config, left_out)
    sampler = config.generation.sampler
    SAMPLERS[sampler.kind].check(prompts, sampler, config.data.prompts)
    launch = _launch(config.device)
    _check_alone(config, launch)
    progress = progress or Progress.of(launch)
    rows = left_out.lines()
    options = {"announce": progress.announce, "launch": launch}
    with RunFolder.create(config, rows_left_out=rows, **options) as run:
        for line in rows:
            progress.note(line)
        try:
            return _Workflow(run, config, prompts, evaluation_prompts, progress).run()
        except UserError:
            run.remove_if_unused()
            raise


def resume(path: Path, progress: Progress | None = None) -> Path:
    """Continues a run from its first unfinished stage; returns the path of its report."""
    launch = _launch(device="auto")
    progress = progress or Progress.of(launch)
    run, config = RunFolder.open(path, announce=progress.announce, launch=launch)
    _check_alone(config, launch)
    with run:
        if changes := run.changes(config):
            progress.note(
                f"settings changed since the run began, finished stages keep the old ones: "
                f"{', '.join(changes)}"
            )
        prompts, evaluation_prompts = load_all_prompts(config)
        return _Workflow(run, config, prompts, evaluation_prompts, progress).run()


def _launch(device: str) -> Launch:
    """The processes that share the work; refuses a configuration of theirs before any."""
    if launched_with("DEEPSPEED"):
        zero_config()
    return Launch.of_environment(device)


def _check_alone(config: OnlineConfig, launch: Launch) -> None:
    """Raises for what one process alone can do."""
    if launch.num_processes == 1:
        return
    if any(source.judge.policy for source in (config.reward, *config.reward.parts)):
        raise UserError(
            "reward.judge.policy asks the generator while the main process scores: run it in one "
            "process"
        )
    if config.overlap:
        raise UserError(
            f"overlap samples in a thread beside the update, which {launch.num_processes} "
            f"processes share: leave it out, or run one process with generation.backend server"
        )


def check_sources(config: OnlineConfig, left_out: RowReport) -> None:
    """Reads every file, imports every function, looks for every model and server's key once, so a
    mistake shows before any work; with data.bad_rows `count` it is counted in `left_out`."""
    reward, data, generation = config.reward, config.data, config.generation
    functions = [reward.function, reward.labeller, reward.composition.gate]
    functions += [part.function for part in reward.parts]
    for name in (*functions, config.evaluation.judge, generation.sampler.function):
        if name:
            load_function(name)
    for judge in (reward.judge, *(part.judge for part in reward.parts)):
        if judge.url:
            Endpoint(judge.url, api_key_env=judge.api_key_env)
    if generation.server_url:
        Endpoint(generation.server_url)
    draws = config.lora.rank and config.lora.dropout
    if config.overlap and draws and resolve_backend(generation.backend) == "vllm":
        raise UserError(
            f"overlap: vLLM draws from the process's random numbers while adapters train with "
            f"dropout, got lora.dropout {config.lora.dropout}: set it to 0, or "
            f"generation.backend to hf or server"
        )
    models = {
        "evaluation.reward_model": config.evaluation.reward_model,
        "rl.critic.model": config.rl.critic.model,
        **reward.model_names(),
        **{f"reference.models[{i}]": name for i, name in enumerate(config.reference.models)},
    }
    for argument, name in models.items():
        if name and name != "sft":
            check_model_name(name, argument)
    if reward.pairs or reward.scores:
        rows = RewardData.load(reward.pairs, reward.scores, **data.reading(left_out))
        rows.check(reward.training)
    if data.demonstrations:
        load_demonstrations(data.demonstrations, **data.reading(left_out))


class _Workflow:
    def __init__(
        self,
        run: RunFolder,
        config: OnlineConfig,
        prompts: Sequence[Prompt],
        evaluation_prompts: Sequence[Prompt],
        progress: Progress,
    ) -> None:
        self.run_folder = run
        self.config = config
        self.progress = progress
        self.compute = compute_of(config)
        self.parts = Parts(config.model, self.compute, config.condition, run.launch)
        self.prompts = self._fitting(prompts)
        self.evaluation_prompts = self._fitting(evaluation_prompts)

    def run(self) -> Path:
        run, config = self.run_folder, self.config
        if (config.data.prompts_per_iteration or 0) > len(self.prompts):
            self.progress.note(
                f"data.prompts_per_iteration is {config.data.prompts_per_iteration}, but there are "
                f"{len(self.prompts)} prompts: every iteration takes all of them"
            )
        self._check_functions()
        every = [*self.prompts, *self.evaluation_prompts]
        for note in too_long_for_rewards(every, config, self.parts.model_path):
            self.progress.note(note)
        if shared := trained_on(self.evaluation_prompts, self.prompts):
            self.progress.note(
                f"{shared} of {len(self.evaluation_prompts)} held-out prompts are trained on, too: "
                f"what is measured on them says little about others"
            )
        sft_path = self._sft()
        reference = first_reference(run, config.reference, sft_path)
        asks_policy = any(s.judge.policy for s in (config.reward, *config.reward.parts))
        generator = self.parts.generator(
            sft_path,
            config.generation,
            seed=config.seed,
            prompts=[] if asks_policy else every,
            reference=reference,
        )
        rewards = RewardStage(
            run,
            config,
            sft_path,
            prompts=self.prompts,
            evaluation_prompts=self.evaluation_prompts,
            generator=generator,
            compute=self.compute,
            progress=self.progress,
        )
        scorer = rewards.scorer()
        policy = self.parts.policy(
            sft_path,
            reference,
            config,
            seed=derive_seed(config.seed, "critic"),
            on_step=self.progress.step,
            sampling=config.generation.sampling,
        )
        finished = len(run.metrics()) - 1
        if 0 < finished < config.num_iterations:
            self._continue_from(run.path / f"iteration_{finished}", policy, generator)
        sampler = config.generation.sampler
        loop = OnlineLoop(
            run,
            config,
            self.prompts,
            generator=SAMPLERS[sampler.kind](generator, sampler),
            scorer=scorer,
            policy=policy,
            evaluator=self._evaluator(generator, scorer),
            sft_path=sft_path,
            refreshed=rewards.refreshed if config.reward.refresh.labels else None,
        )
        loop.run_iterations()
        generator.close()
        self.progress.summary(run.metrics())
        self.progress.model(run.path / f"iteration_{config.num_iterations}" / "policy")
        return run.launch.on_main(lambda: write_report(run.path))

    def _fitting(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        kept = fitting_prompts(prompts, self.config, self.parts.chat, self.parts.model_path)
        if left_out := len(prompts) - len(kept):
            limit = self.config.data.max_prompt_tokens
            self.progress.note(
                f"{left_out} of {len(prompts)} prompts are left out: more than {limit} tokens"
            )
        return kept

    def _check_functions(self) -> None:
        reward, prompts = self.config.reward, [*self.prompts, *self.evaluation_prompts]
        for source in (reward, *reward.parts):
            if source.function:
                check_signature(source.function, prompts, per_token=source.per_token)
            check_rows(source.rule, prompts)
            for prompt in prompts if source.judge.is_given else ():
                principles_of(prompt, source.judge)
        for name in (reward.labeller, self.config.evaluation.judge):
            if name:
                check_signature(name, prompts)

    def _continue_from(self, folder: Path, policy: Policy, generator: Generator) -> None:
        policy.load(folder / "policy")
        if (folder / "reference").is_dir():
            policy.load_reference(folder / "reference")
        generator.load_weights(policy)

    def _evaluator(self, generator: Generator, scorer: Scorer) -> Evaluator:
        config = self.config
        return Evaluator(
            self.run_folder,
            self.evaluation_prompts,
            generator=generator,
            scorer=scorer,
            judge=self._judge(),
            num_generations=config.evaluation.num_generations,
            seed=config.seed,
            starts_at_reference=config.reference.rule != "soup",
        )

    def _judge(self) -> Scorer | None:
        evaluation = self.config.evaluation
        if evaluation.judge:
            return FunctionScorer(evaluation.judge)
        if evaluation.reward_model:
            return RewardModelScorer(self.compute.reward_model(evaluation.reward_model))
        return None

    def _sft(self) -> Path | str:
        """Fine-tunes on the demonstrations; without any, the model itself is the SFT model."""
        config = self.config
        if not config.data.demonstrations:
            return self.parts.model_path
        demonstrations = load_demonstrations(config.data.demonstrations, **config.data.reading())
        seed = derive_seed(config.seed, "sft")
        return self.run_folder.directory(
            "sft/model",
            lambda path: self.parts.train_sft(
                path,
                demonstrations,
                config.sft,
                seed=seed,
                on_step=self.progress.step,
                log=path.parent / "training.jsonl",
            ),
            lambda path: path,
        )
