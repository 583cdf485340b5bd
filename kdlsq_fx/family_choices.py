"""Which member is nearest to the teacher on the rows that choose, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .family import Member
from .files import read_json, write_json


class Choices:
    """Distances that were measured, and what was chosen by them: a file, so that a search goes on where it was stopped,
    and one that ended gives the same member again. ``rows``: hash of the rows; of others nothing is taken."""

    def __init__(self, path: Path, rows: str, measure: Callable[[Member], NDArray[np.float64]]) -> None:
        self.path, self.rows, self.measure = path, rows, measure
        found = read_json(path) if path.exists() else {}
        known: dict[str, Any] = found if found.get("rows") == rows else {"members": {}, "chosen": {}, "searched": 0}
        self.members: dict[str, list[float]] = known["members"]
        self.chosen: dict[str, str] = known["chosen"]
        self.searched: int = known["searched"]

    def before(self) -> list[Member]:
        """What the searches that ended measured."""
        return [member_of(key) for key in list(self.members)[: self.searched]]

    def nearest(self, members: Sequence[Member]) -> Member:
        """:func:`nearest` of these, each measured if it was not."""
        for member in members:
            if member_key(member) not in self.members:
                self.members[member_key(member)] = self.measure(member).tolist()
                self._save()
        return nearest(members, {m: np.asarray(self.members[member_key(m)]) for m in members})

    def choose(self, asked: str, member: Member) -> None:
        """A search ends."""
        self.chosen[asked], self.searched = member_key(member), len(self.members)
        self._save()

    def _save(self) -> None:
        kept = {"rows": self.rows, "members": self.members, "chosen": self.chosen, "searched": self.searched}
        write_json(self.path, {"format": 1, **kept})


def nearest(members: Sequence[Member], distances: Mapping[Member, NDArray[np.float64]]) -> Member:
    """The member of least mean distance; where one with more blocks is no further by one standard error of the paired
    difference, the nearest of those: what is left out is missed by other rows too, and those that choose are few."""

    def mean(member: Member) -> float:
        return float(distances[member].mean())

    def ties(member: Member) -> bool:
        gap = distances[member] - distances[found]
        return len(member.left_out) < len(found.left_out) and gap.mean() <= gap.std() / np.sqrt(len(gap))

    found = min(members, key=mean)
    while tied := [m for m in members if ties(m)]:
        found = min(tied, key=mean)
    return found


def member_key(member: Member) -> str:
    return json.dumps([list(member.bits), list(member.left_out)])


def member_of(key: str) -> Member:
    bits, left_out = json.loads(key)
    return Member(tuple(bits), tuple(left_out))
