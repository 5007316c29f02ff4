"""vLLM as an in-process library: token ids in, sampled tokens out, weights replaced in place."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.generation.sampling import SamplingConfig, check_finite
from rlhf_fast.generation.vllm_process import (
    apart_from_launch,
    context_length,
    import_vllm,
    platform_defaults,
    process_group_exists,
    process_state_kept,
)
from rlhf_fast.generation.weights import checkpoint_names, prompt_seed, save_shards
from rlhf_fast.models.names import model_directory
from rlhf_fast.types import Completion, Prompt


class VLLMGenerator:
    """Samples responses with vLLM, in the trainer's process unless several workers are asked for
    or that process is one of a launch.

    Environment variables that vLLM reads are set for this process where the user has not set
    them (no usage telemetry, the engine in this process; on a CPU also no thread binding). On a
    CPU the KV cache is sized for 64 responses. Remote code is never trusted. Construction and
    generation leave the process's random state, its number of threads and
    ``torch.set_num_threads`` as they found them.

    Args:
        model_path: folder of a model and its tokenizer as ``save_pretrained`` writes them.
        sampling: settings used where ``generate`` is given none.
        stop_token_ids: the tokens that end a response. The model's own EOS ends it only if listed.
        seed: the engine's seed. Samples depend on the seed given to ``generate`` instead.
        dtype: of weights and activations, ``"bfloat16"`` or ``"float32"`` or ``"float16"``.
        max_model_len: tokens of prompt and response together; ``None``, and at most: as the model
            declares. The shorter, the less memory for keys and values.
        engine_options: passed to ``vllm.LLM``, over the defaults chosen here.

    Raises:
        UserError: vLLM is not installed, or it refuses the model or the options.
    """

    def __init__(
        self,
        model_path: str,
        *,
        sampling: SamplingConfig,
        stop_token_ids: list[int],
        seed: int,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        engine_options: dict | None = None,
    ) -> None:
        self.sampling = sampling
        self.stop_token_ids = list(stop_token_ids)
        self._owns_process_group = not process_group_exists()
        vllm = import_vllm()
        max_model_len = context_length(str(model_path), max_model_len)
        options = {
            **platform_defaults(
                str(model_path), sampling.max_new_tokens, dtype=dtype, max_model_len=max_model_len
            ),
            "seed": seed,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "generation_config": "vllm",
            "disable_log_stats": True,
            **(engine_options or {}),
            "trust_remote_code": False,
            "worker_extension_cls": f"{__name__}.WorkerExtension",
        }
        with process_state_kept(), apart_from_launch():
            try:
                self._llm = vllm.LLM(model=str(model_path), **options)
            except (ValueError, OSError, RuntimeError, TypeError) as error:
                raise UserError(
                    f"vllm: the engine must start on model {model_path}, got {error}; "
                    "check the model folder and engine_options (memory: gpu_memory_utilization, "
                    "on a CPU VLLM_CPU_KVCACHE_SPACE; length: max_model_len)"
                ) from error
        self._tokenizer = self._llm.get_tokenizer()
        config = self._llm.llm_engine.vllm_config
        self.max_model_len: int = config.model_config.max_model_len
        self._is_tied = _ties_word_embeddings(config.model_config.hf_config)
        self._is_in_process = _runs_in_process(config.parallel_config)
        self._expected_names = checkpoint_names(model_directory(model_path))

    def generate(
        self,
        prompts: list[Prompt],
        prompt_token_ids: list[list[int]],
        *,
        num_generations: int,
        seed: int,
        sampling: SamplingConfig | None = None,
    ) -> list[list[Completion]]:
        """Sample one group of ``num_generations`` responses per prompt, in the prompts' order.

        Prompts come as token ids and nothing is added to them (no second BOS). Response i of a
        prompt draws from a random stream of its own, seeded by ``(seed, prompt.id, i)``, so its
        noise does not depend on the other prompts, their order or ``num_generations``. The same
        call on the same machine gives the same samples. vLLM does not promise more: in another
        batch the matrix products may round differently, which can change a near tie, and from
        there on the response.

        ``sampling_logps`` are the model's own log-probabilities (softmax of the raw logits in
        fp32, before temperature, top-k and top-p: vLLM's ``raw_logprobs``), not those of the
        distribution that was sampled from. In bf16 they differ from an fp32 model's by a few
        hundredths.

        Temperature 0 decodes greedily: once per prompt, and the group repeats that response.
        vLLM raises temperatures between 0 and 0.01 to 0.01.

        Raises:
            UserError: a prompt is empty, or does not fit ``max_model_len`` together with
                ``max_new_tokens``. Nothing has been generated then; no prompt is ever dropped.
        """
        sampling = sampling or self.sampling
        self._check_lengths(prompts, prompt_token_ids, sampling)
        if not prompts:
            return []
        params = [self._sampling_params(sampling, num_generations, seed, p) for p in prompts]
        inputs = [{"prompt_token_ids": list(ids)} for ids in prompt_token_ids]
        outputs = self._sampled(inputs, params)
        groups = []
        for prompt, ids, output in zip(prompts, prompt_token_ids, outputs):
            group = [self._completion(prompt, ids, sample) for sample in output.outputs]
            groups.append(group * num_generations if sampling.temperature == 0 else group)
        return groups

    def _sampled(self, inputs: list[dict], params: list[Any]) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            with process_state_kept():
                return self._llm.generate(inputs, params, use_tqdm=False)
        except (EngineDeadError, RuntimeError) as error:
            raise UserError(
                f"vllm: the engine must live while it samples, got {type(error).__name__}: "
                f"{error}; the stages before are saved: give it memory or another model, then "
                f"continue with `rlhf-fast resume RUN`"
            ) from error

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights in place by tensors named as in the model's safetensors files.

        Tensors on any device and of any float dtype; they are cast to the engine's. Where the
        word embedding is tied, ``lm_head.weight`` may be there and is skipped. In-process
        engines read the tensors from memory; engines with worker processes read safetensors
        files that are written to the temporary folder and removed (all workers must see it).

        Raises:
            UserError: a weight of the model is missing (the engine would keep the old one).
        """
        named = [(name, t.detach()) for name, t in named_tensors if not self._is_tied_head(name)]
        self._check_names({name for name, _ in named})
        with process_state_kept():
            if self._is_in_process:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
            else:
                self._reload_from_files(named)
            if self._is_tied:
                self._llm.collective_rpc("refresh_tied_head")
        # Cached keys and values of shared prefixes were computed by the old weights.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vllm: reset_prefix_cache must succeed after a weight update")

    def close(self) -> None:
        """Stop the engine and free its memory; a second call does nothing."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._tokenizer = None
        if self._owns_process_group:
            cleanup_dist_env_and_memory()
        gc.collect()

    def _sampling_params(
        self, sampling: SamplingConfig, num_generations: int, seed: int, prompt: Prompt
    ) -> Any:
        from vllm import SamplingParams

        is_greedy = sampling.temperature == 0
        return SamplingParams(
            n=1 if is_greedy else num_generations,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=None if is_greedy else prompt_seed(seed, prompt.id),
            stop_token_ids=self.stop_token_ids,
            # Otherwise the EOS of the model's files would also stop, listed or not.
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )

    def _completion(self, prompt: Prompt, prompt_ids: list[int], sample: Any) -> Completion:
        token_ids = list(sample.token_ids)
        logps = [at[t].logprob for t, at in zip(token_ids, sample.logprobs)]
        check_finite(logps, "vllm", prompt)
        return Completion(
            prompt=prompt,
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
            prompt_token_ids=list(prompt_ids),
            token_ids=token_ids,
            finished=sample.finish_reason == "stop",
            sampling_logps=logps,
        )

    def _check_lengths(
        self, prompts: list[Prompt], prompt_token_ids: list[list[int]], sampling: SamplingConfig
    ) -> None:
        if len(prompts) != len(prompt_token_ids):
            raise UserError(
                "vllm: every prompt must come with its token ids, "
                f"got {len(prompts)} prompts and {len(prompt_token_ids)} lists of token ids"
            )
        for prompt, ids in zip(prompts, prompt_token_ids):
            if not ids:
                raise UserError(f"vllm: prompt {prompt.id!r} must have tokens, got none")
            if len(ids) + sampling.max_new_tokens > self.max_model_len:
                raise UserError(
                    f"vllm: prompt {prompt.id!r} and its response must fit in "
                    f"max_model_len={self.max_model_len} tokens, got a prompt of {len(ids)} and "
                    f"max_new_tokens={sampling.max_new_tokens}; shorten or remove the prompt, "
                    "lower max_new_tokens, or raise max_model_len"
                )

    def _is_tied_head(self, name: str) -> bool:
        return self._is_tied and name == "lm_head.weight"

    def _check_names(self, names: set[str]) -> None:
        missing = sorted(n for n in self._expected_names - names if not self._is_tied_head(n))
        if missing:
            raise UserError(
                f"vllm: load_weights must get every weight of the model, got {len(names)} "
                f"without {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; "
                "name the tensors as in the model's safetensors files"
            )

    def _reload_from_files(self, named: list[tuple[str, Tensor]]) -> None:
        with tempfile.TemporaryDirectory(prefix="rlhf_fast_weights_") as folder:
            save_shards(named, Path(folder))
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})


class WorkerExtension:
    """Methods that vLLM adds to its workers, in whatever process they run."""

    _label_of_weights: str | None = None

    def take_weights(self, weights_path: str, label: str, is_tied: bool) -> None:
        """Replace the weights by those in a folder, which are known by `label` from then on.

        One call, so that no other load comes between weights and label.
        """
        self._label_of_weights = None  # of what a load that fails leaves
        self.reload_weights(weights_path=weights_path)
        if is_tied:
            self.refresh_tied_head()
        self._label_of_weights = label

    def label_of_weights(self) -> str | None:
        """That of the last `take_weights`; None where there was none."""
        return self._label_of_weights

    def refresh_tied_head(self) -> None:
        """Prepare a tied output head again from the embedding that was just reloaded.

        On a CPU the head computes from a packed copy of the shared weight, and
        ``reload_weights`` packs only modules that received tensors: without this the new model
        would answer through the old head.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


def _runs_in_process(parallel_config: Any) -> bool:
    import vllm.envs

    return not vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING and parallel_config.world_size == 1


def _ties_word_embeddings(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
