"""How far the layers of a model see, and how long its rows may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def attention_window(config: PretrainedConfig) -> int | None:
    """How many tokens back some layer of the model sees, if that is limited."""
    limits = [getattr(config, name, None) for name in ("attention_chunk_size", "window_size")]
    if getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None))
    return min((limit for limit in limits if limit is not None), default=None)


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions there are, if each has an embedding of its own, as in GPT-2."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [m for m in model.base_model.modules() if isinstance(m, nn.Embedding)]
    others = [len(t.weight) for t in tables if t is not model.get_input_embeddings()]
    # OPT's has two rows before the first.
    return limit if limit and any(0 <= rows - limit < 8 for rows in others) else None
