"""The whole configuration of a run; it is saved in the run folder, so a run can be repeated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_fast.errors import UserError, refuse_unused
from rlhf_fast.generation.samplers import SamplerConfig
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.models.adapters import AdapterConfig
from rlhf_fast.models.condition import ConditionConfig
from rlhf_fast.online.reward_config import RewardConfig
from rlhf_fast.online.selectors import SelectionConfig
from rlhf_fast.rows import RowOptions
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig
from rlhf_fast.training.rl_config import RLConfig
from rlhf_fast.training.selected import ListConfig
from rlhf_fast.training.unpaired import ScoredUnpairedConfig


@dataclass(frozen=True)
class DataConfig(RowOptions):
    """Prompts and demonstrations: a file, a Hugging Face dataset, or module:function."""

    prompts: str = ""
    """Training prompts: field `prompt` (text or messages) or `messages`."""
    evaluation_prompts: str | None = None
    """Held-out prompts; without them the last `evaluation_share` of the prompts is held out."""
    evaluation_share: float = 0.1
    """Share of the prompts held out when there are no evaluation prompts (at most 200)."""
    demonstrations: str | None = None
    """SFT data (`prompt` and `response`, or `messages`); without it the model is taken as it is."""
    prompts_per_iteration: int | None = None
    """Prompts of one iteration, taken in turn through the shuffled set; None takes all."""
    max_rounds: int = 1
    """Times that an iteration samples at most: after the first time, other prompts take the place
    of those from which nothing was selected (DAPO's dynamic sampling, arXiv 2503.14476)."""
    max_prompt_tokens: int | None = None
    """Longer prompts are left out, and how many is told; None: a prompt that leaves no room for a
    response is an error before any work."""
    accumulate: bool = False
    """Train on everything selected so far instead of on this iteration's selection."""

    def __post_init__(self) -> None:
        if not 0 < self.evaluation_share < 1:
            raise UserError(f"data.evaluation_share must be in (0, 1), got {self.evaluation_share}")
        if self.max_rounds > 1 and not self.prompts_per_iteration:
            raise UserError(
                f"data.max_rounds {self.max_rounds} needs data.prompts_per_iteration: without it "
                f"an iteration samples all prompts at once"
            )
        for name in ("prompts_per_iteration", "max_prompt_tokens", "max_rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be >= 1, got {value}")


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling of responses."""

    backend: Literal["auto", "hf", "vllm", "server"] = "auto"
    """`auto` takes vLLM where it is installed, else transformers' generate. `server` is a vLLM
    server at `server_url`."""
    num_generations: int = 8
    """Responses per prompt."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Temperature and friends."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Weights of the generator's copy of the policy."""
    batch_size: int = 256
    """The most responses that the hf backend decodes together."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """What is sampled for training besides plain responses."""
    server_url: str | None = None
    """Address of the server backend, e.g. http://127.0.0.1:8000/v1; it serves one run at a time."""
    server_model: str | None = None
    """Name of the server's model; None: the model's path."""

    def __post_init__(self) -> None:
        if self.num_generations < 1 or self.batch_size < 1:
            raise UserError(
                f"generation.num_generations and batch_size must be >= 1, "
                f"got {self.num_generations} and {self.batch_size}"
            )
        if (self.backend == "server") != (self.server_url is not None):
            raise UserError("generation: backend server and server_url go together")
        if self.sampler.needs_reference and self.num_generations < 2:
            raise UserError(f"sampler {self.sampler.kind} needs generation.num_generations >= 2")


@dataclass(frozen=True)
class ReferenceConfig:
    """Which model the policy is tied to in each iteration."""

    rule: Literal["sft", "previous", "ema", "soup"] = "sft"
    """sft: the SFT model throughout. previous: the last iteration's policy. ema: a moving average
    of the policies (WARP, arXiv 2406.16768). soup: the weighted mean of `models` (SALSA, arXiv
    2411.01798)."""
    decay: float = 0.5
    """Of ema: reference <- decay * reference + (1 - decay) * policy before each iteration."""
    models: tuple[str, ...] = ()
    """Of soup: model directories; `sft` stands for this run's SFT model."""
    weights: tuple[float, ...] = ()
    """Of soup: one per model; none means equal."""
    extrapolation: float = 0.0
    """Momentum: after its update the policy goes on by this factor times its difference from the
    previous iteration's (APO, arXiv 2410.06293)."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"reference.decay must be in [0, 1), got {self.decay}")
        if (self.rule == "soup") != bool(self.models):
            raise UserError("reference: `models` and rule `soup` go together")
        if self.weights and len(self.weights) != len(self.models):
            raise UserError(
                f"reference: one weight per model, got {len(self.weights)} for {len(self.models)}"
            )
        if self.extrapolation < 0:
            raise UserError(f"reference.extrapolation must be >= 0, got {self.extrapolation}")
        refuse_unused(self, "reference", "rule", {"decay": ("ema",)})


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation after every iteration."""

    judge: str | None = None
    """module:function that judges held-out responses; the policy never learns from it."""
    reward_model: str | None = None
    """Reward model that judges held-out responses instead of a function; it should differ from the
    one that the policy learns from."""
    num_generations: int = 4
    """Sampled responses per held-out prompt."""

    def __post_init__(self) -> None:
        if self.judge and self.reward_model:
            raise UserError("evaluation: give judge or reward_model, got both")
        if self.num_generations < 1:
            raise UserError(f"evaluation.num_generations must be >= 1, got {self.num_generations}")


@dataclass(frozen=True)
class OnlineConfig:
    """Online iterative RLHF (arXiv 2405.07863)."""

    model: str = ""
    """Model to start from: a directory or a hub name, with a chat template."""
    output_dir: str = "runs/online"
    """Run folder; it must be new or empty."""
    num_iterations: int = 3
    """Rounds of generate, score, select, update."""
    seed: int = 0
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` takes the GPU where there is one."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Matrix products in training and scoring; parameters are float32 in both."""
    micro_batch_tokens: int = 8192
    """Padded tokens computed at once in training and scoring; changes memory, not results."""
    attention: Literal["dense", "flex"] = "dense"
    """`flex` computes packed rows on a GPU with FlexAttention block masks."""
    gradient_checkpointing: bool = False
    """Computes every layer again in backward instead of keeping its states."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts and demonstrations."""
    sft: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-5, batch_size=128)
    )
    """Optimiser of supervised fine-tuning."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Where rewards come from."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Sampling of responses."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which responses the policy learns from."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """Which model the policy is tied to."""
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA: adapters instead of all weights."""
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    """Of algorithm nll: prompts that say how good the answer is to be."""
    overlap: bool = False
    """Sample the next iteration while this one trains, so from weights one update older (arXiv
    2410.18252); its policy is then one step off."""
    algorithm: Literal["dpo", "rl", "nll", "list", "unpaired"] = "dpo"
    """The policy update. dpo: preference losses of selected pairs. rl: policy gradients, nll:
    imitation, list: losses of ranked lists, unpaired: losses of desirable and undesirable ones
    (KTO), all four of selected responses."""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """Of algorithm dpo: the loss and its optimiser."""
    rl: RLConfig = field(default_factory=RLConfig)
    """Of algorithm rl."""
    nll: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-6, batch_size=64)
    )
    """Of algorithm nll."""
    list: ListConfig = field(default_factory=ListConfig)
    """Of algorithm list."""
    unpaired: ScoredUnpairedConfig = field(default_factory=ScoredUnpairedConfig)
    """Of algorithm unpaired."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation."""
    keep_checkpoints: int = 2
    """Iterations whose policy stays on disk, counted from the last; the SFT model always stays."""

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise UserError(f"num_iterations must be >= 1, got {self.num_iterations}")
        if self.keep_checkpoints < 1:
            raise UserError(f"keep_checkpoints must be >= 1, got {self.keep_checkpoints}")
        if (self.algorithm == "dpo") != self.selection.makes_pairs:
            kind = "pairs" if self.algorithm == "dpo" else "responses"
            raise UserError(
                f"algorithm {self.algorithm} learns from {kind}: selection.rule "
                f"{self.selection.rule} does not select them"
            )
        if self.condition.bounds and not (
            self.algorithm == "nll" and self.generation.sampler.keeps_prompts
        ):
            raise UserError(
                f"condition is for algorithm nll and samplers that keep the prompts, got "
                f"{self.algorithm} and generation.sampler.kind {self.generation.sampler.kind}"
            )
        self._check_rounds()
        self._check_rewards()
        is_remax = self.algorithm == "rl" and self.rl.advantage == "remax"
        if is_remax and self.generation.sampler.kind != "greedy_extra":
            raise UserError("rl.advantage remax needs generation.sampler.kind greedy_extra")
        if self.generation.sampler.needs_reference and self.reference.rule in ("previous", "ema"):
            raise UserError(
                f"sampler {self.generation.sampler.kind} mixes with a reference that stays: "
                f"reference.rule must be sft or soup, got {self.reference.rule}"
            )
        if self.lora.rank and (self.reference.rule != "sft" or self.reference.extrapolation):
            raise UserError(
                f"lora: the reference is the model without its adapters, so reference.rule must be "
                f"sft and reference.extrapolation 0, got {self.reference.rule} and "
                f"{self.reference.extrapolation}"
            )
        if self.micro_batch_tokens < 1:
            raise UserError(f"micro_batch_tokens must be >= 1, got {self.micro_batch_tokens}")
        self._check_group_sizes()

    def _check_rounds(self) -> None:
        if self.data.max_rounds == 1:
            return
        if self.overlap or self.selection.rule == "batch_top":
            raise UserError(
                "data.max_rounds above 1 goes by what each prompt gives under the present policy: "
                "leave out overlap, and selection.rule batch_top"
            )
        if self.generation.sampler.kind == "multi_turn":
            raise UserError("data.max_rounds must be 1 with generation.sampler.kind multi_turn")

    def _check_rewards(self) -> None:
        """The sampler must give what the rewards are made from."""
        sampler, reward = self.generation.sampler, self.reward
        rankings = [source.ranking for source in (reward, *reward.parts)]
        if reward.sources() and "opponents" in rankings and not sampler.needs_reference:
            raise UserError(
                f"reward.ranking opponents compares samples of the policy with those of a mixture: "
                f"generation.sampler.kind must be mixture or pilaf, got {sampler.kind}"
            )
        if self.selection.rule == "data_vs_policy" and sampler.kind != "with_response":
            raise UserError(
                f"selection.rule data_vs_policy needs generation.sampler.kind with_response, got "
                f"{sampler.kind}"
            )
        if reward.shaping.baseline_samples and sampler.kind == "multi_turn":
            raise UserError(
                "reward.shaping.baseline_samples is for the prompts of the data: with "
                "generation.sampler.kind multi_turn later turns have no baseline; leave it at 0"
            )

    def _check_group_sizes(self) -> None:
        """There must be enough responses to a prompt for what compares them."""
        count, selection = self.generation.num_generations, self.selection
        if count < selection.min_generations:
            raise UserError(
                f"selection {selection.rule} needs generation.num_generations >= "
                f"{selection.min_generations}, got {count}"
            )
        if selection.own_samples_only and self.generation.sampler.kind == "mixture":
            count -= count // 2
        if self.algorithm == "unpaired" and self.unpaired.min_reward is None and count < 2:
            raise UserError(
                "algorithm unpaired compares a prompt's responses: generation.num_generations must "
                "be >= 2, or unpaired.min_reward given, got 1 and none"
            )
        least = self.rl.least_responses
        if self.algorithm == "rl" and count < least:
            raise UserError(
                f"rl.advantage {self.rl.advantage} compares the policy's responses to a prompt: "
                f"generation.num_generations must give {least} or more of them, got {count}"
            )

    def check_complete(self) -> None:
        """Raises if a value without a default is missing."""
        if not self.model:
            raise UserError("model is missing: give --model DIRECTORY or use --recipe quickstart")
        if not self.data.prompts:
            raise UserError("data.prompts is missing: give --data.prompts FILE")
        if not self.reward.sources():
            raise UserError(
                "no reward: give --reward.model DIRECTORY, --reward.function module:function, "
                "--reward.rule.kind math, --reward.pairs FILE, --reward.judge.url ADDRESS, or "
                "another source of `rlhf-fast online --help reward`"
            )
        self.reward.check_used()
