"""What happens to examples that are too long: stated, counted, never silent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.rows import RowReport


@dataclass(frozen=True)
class LengthConfig:
    """Limit on the length of prompt plus response, and what is done beyond it."""

    max_length: int = 2048
    """Tokens of a prompt and one response together."""
    too_long: Literal["refuse", "cut_response", "cut_prompt"] = "refuse"
    """`refuse` leaves the example out; `cut_response` drops the response's end, and with it the end
    token; `cut_prompt` drops the prompt's beginning, but not its first token."""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"lengths.max_length must be >= 2, got {self.max_length}")


def limit_length(
    group: TokenGroup, config: LengthConfig, where: str, report: RowReport
) -> TokenGroup | None:
    """The group within the limit, or None; `report` counts what became of it."""
    excess = group.path_length - config.max_length
    result: TokenGroup | None = group
    if excess > 0:
        cut = {"refuse": _refuse, "cut_response": _cut_responses, "cut_prompt": _cut_prompt}
        result = cut[config.too_long](group, config.max_length)
        report.num_truncated += result is not None
    if result is None:
        reason = f"longer than {config.max_length} tokens, too_long={config.too_long}"
        report.refuse(where, reason, f"{where}: {group.path_length} tokens")
    elif result.num_trained == 0:
        report.refuse(where, "no learned token is left" + " after cutting" * (excess > 0))
        report.num_truncated -= excess > 0
        return None
    elif len(result.responses) > 1 and len(set(map(tuple, result.responses))) == 1:
        report.refuse(where, "responses are the same after cutting")
        report.num_truncated -= excess > 0
        return None
    report.num_kept += result is not None
    return result


def _refuse(group: TokenGroup, max_length: int) -> None:
    return None


def _cut_responses(group: TokenGroup, max_length: int) -> TokenGroup | None:
    room = max_length - len(group.prompt_ids)
    if room < 1:
        return None
    trained = group.trained and [mask[:room] for mask in group.trained]
    return TokenGroup(group.prompt_ids, [r[:room] for r in group.responses], trained)


def _cut_prompt(group: TokenGroup, max_length: int) -> TokenGroup | None:
    room = max_length - max(map(len, group.responses))
    if room < 1:
        return None
    # The first token is the BOS where there is one, and attention leans on it where there is none.
    kept = group.prompt_ids[len(group.prompt_ids) - room + 1 :] if room > 1 else []
    return TokenGroup([group.prompt_ids[0], *kept], group.responses, group.trained)
