"""A Hugging Face decoder that computes each prompt once for all its responses."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import inside_of
from rlhf_fast.models.attention import PRODUCTS, make_known, plan
from rlhf_fast.models.batches import GroupBatch, TokenGroup, collate, micro_batches
from rlhf_fast.models.checkpoint import check_known, check_not_shared_out
from rlhf_fast.models.dropout import disable_dropout
from rlhf_fast.models.lean import LeanForward
from rlhf_fast.models.limits import attention_window, learned_positions
from rlhf_fast.ops import matmul

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel

Precision = Literal["bf16", "fp32"]
Attention = Literal["dense", "flex"]
FLEX_BLOCK = 128


class Backbone:
    """Runs the decoder of a model over batches of prompt-sharing groups.

    Parameters keep the model's dtype (float32 for training: bf16 weights round small updates
    away); `precision` is the dtype of the matrix products, by autocast. `row_tokens` > 0 fills
    rows with several groups up to that length. Sharing is checked on the model itself: where a
    tree attention mask changes the result, as in recurrent models, each response gets a row of
    its own.

    `attention`: `dense` gives the model's own attention a mask of L x L booleans; `flex` gives
    FlexAttention a block mask, which skips what the mask forbids (on CPU without gradient only),
    and makes a row of each micro-batch.
    `gradient_checkpointing` computes every layer again in backward instead of keeping its states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_token_id: int,
        precision: Precision = "bf16",
        micro_batch_tokens: int = 4096,
        row_tokens: int = 0,
        attention: Attention = "dense",
        gradient_checkpointing: bool = False,
    ) -> None:
        if hasattr(model, "get_base_model"):  # PEFT's wrapper; its adapters are inside the model
            model = inside_of(model)
        check_not_shared_out(model)
        disable_dropout(model)
        self.model = model
        self.decoder = model.base_model
        self.pad_token_id = pad_token_id
        self.precision = precision
        self.micro_batch_tokens = micro_batch_tokens
        # Blocks that the mask forbids cost nothing.
        self.row_tokens = micro_batch_tokens if attention == "flex" else row_tokens
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.tied: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        if attention == "flex":
            model.set_attn_implementation("flex_attention")
        self.lean = LeanForward(self.decoder)
        if gradient_checkpointing or _checkpoints(model):
            _checkpoint(model, {"use_reentrant": False, "context_fn": self.lean.checkpointed})
        self.window = attention_window(model.config.get_text_config())
        self.num_positions = learned_positions(model)
        self.shares_prompts, self._skips_rows = self._find_shortcuts()

    @property
    def settings(self) -> dict[str, Any]:
        """How the model is computed, for another one."""
        names = ("pad_token_id", "precision", "micro_batch_tokens", "row_tokens", "attention")
        return {name: getattr(self, name) for name in (*names, "gradient_checkpointing")}

    def around(self, model: PreTrainedModel) -> Backbone:
        """The same around another model of this kind."""
        return type(self)(model, **self.settings)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def floats(self, values: Sequence) -> Tensor:
        """Numbers in float32, whatever torch's default is, where the model is."""
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        # Each weight is cast once per pass: a cache would keep all of them until the pass ends.
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.precision == "bf16",
            cache_enabled=False,
        )

    def collate(self, groups: Sequence[TokenGroup]) -> GroupBatch:
        """Builds the batch on the model's device; responses keep their order."""
        multiple_of = FLEX_BLOCK if self.attention == "flex" else 1
        if all(map(self._shares, groups)):
            batch = collate(
                groups, self.pad_token_id, row_tokens=self.row_tokens, multiple_of=multiple_of
            )
        else:
            singles = [single for group in groups for single in group.split()]
            batch = collate(singles, self.pad_token_id, multiple_of=multiple_of)
        check_known(int(batch.input_ids.max()), self.model.config.get_text_config())
        return batch.to(self.device)

    def num_tokens(self, group: TokenGroup) -> int:
        """Tokens of the rows that a group is computed in.

        Raises:
            UserError: a response ends beyond the positions that the model has learned.
        """
        if self.num_positions is not None and group.path_length > self.num_positions:
            raise UserError(
                f"{type(self.model).__name__} has {self.num_positions} positions, got a prompt and "
                f"response of {group.path_length} tokens; set --lengths.max-length, or leave it out"
            )
        if self._shares(group):
            return group.num_tokens
        return sum(single.num_tokens for single in group.split())

    def micro_batches(self, sizes: Sequence[int]) -> list[list[int]]:
        """Splits indices into parts of at most `micro_batch_tokens` padded tokens."""
        return micro_batches(sizes, self.micro_batch_tokens, row_tokens=self.row_tokens)

    def states(self, batch: GroupBatch, rows: Tensor) -> Tensor:
        """[N, D] final hidden states of these of the flattened B*L rows, which may come twice."""
        few = len(rows) < 0.75 * batch.input_ids.numel()
        return self._run(batch, rows.unique() if self._skips_rows and few else None)[rows]

    def hidden_states(self, batch: GroupBatch) -> Tensor:
        """[B*L, D] final hidden states."""
        return self._run(batch)

    def _run(self, batch: GroupBatch, rows: Tensor | None = None) -> Tensor:
        """Final hidden states [B*L, D], of which those outside `rows` may be anything."""
        inputs: dict = {"position_ids": batch.position_ids}
        if self._uses_products and self._sees_all(batch):
            # The mask is a dummy that keeps the model from building one.
            dummy = torch.zeros(len(batch.input_ids), 1, 1, 1, device=self.device)
            inputs |= {"attention_mask": dummy, "tree_parts": plan(batch)}
        elif batch.is_plain:
            inputs = {"attention_mask": batch.padding_mask}
        elif self.attention == "flex":
            inputs["attention_mask"] = self._block_mask(batch)
        else:
            inputs["attention_mask"] = self._tree_mask(batch)
        with self.autocast(), self.lean(rows) if rows is not None else self.lean():
            output = self.decoder(input_ids=batch.input_ids, use_cache=False, **inputs)
        return output.last_hidden_state.flatten(0, 1)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without the dropout of adapters: values are functions of the tokens."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def try_decoder(self) -> Tensor:
        """Runs the decoder's own modules, in training's precision, on a few tokens: its states."""
        with self.evaluating(), self.autocast():
            output = self.decoder(input_ids=self._few_tokens, use_cache=False)
        return output.last_hidden_state

    @property
    def _few_tokens(self) -> Tensor:
        """[1, 4], none of them padding."""
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return torch.tensor([[i for i in range(5, 10) if i != pad][:4]], device=self.device)

    def _check_head(self, found: Tensor, expected: Tensor, what: str) -> None:
        """Raises if they differ by more than rounding."""
        error = (found.float() - expected.float()).abs().max().item()
        if not error <= 2e-2 * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"{type(self.model).__name__} is not supported: {what} (they differ by {error:.3g})"
            )

    def _tree_mask(self, batch: GroupBatch) -> Tensor:
        mask = batch.attention_mask
        if self.model.config._attn_implementation == "sdpa":
            return mask
        # The other implementations add the mask to the scores.
        zeros = torch.zeros_like(mask, dtype=torch.float32)
        return zeros.masked_fill_(~mask, torch.finfo(torch.float32).min)

    @property
    def _uses_products(self) -> bool:
        return self.model.config._attn_implementation == PRODUCTS

    def _sees_all(self, batch: GroupBatch) -> bool:
        longest = max(span.prompt_length + span.length for span in batch.spans)
        return self.window is None or longest <= self.window

    def _block_mask(self, batch: GroupBatch) -> BlockMask:
        # In old versions it brings torch's compiler and sharding, seconds of imports.
        from torch.nn.attention.flex_attention import create_block_mask

        segment, prompt = batch.segment, batch.prompt_segment

        def may_attend(row, head, query, key):
            own = segment[row, key] == segment[row, query]
            return (key <= query) & (own | (segment[row, key] == prompt[row, query]))

        rows, length = segment.shape
        return create_block_mask(
            may_attend, rows, None, length, length, device=segment.device, BLOCK_SIZE=FLEX_BLOCK
        )

    def map_responses(
        self, groups: Sequence[TokenGroup], function: Callable[[GroupBatch], Tensor]
    ) -> list[list]:
        """Applies `function` (one value or row per response of a batch), batched by length."""
        results: dict[int, list] = {}
        with matmul.fast_float32():
            found = self.map_batches(groups, function)
        for part, values in found:
            for i in part:
                count = len(groups[i].responses)
                results[i], values = values[:count], values[count:]
        return [results[i] for i in range(len(groups))]

    @torch.no_grad()
    def map_batches(
        self, groups: Sequence[TokenGroup], function: Callable[[GroupBatch], Tensor]
    ) -> list[tuple[list[int], list]]:
        """The groups of every micro-batch, by their places, and the values of `function` for it."""
        parts = self.micro_batches([self.num_tokens(group) for group in groups])
        with self.evaluating():
            found = [function(self.collate([groups[i] for i in part])) for part in parts]
        # Read last, as a GPU works meanwhile.
        return [(part, tensor.tolist()) for part, tensor in zip(parts, found)]

    def _shares(self, group: TokenGroup) -> bool:
        """The tree mask replaces a sliding window, so it is exact while no path leaves that."""
        return self.shares_prompts and (self.window is None or group.path_length <= self.window)

    @torch.no_grad()
    def _find_shortcuts(self) -> tuple[bool, bool]:
        """Whether prompts can be shared, and whether the last layer may leave tokens out.

        Tries a tree of every kind against separate rows; on a CPU also the faster attention, if
        the model takes it.
        """
        with self.evaluating():
            return self._try_shortcuts()

    def _try_shortcuts(self) -> tuple[bool, bool]:
        precision = self.precision
        self.precision = "fp32"  # rounding to bf16 would hide, or feign, a difference
        self._skips_rows = False
        expected = self._last_states(shares=False)
        own = self.model.config._attn_implementation
        make_known()
        attentions = [PRODUCTS, own] if own == "sdpa" and self.device.type == "cpu" else [own]
        skipping = [True] if self.lean.last_mlp is not None else []
        candidates = [*itertools.product([True], attentions, [*skipping, False])]
        candidates += itertools.product([False], [own], skipping)
        agreeing = (c for c in candidates if self._agrees(expected, *c))
        shares, _, skips = next(agreeing, (False, own, False))
        self.precision = precision
        if not shares:
            warnings.warn(
                f"{type(self.model).__name__} cannot share a prompt between responses; each "
                f"response is computed in a row of its own",
                stacklevel=3,
            )
        return shares, skips

    def _agrees(self, expected: Tensor, shares: bool, attention: str, skips: bool) -> bool:
        if attention != self.model.config._attn_implementation:
            self.model.set_attn_implementation(attention)
        self._skips_rows = skips
        try:
            found = self._last_states(shares)
        except (ValueError, RuntimeError, TypeError, IndexError):
            return False
        return torch.allclose(found, expected, rtol=0, atol=2e-2 * expected.abs().max().item())

    def _last_states(self, shares: bool) -> Tensor:
        """[responses, D] states of the last tokens of the probe, in one row or a row for each."""
        groups, row_tokens = _PROBE, sum(group.num_tokens for group in _PROBE)
        if not shares:
            groups, row_tokens = [single for group in _PROBE for single in group.split()], 0
        multiple_of = FLEX_BLOCK if self.attention == "flex" else 1
        batch = collate(
            groups, self.pad_token_id, row_tokens=row_tokens, multiple_of=multiple_of
        ).to(self.device)
        return self.states(batch, batch.last).float()


def _checkpoints(model: PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _checkpoint(model: PreTrainedModel, options: dict[str, object]) -> None:
    # The name of transformers 5, and the one before.
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    next(getattr(model, name) for name in names if hasattr(model, name))(options)


_PROBE = [
    TokenGroup([5, 6, 7], [[8, 9], [10, 11, 12]]),
    TokenGroup([13, 14], [[15], [16, 17]]),
]
