"""What a family's search knows: measured losses of one change at a time, beside what members cost. Nothing is trained.

Every measurement is kept in one JSON as soon as it is there, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .family import Family, Member
from .family_costs import LENGTH, bit_operations
from .family_search import Array, Tables
from .family_sizes import Sizes
from .files import read_json, write_json
from .watching import progress

BEAM = 3  # sets of blocks that one more block is added to
KEEP_SECONDS = 20.0


def output_distances(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """How far outputs [rows, classes] are from the teacher's, [rows]: KL(teacher || student) in nats; the squared
    difference where there is one output."""
    a, b = student.double(), teacher.double()
    if a.shape[-1] == 1:
        return (a - b).square().squeeze(-1)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def output_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean of :func:`output_distances` over the rows."""
    return output_distances(student, teacher).mean()


@torch.no_grad()
def losses_of(family: Family, member: Member, batches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the rows of ``batches``: ``loss``, its parts, and ``output``, :func:`output_distance`."""
    family.eval()
    total: dict[str, float] = {}
    rows = 0
    with family.at(member) as kd:
        for batch in batches:
            size = next(iter(batch.values())).shape[0]
            found = kd(**batch)
            values = {"loss": found.loss, **found.parts}
            wanted = family.remembered.wanted(batch, batch).outputs.get("logits")
            if wanted is not None and "logits" in found and wanted.dim() == 2:
                values["output"] = output_distance(found["logits"], wanted)
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + float(value) * size
            rows += size
    return {name: value / rows for name, value in total.items()}


class Losses:
    """Measurements of a family on one set of batches, kept in a JSON file. Keys name what differs from the largest
    member: ``""``, ``"bert.pooler.dense.weight=2"``, ``"-3,5"``. ``of_rows``: hash of the rows in the batches; what the
    file holds of others is not taken."""

    def __init__(self, family: Family, batches: Sequence[dict[str, Any]], path: Path, of_rows: str) -> None:
        self.family, self.batches, self.path, self.of_rows = family, batches, path, of_rows
        known = read_json(path) if path.exists() else {}
        self.found: dict[str, dict[str, float]] = known["losses"] if known.get("of_rows") == of_rows else {}
        self.saved = time.monotonic()
        family.remembered.forget(keep=len(batches))

    def of(self, key: str, member: Member) -> dict[str, float]:
        if key not in self.found:
            self.found[key] = losses_of(self.family, member, self.batches)
            if time.monotonic() - self.saved > KEEP_SECONDS:
                self.save()
        return self.found[key]

    def save(self) -> None:
        write_json(self.path, {"format": 1, "rows": self.rows, "of_rows": self.of_rows, "losses": self.found})
        self.saved = time.monotonic()

    @property
    def rows(self) -> int:
        return sum(next(iter(b.values())).shape[0] for b in self.batches)

    def __enter__(self) -> Losses:
        return self

    def __exit__(self, *_: object) -> None:
        """What was measured is kept, whatever ended the measuring."""
        self.save()
        self.family.remembered.forget()


def measure_losses(losses: Losses, term: str) -> tuple[Array, dict[tuple[int, ...], float]]:
    """(:attr:`Tables.loss`, :attr:`Tables.depths`) in units of ``term``; every measurement that is missing is made."""
    family = losses.family
    largest, bits = family.largest, family.bits
    base = losses.of("", largest)[term]
    table = np.zeros((len(family.switches), len(bits)))
    plan = [(i, k) for i in range(len(family.switches)) for k in range(len(bits) - 1)]
    with progress("one switch at a time", len(plan), 0) as bar:
        for i, k in plan:
            key = f"{family.switches[i].name}={bits[k]}"
            table[i, k] = losses.of(key, replace(largest, bits=_with(largest.bits, i, bits[k])))[term] - base
            bar.update(1)
    return table, {d: v - base for d, v in _depths(losses, term)}


def _with(bits: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*bits[:at], value, *bits[at + 1 :])


def _depths(losses: Losses, term: str) -> Iterator[tuple[tuple[int, ...], float]]:
    """Sets of blocks to leave out, with their losses: none, each one that can go, and from two on those that add a
    block to one of the BEAM best sets of one fewer."""
    family = losses.family
    yield (), losses.of("", family.largest)[term]
    able = family.removable
    level: list[tuple[int, ...]] = [()]
    for _ in range(family.most_left_out):
        sets = sorted({tuple(sorted({*s, b})) for s in level for b in able if b not in s})
        scored = {}
        with progress("blocks left out", len(sets), 0) as bar:
            for one in sets:
                key = "-" + ",".join(map(str, one))
                scored[one] = losses.of(key, replace(family.largest, left_out=one))[term]
                bar.update(1)
        yield from scored.items()
        level = sorted(scored, key=scored.__getitem__)[:BEAM]


def make_tables(losses: Losses, *, term: str, folder: Path, ms: tuple[float, Array] | None) -> Tables:
    """All tables. ``folder``: the ``int/`` folder of the largest member; ``ms``: what :func:`.family_costs.latency`
    gave, or None."""
    family, sizes = losses.family, Sizes(losses.family, folder)
    loss, depths = measure_losses(losses, term)
    table, fixed, blocks = sizes.tables()
    work, rest, rest_of_blocks = bit_operations(family, LENGTH)
    costs = {"bytes": table, "bitops": work}
    base = {"bytes": fixed, "bitops": rest}
    per_block = {"bytes": blocks, "bitops": rest_of_blocks}
    if ms is not None:
        costs["ms"], base["ms"], per_block["ms"] = np.zeros_like(loss), ms[0], ms[1]
    names = tuple(s.name for s in family.switches)
    return Tables(family.bits, names, family.owner, loss, costs, base, per_block, depths, sizes.of)
