"""Sampling with transformers' `generate`: works wherever the model does, no other engine needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.generation.guide import ReferenceGuide
from rlhf_fast.generation.sampling import SamplingConfig, check_finite
from rlhf_fast.models.language_model import load_causal_lm
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import Completion, Group, Prompt


class HFGenerator:
    """Samples from a copy of the policy held in the inference dtype.

    `batch_size` is the most responses that are decoded together. Responses depend on the seed, the
    prompts, the batch size and which `process` of a launch this is, not on what was generated
    before.
    """

    def __init__(
        self,
        model_path: str,
        *,
        decode: Callable[[list[int]], str],
        stop_token_ids: list[int],
        dtype: str = "bfloat16",
        batch_size: int = 256,
        device: str = "cpu",
        reference_path: str | None = None,
        process: int = 0,
    ) -> None:
        self.model = _load(model_path, dtype, device)
        self.reference = _load(reference_path, dtype, device) if reference_path else None
        self.decode = decode
        self.stop_token_ids = stop_token_ids
        self.batch_size = batch_size
        self.process = process
        config = self.model.config.get_text_config()
        self.max_model_len: int | None = getattr(config, "max_position_embeddings", None)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        prompt_token_ids: Sequence[list[int]],
        *,
        num_generations: int,
        seed: int,
        sampling: SamplingConfig,
        guidance: Sequence[Sequence[float]] | None = None,
        on_group: Callable[[int], None] = lambda count: None,
    ) -> list[Group]:
        """One group of `num_generations` completions per prompt, in order.

        With `guidance`, one number g per response, logits are `(1 + g) * policy - g * reference`.
        """
        self._check_lengths(prompts, prompt_token_ids, sampling)
        if self.process:  # other prompts, other random numbers
            seed = derive_seed(seed, "process", self.process)
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompt_token_ids[i]), i))
        together = min(num_generations, self.batch_size)  # of a prompt's responses
        rows = self.batch_size // together
        groups: list[Group] = [[] for _ in prompts]
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            for done in range(0, num_generations, together):
                count = min(together, num_generations - done)
                guides = (
                    [g for i in batch for g in guidance[i][done:][:count]] if guidance else None
                )
                tokens, logps = self._sample(
                    [prompt_token_ids[i] for i in batch],
                    count,
                    derive_seed(seed, start, *([done] if done else [])),
                    sampling,
                    guides,
                )
                for row, (ids, values) in enumerate(zip(tokens, logps)):
                    index = batch[row // count]
                    groups[index].append(
                        self._completion(prompts[index], prompt_token_ids[index], ids, values)
                    )
            on_group(len(batch))
        return groups

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies the policy's parameters in, cast to this copy's dtype; tied ones may come twice.

        Raises:
            UserError: a weight of the model is missing (the old one would stay).
        """
        own = dict(self.model.named_parameters())
        missing = set(own)
        for name, tensor in named_tensors:
            if name in own:
                own[name].copy_(tensor)
                missing.discard(name)
        if missing:
            raise UserError(
                f"hf: load_weights must get every weight of the model, got "
                f"{len(own) - len(missing)} without {', '.join(sorted(missing)[:3])}"
            )

    def close(self) -> None:
        """Nothing to release: the model goes with the object."""

    def _sample(
        self,
        prompts: list[list[int]],
        num_generations: int,
        seed: int,
        sampling: SamplingConfig,
        guidance: list[float] | None = None,
    ) -> tuple[list[list[int]], list[list[float]]]:
        width = max(map(len, prompts))
        pad = self.stop_token_ids[0]
        device = self.model.device
        input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        input_ids = input_ids.repeat_interleave(num_generations, 0)
        mask = mask.repeat_interleave(num_generations, 0)
        guide = None
        if guidance:
            guide = ReferenceGuide(self.reference, mask, torch.tensor(guidance, device=device))
        sampler = _Sampler(sampling, torch.Generator(device).manual_seed(seed), guide)
        output = self.model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=self.stop_token_ids,
            logits_processor=LogitsProcessorList([sampler]),
            do_sample=False,
        )
        tokens = [self._until_stop(row) for row in output[:, width:].tolist()]
        logps = torch.stack(sampler.logps, 1).tolist()
        return tokens, [values[: len(ids)] for ids, values in zip(tokens, logps)]

    def _until_stop(self, row: list[int]) -> list[int]:
        for i, token in enumerate(row):
            if token in self.stop_token_ids:
                return row[: i + 1]
        return row

    def _completion(
        self, prompt: Prompt, prompt_ids: list[int], ids: list[int], logps: list[float]
    ) -> Completion:
        check_finite(logps, "hf", prompt)
        finished = ids[-1] in self.stop_token_ids
        return Completion(prompt, self.decode(ids), prompt_ids, ids, finished, logps)

    def _check_lengths(
        self, prompts: Sequence[Prompt], ids: Sequence[list[int]], sampling: SamplingConfig
    ) -> None:
        limit = self.max_model_len
        for prompt, tokens in zip(prompts, ids):
            if limit is not None and len(tokens) + sampling.max_new_tokens > limit:
                raise UserError(
                    f"prompt {prompt.id!r} has {len(tokens)} tokens; with max_new_tokens="
                    f"{sampling.max_new_tokens} it exceeds the model's {limit} positions: "
                    f"shorten it or lower max_new_tokens"
                )


def _load(path: str, dtype: str, device: str) -> PreTrainedModel:
    """The model without its generation_config.json: a repetition penalty in there, as in Qwen2.5's,
    would change what is sampled and the log-probabilities that are recorded."""
    model = load_causal_lm(path, dtype=getattr(torch, dtype)).to(device).eval()
    model.generation_config = GenerationConfig()
    return model


class _Sampler(LogitsProcessor):
    """Draws the next token and leaves it as the greedy choice.

    transformers' own sampling draws one random number per vocabulary entry, which on a CPU takes a
    third of the time; this draws one per response. Also records each token's log-probability
    under the raw logits (temperature 1).
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        generator: torch.Generator,
        guide: ReferenceGuide | None = None,
    ) -> None:
        self.sampling = sampling
        self.generator = generator
        self.guide = guide
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.guide:
            scores = self.guide.mix(input_ids, scores)
        token = self._draw(scores)
        self.logps.append(ops.logps(scores, token).logps)
        return scores.scatter_(1, token[:, None], torch.inf)

    def _draw(self, scores: Tensor) -> Tensor:
        temperature, top_k, top_p = (
            self.sampling.temperature,
            self.sampling.top_k,
            self.sampling.top_p,
        )
        if temperature == 0:
            return scores.argmax(-1)
        index = None
        if top_k or top_p < 1:
            scores, index = scores.topk(min(top_k or scores.shape[-1], scores.shape[-1]))
        probs = torch.softmax(scores / temperature, -1)
        total = probs.cumsum(-1)
        if top_p < 1:  # the first token always stays
            total = probs.masked_fill_(total - probs >= top_p, 0.0).cumsum(-1)
        uniform = torch.rand(len(probs), 1, generator=self.generator, device=probs.device)
        # At most the last entry with mass: rounding must not lead past it.
        drawn = torch.searchsorted(total, uniform * total[:, -1:], right=True)
        last = (probs > 0).sum(-1, keepdim=True) - 1 if index is not None else probs.shape[-1] - 1
        drawn = drawn.clamp(max=last)
        return (drawn if index is None else index.gather(1, drawn))[:, 0]
