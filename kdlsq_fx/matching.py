"""Which nodes of a student graph correspond to which of a teacher graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Match:
    def report(self) -> str:
        return ""


def match_graphs(student: object, teacher: object) -> Match:
    raise NotImplementedError
