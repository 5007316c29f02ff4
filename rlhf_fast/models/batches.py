"""Batches in which a prompt is computed once for all its responses.

A tree is `[prompt | response 1 | ... | response K]`, and a row holds one tree or several. Every
response sees its prompt and itself, nothing else, and its positions continue the prompt's; so each
log-probability is what a row of its own would give (prefix sharing, arXiv 2410.20305), for about
half the tokens at K = 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGroup:
    """A prompt and its responses as token ids; prompt and responses are non-empty."""

    prompt_ids: list[int]
    responses: list[list[int]]
    trained: list[list[bool]] | None = None
    """Per response token whether it is learned; None: all are. The others are context, as the
    user's turns inside a conversation."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def num_trained(self) -> int:
        """Response tokens that are learned."""
        return sum(map(sum, self.trained)) if self.trained else sum(map(len, self.responses))

    @property
    def path_length(self) -> int:
        """Tokens that the last token of the longest response sees, itself included."""
        return len(self.prompt_ids) + max(map(len, self.responses))

    def split(self) -> list[TokenGroup]:
        """One group per response, for models that cannot share a prompt."""
        masks = self.trained or [None] * len(self.responses)
        return [
            TokenGroup(self.prompt_ids, [response], None if mask is None else [mask])
            for response, mask in zip(self.responses, masks)
        ]


class Span(NamedTuple):
    """A prompt, or a response with the prompt that it sees, in the flattened B*L rows."""

    prompt_start: int
    prompt_length: int
    """0 for a prompt."""
    start: int
    length: int
    number: int
    """Which response of its tree."""


@dataclass(frozen=True)
class GroupBatch:
    """B rows of length L holding R responses, of which M tokens are learned."""

    input_ids: Tensor  # [B, L] int64
    position_ids: Tensor  # [B, L] int64
    segment: Tensor  # [B, L] int64, which prompt or response of the row; -1 = padding
    prompt_segment: Tensor  # [B, L] int64, the segment of the prompt that a token continues
    source: Tensor  # [M] index into the flattened B*L rows of the state that predicts a token
    target: Tensor  # [M] index into the flattened B*L rows of the token itself
    labels: Tensor  # [M] int64, the response tokens
    cu_seqlens: Tensor  # [R + 1] int64, where each response's tokens begin in source and labels
    last: Tensor  # [R] index into the flattened B*L rows of each response's last token
    spans: tuple[Span, ...]
    num_responses: int

    @property
    def is_plain(self) -> bool:
        """Whether every row holds one response: a causal mask and default positions suffice."""
        return self.num_responses == len(self.input_ids)

    @property
    def padding_mask(self) -> Tensor:
        """[B, L] bool, True = token."""
        return self.segment >= 0

    @property
    def attention_mask(self) -> Tensor:
        """[B, 1, L, L] bool, True = may attend: earlier tokens of the own segment or its prompt."""
        query, key = self.segment[:, :, None], self.segment[:, None, :]
        length = self.segment.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()
        # Padding sees earlier padding, itself at least: a query that sees nothing gives NaN.
        return (causal & ((key == query) | (key == self.prompt_segment[:, :, None])))[:, None]

    def to(self, device: torch.device) -> GroupBatch:
        """Does not wait for a GPU."""
        moved = {
            name: move_ahead(value, device) if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        return GroupBatch(**moved)


def move_ahead(tensor: Tensor, device: torch.device) -> Tensor:
    """A new tensor of the CPU on another device; copies from pinned memory alone run by
    themselves."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class _Row:
    """One row while it is being filled."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[int] = []
        self.prompts: list[int] = []
        self.num_segments = 0

    def append(self, ids: list[int], position: int, prompt: int | None = None) -> int:
        """Adds a segment whose first token has `position`; returns where it starts."""
        start, segment = len(self.ids), self.num_segments
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.segments += [segment] * len(ids)
        self.prompts += [segment if prompt is None else prompt] * len(ids)
        self.num_segments += 1
        return start


def collate(
    groups: Sequence[TokenGroup], pad_token_id: int, *, row_tokens: int = 0, multiple_of: int = 1
) -> GroupBatch:
    """Lays the groups out in rows, as `pack` says, and right-pads these to the longest one.

    Responses keep the order of `groups`, whichever row they are in. The length of the rows is
    rounded up to `multiple_of`.
    """
    places: dict[int, int] = {}
    for number, members in enumerate(pack([g.num_tokens for g in groups], row_tokens)):
        places |= dict.fromkeys(members, number)
    rows = [_Row() for _ in range(max(places.values()) + 1)]
    found: list[tuple[int, TokenGroup, int, list[int]]] = []  # row, group, prompt, responses
    for index, group in enumerate(groups):
        row = rows[places[index]]
        prompt = row.num_segments
        begin = row.append(group.prompt_ids, 0)
        starts = [row.append(r, len(group.prompt_ids), prompt) for r in group.responses]
        found.append((places[index], group, begin, starts))
    length = -(-max(len(row.ids) for row in rows) // multiple_of) * multiple_of
    source, target, labels, cu_seqlens, last, spans = [], [], [], [0], [], []
    for number, group, begin, starts in found:
        base, prompt_length = number * length, len(group.prompt_ids)
        before = base + begin + prompt_length - 1
        spans.append(Span(base + begin, 0, base + begin, prompt_length, 0))
        for k, (start, response) in enumerate(zip(starts, group.responses)):
            at = base + start
            spans.append(Span(base + begin, prompt_length, at, len(response), k))
            mask = group.trained[k] if group.trained else [True] * len(response)
            sources = [before, *range(at, at + len(response) - 1)]
            source += itertools.compress(sources, mask)
            target += itertools.compress(range(at, at + len(response)), mask)
            labels += itertools.compress(response, mask)
            cu_seqlens.append(len(labels))
            last.append(at + len(response) - 1)

    def padded(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([x + [value] * (length - len(x)) for x in lists], dtype=torch.int64)

    return GroupBatch(
        padded([row.ids for row in rows], pad_token_id),
        padded([row.positions for row in rows], 0),
        padded([row.segments for row in rows], -1),
        padded([row.prompts for row in rows], -1),
        torch.tensor(source, dtype=torch.int64),
        torch.tensor(target, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(cu_seqlens, dtype=torch.int64),
        torch.tensor(last, dtype=torch.int64),
        tuple(spans),
        len(last),
    )


def pack(sizes: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of each row, longest first, each in the first row where it stays in `row_tokens`.

    An item that does not fit anywhere, as any with `row_tokens` 0, gets a row of its own. Packing
    the items of some of these rows again gives the same rows.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        at = next((r for r, left in enumerate(room) if left >= size), None)
        if at is None:
            rows.append([index])
            room.append(row_tokens - size)
        else:
            rows[at].append(index)
            room[at] -= size
    return rows


def micro_batches(sizes: Sequence[int], max_tokens: int, *, row_tokens: int = 0) -> list[list[int]]:
    """Groups indices: packed rows times the longest row stay within `max_tokens`."""
    rows = pack(sizes, row_tokens)
    lengths = [sum(sizes[i] for i in row) for row in rows]
    batches: list[list[int]] = []
    longest = num_rows = 0
    for row in sorted(range(len(rows)), key=lambda r: -lengths[r]):
        if batches and longest * (num_rows + 1) <= max_tokens:
            batches[-1] += rows[row]
            num_rows += 1
        else:
            batches.append(list(rows[row]))
            longest, num_rows = lengths[row], 1
    return batches
