"""From conversations to completions: tokenises prompts and drives whichever backend is there."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.launch import Launch
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.names import check_whole
from rlhf_fast.types import Group, Prompt


class Backend(Protocol):
    """Samples from token ids; the weights can be replaced in place."""

    max_model_len: int | None
    """Tokens of prompt and response together, where that is known."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        prompt_token_ids: Sequence[list[int]],
        *,
        num_generations: int,
        seed: int,
        sampling: SamplingConfig,
    ) -> list[Group]: ...

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None: ...

    def close(self) -> None: ...


class HasTensors(Protocol):
    def named_tensors(self) -> Iterable[tuple[str, Tensor]]: ...


class ChatGenerator:
    """Generates responses to conversations with one chat format and one sampling setting.

    In a launch each process answers a share of the prompts, and all get all answers.
    """

    def __init__(
        self,
        backend: Backend,
        chat: ChatFormat,
        sampling: SamplingConfig,
        launch: Launch | None = None,
    ) -> None:
        self.backend = backend
        self.chat = chat
        self.sampling = sampling
        self.launch = launch or Launch()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_generations: int,
        seed: int,
        token_ids: Sequence[list[int]] | None = None,
        sampling: SamplingConfig | None = None,
        **for_each: Sequence,
    ) -> list[Group]:
        """`token_ids` replace the prompts' own; `for_each` is what the backend takes besides, one
        value for each prompt."""
        ids = token_ids or [self.chat.prompt_ids(prompt.messages) for prompt in prompts]

        def answer(share: list[int]) -> list[Group]:
            return self.backend.generate(
                [prompts[i] for i in share],
                [ids[i] for i in share],
                num_generations=num_generations,
                seed=seed,
                sampling=sampling or self.sampling,
                **{name: [values[i] for i in share] for name, values in for_each.items()},
            )

        return self.launch.share(range(len(prompts)), answer)

    def has_room(self, prompt: Prompt) -> bool:
        """Whether a response fits after the prompt, as far as the backend knows."""
        limit = self.backend.max_model_len
        if limit is None:
            return True
        return len(self.chat.prompt_ids(prompt.messages)) + self.sampling.max_new_tokens <= limit

    def load_weights(self, policy: HasTensors) -> None:
        self.backend.load_weights(policy.named_tensors())

    def close(self) -> None:
        self.backend.close()


def resolve_backend(name: str) -> str:
    """`auto` becomes vllm where it is installed, else hf."""
    if name != "auto":
        return name
    return "vllm" if importlib.util.find_spec("vllm") else "hf"


class AtMain:
    """A backend that the main process of a launch alone talks to, as to a server."""

    def __init__(self, start: Callable[[], Backend], launch: Launch) -> None:
        self.launch = launch
        self.backend = start() if launch.is_main else None
        self.max_model_len = launch.on_main(lambda: self.backend.max_model_len)

    def generate(self, *args: Any, **options: Any) -> list[Group]:
        return self.launch.on_main(lambda: self.backend.generate(*args, **options))

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.launch.on_main(lambda: self.backend.load_weights(named_tensors))

    def close(self) -> None:
        if self.backend:
            self.backend.close()


def make_generator(
    name: str,
    model_path: str,
    chat: ChatFormat,
    *,
    sampling: SamplingConfig,
    launch: Launch,
    **options: Any,
) -> ChatGenerator:
    """The generator of a backend's name; `options` as for `make_backend`."""
    options |= {"sampling": sampling, "process": launch.rank}
    start = functools.partial(make_backend, name, model_path, chat, **options)
    if name == "server" and launch.num_processes > 1:
        return ChatGenerator(AtMain(start, launch), chat, sampling)
    return ChatGenerator(start(), chat, sampling, launch)


def make_backend(name: str, model_path: str, chat: ChatFormat, **options: Any) -> Backend:
    """Starts a backend on a model directory.

    Options: `dtype` ("bfloat16" or "float32"), `device`, `batch_size`, `sampling`, `seed`,
    `server_url` and `server_model`, `reference_path` (hf alone), `longest_prompt` in tokens (vllm
    alone; None where it is not known), `process`, the rank in a launch.
    """
    if options["reference_path"] and resolve_backend(name) != "hf":
        raise UserError("mixing with the reference needs generation.backend hf")
    if resolve_backend(name) in ("server", "vllm"):
        check_whole(model_path, f"generation.backend {resolve_backend(name)}")
    if name == "server":
        from rlhf_fast.generation.server import ServerGenerator

        return ServerGenerator(
            options["server_url"],
            model_path,
            model=options["server_model"] or model_path,
            decode=chat.decode,
            stop_token_ids=chat.stop_token_ids,
        )
    if resolve_backend(name) == "vllm":
        from rlhf_fast.generation.vllm import VLLMGenerator

        longest, sampling = options["longest_prompt"], options["sampling"]
        return VLLMGenerator(
            model_path,
            sampling=sampling,
            stop_token_ids=chat.stop_token_ids,
            seed=options["seed"],
            dtype=options["dtype"],
            max_model_len=longest and longest + sampling.max_new_tokens,
        )
    if name not in ("hf", "auto"):
        raise UserError(f"generation backend must be auto, hf, vllm or server, got {name!r}")
    from rlhf_fast.generation.hf import HFGenerator

    return HFGenerator(
        model_path,
        decode=chat.decode,
        stop_token_ids=chat.stop_token_ids,
        dtype=options["dtype"],
        batch_size=options["batch_size"],
        device=options["device"],
        reference_path=options["reference_path"],
        process=options["process"],
    )
