"""Bytes of a family's members, without writing them."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError
from .family import Family, Member
from .family_search import Array
from .files import CONSTANTS
from .ops.qdq import torch_container
from .packing import pack


class Sizes:
    """Bytes of ``constants.safetensors`` in the ``int/`` folder of any member, to the byte, without writing it.

    ``folder``: that folder of the largest member. What goes with blocks is what the largest member without them lacks.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        from safetensors import safe_open

        self.family, self._known, self._names = family, dict[Member, int](), dict[tuple[int, ...], set[str]]()
        names = [f"{s.name}_codes" for s in family.switches]
        with safe_open(folder / CONSTANTS, framework="np") as file:
            there = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (no mapping)
            layout = json.loads(file.metadata()["layout"])
        if missing := sorted(names - there.keys()):
            where = f"{folder / CONSTANTS}: {missing[0]}"
            raise CheckpointError("the codes of a switch are not there", where=where, do="report this")
        self._rest = {n: (v.shape, v.dtype) for n, v in there.items() if n not in names}
        self._packed = {n: row for n, row in layout["packed"].items() if n in self._rest}
        self._aliases, self._names[()] = layout["aliases"], set(there)
        self._codes = [[_packed(family, i, bits) for bits in family.bits] for i in range(len(names))]

    def of(self, member: Member) -> int:
        """The size of a member's file."""
        if member not in self._known:
            self._known[member] = self._serialized(member)
        return self._known[member]

    def _serialized(self, member: Member) -> int:
        """The length of a file of zeros with the same header: what :func:`write_tensors` would write."""
        from safetensors.numpy import save

        names = self._names_without(member.left_out)
        tensors = {n: np.zeros(*form) for n, form in self._rest.items() if n in names}
        packed = {n: row for n, row in self._packed.items() if n in names}
        for switch, bits, codes in zip(self.family.switches, member.bits, self._codes):
            name = f"{switch.name}_codes"
            if name in names:
                form, row = codes[self.family.bits.index(bits)]
                tensors[name] = np.zeros(*form)
                packed |= {name: row} if row else {}
        return len(save(tensors, metadata={"layout": json.dumps({"aliases": self._aliases, "packed": packed})}))

    def _names_without(self, left_out: tuple[int, ...]) -> set[str]:
        """Names of the tensors of a model without these blocks."""
        from safetensors import safe_open

        from .api import convert

        if left_out not in self._names:
            one = replace(self.family.largest, left_out=left_out)
            with tempfile.TemporaryDirectory() as folder, self.family.at(one) as kd:
                convert(kd.student).save_pretrained(folder)
                with safe_open(Path(folder) / CONSTANTS, framework="np") as file:
                    self._names[left_out] = set(file.keys())
        return self._names[left_out]

    def tables(self) -> tuple[Array, float, Array]:
        """(by switch and width [S, W], the rest, what goes with each block besides its switches [B]). Their sum is a
        member's size or some bytes less: larger offsets have more digits in a file's header, and its end is padded."""
        rows = zip(self.family.switches, self._codes)
        table = np.array([[_bytes(f"{s.name}_codes", *data, row) for data, row in codes] for s, codes in rows], float)
        narrow = self.family.uniform(self.family.bits[0])
        whole, owner = self.of(narrow), np.array(self.family.owner)
        blocks = np.zeros(self.family.blocks)
        for b in self.family.removable if self.family.most_left_out else ():
            blocks[b] = whole - self.of(replace(narrow, left_out=(b,))) - table[owner == b, 0].sum()
        return table, float(whole - table[:, 0].sum() - 8), blocks  # 8: the padding

    def smallest(self) -> int:
        """The size of the smallest member."""
        table, _, blocks = self.tables()
        owner = np.array(self.family.owner)
        sets = [s for n in range(self.family.most_left_out + 1) for s in combinations(self.family.removable, n)]
        gone = max(sets, key=lambda s: blocks[list(s)].sum() + table.min(axis=1)[np.isin(owner, s)].sum())
        return self.of(Member(tuple(self.family.bits[k] for k in table.argmin(axis=1)), gone))


def _packed(family: Family, switch: int, bits: int) -> tuple[tuple[Any, Any], dict[str, Any] | None]:
    """((shape, dtype) of a switch's codes as they are stored, their row in the file's header or None)."""
    lsq = family.quantizer(switch, bits)
    codes = lsq.codes(family.weight(switch)).to(torch_container(lsq.qmin, lsq.qmax)).cpu().numpy()
    data, row = pack(codes) or (codes, None)
    return (data.shape, data.dtype), row


def _bytes(name: str, shape: tuple[int, ...], kind: Any, row: dict[str, Any] | None) -> int:
    """Bytes of codes with what their form takes in the header, where a row's quotes are escaped."""
    told = len(json.dumps(shape, separators=(",", ":"))) + (len(json.dumps(json.dumps({name: row}))) if row else 0)
    return int(np.prod(shape)) * kind.itemsize + told
