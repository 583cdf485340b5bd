"""What a distillation step returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any


class DistillOutput(OrderedDict[str, Any]):
    """What ``kd(**batch)`` returns: ``loss`` first, then the student's own outputs; by name, key or position.

    ``parts`` holds every term before its weight, detached: hidden, attention, logits, gold, pooled.
    """

    def __init__(self, fields: Iterable[tuple[str, Any]] | dict[str, Any] = (), parts: dict[str, Any] | None = None):
        super().__init__(fields)
        self.__dict__["parts"] = parts or {}

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return OrderedDict.__getitem__(self, name)
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())
