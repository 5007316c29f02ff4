"""vLLM as a server: token ids over HTTP, weights replaced in place through files."""

from __future__ import annotations

import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_fast.endpoint import Endpoint
from rlhf_fast.errors import UserError
from rlhf_fast.generation.sampling import SamplingConfig, check_finite
from rlhf_fast.generation.weights import prompt_seed, save_shards, ties_embeddings
from rlhf_fast.models.names import model_directory
from rlhf_fast.types import Completion, Group, Prompt

START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 "
    "--worker-extension-cls rlhf_fast.generation.vllm.WorkerExtension"
)


class ServerGenerator:
    """Samples from an OpenAI-compatible vLLM server (`/v1/completions` with token ids).

    Start it with `VLLM_SERVER_DEV_MODE=1`, which offers the weight update, and with this package's
    worker extension; any model of the same architecture will do, since the run's weights are sent
    before the first response. Server and trainer must see the same file system. A server on a CPU
    also needs `--no-enable-chunked-prefill`: a seeded request whose prompt is split over two steps
    kills its engine.

    One server serves one run at a time: another one's weights would answer in its place. The server
    knows whose weights it has, which is asked before and after every batch of responses.

    Args:
        url: base address, e.g. `http://127.0.0.1:8000/v1`.
        model_path: folder or hub name of the weights to begin with.
        model: name under which the server serves its model.
        decode: token ids to text without special tokens.
        stop_token_ids: tokens that end a response.
    """

    def __init__(
        self,
        url: str,
        model_path: str | Path,
        *,
        model: str,
        decode: Callable[[list[int]], str],
        stop_token_ids: list[int],
        endpoint: Endpoint | None = None,
    ) -> None:
        self.endpoint = endpoint or Endpoint(url)
        self.max_model_len = None  # the server refuses what is too long
        # The weight update is not part of the OpenAI interface: its address has no /v1.
        self.control = Endpoint(
            self.endpoint.url.removesuffix("/v1"), retries=self.endpoint.retries
        )
        self.model = model
        self.decode = decode
        self.stop_token_ids = stop_token_ids
        self.is_tied = ties_embeddings(model_path)
        self._reload(model_directory(model_path).resolve())

    def generate(
        self,
        prompts: Sequence[Prompt],
        prompt_token_ids: Sequence[list[int]],
        *,
        num_generations: int,
        seed: int,
        sampling: SamplingConfig,
    ) -> list[Group]:
        """One group of `num_generations` completions per prompt, in order.

        Seeds and `sampling_logps` are those of the in-process engine.

        Raises:
            UserError: the server's weights are not those that were sent last.
        """
        self._check_weights()
        bodies = [
            self._request(ids, num_generations, prompt_seed(seed, prompt.id), sampling)
            for prompt, ids in zip(prompts, prompt_token_ids)
        ]
        answers = self.endpoint.post_all("completions", bodies)
        self._check_weights()
        groups = []
        for prompt, ids, answer in zip(prompts, prompt_token_ids, answers):
            group = [self._completion(prompt, ids, choice) for choice in _choices(answer)]
            if sampling.temperature == 0:
                group = group * num_generations
            if len(group) != num_generations:
                raise UserError(
                    f"{self.endpoint.url} must answer {num_generations} responses, got "
                    f"{len(group)} for prompt {prompt.id!r}"
                )
            groups.append(group)
        return groups

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Writes the tensors to the temporary folder and lets the server read them from there."""
        tied = ("lm_head.weight",) if self.is_tied else ()
        named = [(name, t.detach()) for name, t in named_tensors if name not in tied]
        with tempfile.TemporaryDirectory(prefix="rlhf_fast_weights_") as folder:
            save_shards(named, Path(folder))
            self._reload(Path(folder))

    def close(self) -> None:
        """The server is the user's: it stays."""

    def _reload(self, folder: Path) -> None:
        # Its own for every load: after it one question tells that there was no other in between.
        self.label = f"{uuid.uuid4().hex[:8]} of process {os.getpid()} on {socket.gethostname()}"
        self._on_workers(
            "take_weights",
            weights_path=str(folder),
            label=self.label,
            is_tied=self.is_tied,
        )
        answer = self.control.post("reset_prefix_cache", {})
        # Cached keys and values of shared prefixes were computed by the old weights.
        if answer.get("success") is False:
            raise UserError(f"{self.control.url}: the prefix cache must be reset; is it in use?")

    def _check_weights(self) -> None:
        found = self._on_workers("label_of_weights").get("results")
        if not found or any(label != self.label for label in found):
            others = sorted({str(label) for label in found or [None]} - {self.label})
            raise UserError(
                f"{self.control.url} must sample from weights {self.label}, which this run sent, "
                f"got {', '.join(others)}; another run uses this server, or it was started again: "
                f"give each run a server of its own, then continue with `rlhf-fast resume RUN`"
            )

    def _on_workers(self, method: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self.control.post("collective_rpc", {"method": method, "kwargs": arguments})
        except UserError as error:
            raise UserError(f"{error}; the server must be started as: {START}") from error

    def _request(
        self, ids: list[int], count: int, seed: int, sampling: SamplingConfig
    ) -> dict[str, Any]:
        is_greedy = sampling.temperature == 0
        return {
            "model": self.model,
            "prompt": ids,
            "n": 1 if is_greedy else count,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_new_tokens,
            "seed": None if is_greedy else seed,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
        }

    def _completion(self, prompt: Prompt, ids: list[int], choice: dict[str, Any]) -> Completion:
        try:
            token_ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            finished = choice["finish_reason"] == "stop"
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.endpoint.url}: the answer lacks {error}; the server must be vLLM >= 0.10.2"
            ) from error
        if len(logps) != len(token_ids):
            raise UserError(f"{self.endpoint.url}: {len(token_ids)} tokens but {len(logps)} logps")
        check_finite(logps, self.endpoint.url, prompt)
        text = self.decode(token_ids)
        return Completion(prompt, text, list(ids), list(token_ids), finished, list(logps))


def _choices(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(answer.get("choices", []), key=lambda choice: choice.get("index", 0))
