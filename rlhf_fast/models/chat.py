"""Conversations to token ids: one BOS, an explicit end of turn, nothing tokenised twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.names import check_model_name, home_of_tokenizer
from rlhf_fast.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer; it must have a chat template."""
    from transformers import AutoTokenizer

    check_model_name(model_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            home_of_tokenizer(model_path), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a tokenizer from {model_path!r}: {error}") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {model_path!r} has no chat template: add `chat_template.jinja` to "
            f"the model directory, or start from an instruction-tuned model"
        )
    return tokenizer


class ChatFormat:
    """How one tokenizer writes prompts and responses.

    `end_token_id` is the token the chat template puts after an assistant message: it ends every
    trained response and is among `stop_token_ids` when sampling, so both agree. `closing_ids` are
    what the template writes after it, often a new line, at the end of a conversation.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, extra_stop_ids: list[int] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.end_token_id, self.closing_ids = _ending(tokenizer)
        stop = {self.end_token_id, *(extra_stop_ids or [])}
        if tokenizer.eos_token_id is not None:
            stop.add(tokenizer.eos_token_id)
        self.stop_token_ids = sorted(stop)

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Token ids up to and including the header of the assistant's turn."""
        ids = self._write(messages, tokenize=True, return_dict=False)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError("the chat template writes the BOS token twice; remove one from it")
        return ids

    def response_ids(self, text: str, *, finished: bool = True) -> list[int]:
        """Token ids of a response, with the end token unless it was cut off."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [*ids, self.end_token_id] if finished else ids

    def conversation(self, messages: list[Message], *, every_turn: bool = True) -> TokenGroup:
        """The prompt up to the first learned turn, and the rest as one response.

        Learned are the assistant's words and the end tokens after them; with `every_turn` false
        only the last turn. Each learned turn follows exactly the tokens it will be sampled after.
        """
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        turns = turns if every_turn else turns[-1:]
        prompt_ids = self.prompt_ids(messages[: turns[0]])
        ids: list[int] = []
        learned: list[bool] = []
        written = self._text(messages[: turns[0]])
        for turn in turns:
            before = self._text(messages[:turn])
            if not before.startswith(written):
                raise UserError(
                    "the chat template writes earlier turns of a conversation in another way than "
                    "the last one, so they cannot be learned together; learn the last turn only"
                )
            context = self.tokenizer.encode(before[len(written) :], add_special_tokens=False)
            response = self.response_ids(messages[turn]["content"])
            ids += [*context, *response]
            learned += [False] * len(context) + [True] * len(response)
            end = self.tokenizer.convert_ids_to_tokens(self.end_token_id)
            written = before + messages[turn]["content"] + end
        return TokenGroup(prompt_ids, [ids], None if all(learned) else [learned])

    def plain_text(self, text: str) -> TokenGroup:
        """A text with its BOS, if the tokenizer has one, and its end; all but the first learned."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id, *ids]
        eos = self.tokenizer.eos_token_id
        return TokenGroup(ids[:1], [[*ids[1:], self.end_token_id if eos is None else eos]])

    def _text(self, messages: list[Message]) -> str:
        return self._write(messages, tokenize=False)

    def _write(self, messages: list[Message], **options) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, **options
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template takes no conversation of roles "
                f"{', '.join(m['role'] for m in messages)}: {error}; change the rows (or leave out "
                f"the system prompt), or the model's chat_template.jinja"
            ) from error

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def _ending(tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[int]]:
    """The token after an assistant message, and those after that."""
    question = [{"role": "user", "content": "a"}]
    answer = [*question, {"role": "assistant", "content": "b"}]
    prefix = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(answer, tokenize=False)
    if whole.startswith(prefix):
        _, _, tail = whole[len(prefix) :].partition("b")
        ids = tokenizer.encode(tail.lstrip(), add_special_tokens=False)
        if ids and ids[0] in tokenizer.all_special_ids:
            return ids[0], ids[1:]
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the chat template ends an assistant message with no special token and the tokenizer "
            "has no eos_token: set `eos_token` in tokenizer_config.json"
        )
    return tokenizer.eos_token_id, []
