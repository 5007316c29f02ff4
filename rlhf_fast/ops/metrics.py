"""Metrics that a kernel returns as one tensor, by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


class Metrics:
    """Read like a named tuple of 0-dim tensors; each is made when it is asked for.

    A subclass names the entries of `values` in `_fields`. Thirteen tensors that nobody logs would
    take a tenth of a small loss's time.
    """

    __slots__ = ("values",)
    _fields: tuple[str, ...] = ()

    def __init__(self, values: Tensor) -> None:
        self.values = values
        """[number of fields], float32."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self._fields:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}, only {', '.join(self._fields)}"
            )
        return self.values[self._fields.index(name)]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values.unbind())

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, index: int) -> Tensor:
        return self.values[index]

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in self._asdict().items())
        return f"{type(self).__name__}({', '.join(shown)})"

    def _asdict(self) -> dict[str, Tensor]:
        return dict(zip(self._fields, self))
