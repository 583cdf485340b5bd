"""What a family's search knows: measured losses of one change at a time, and costs. Nothing is trained.

Every measurement is kept in one JSON as soon as it is there, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from .depth import without
from .errors import CheckpointError
from .family import Family, Member
from .family_search import Array, Tables
from .files import WEIGHTS, read_json, write_json
from .graph import op_label, site_of
from .op import op_of, tensor_args
from .ops.qdq import torch_container
from .packing import pack
from .taps import shape_of
from .watching import progress

BEAM = 3  # sets of blocks that one more block is added to
KEEP_SECONDS = 20.0
PRODUCTS = ("matmul", "bmm")
LENGTH = 128  # tokens of the text that time and bit operations are told for


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
    member: ``""``, ``"bert.pooler.dense.weight=2"``, ``"-3,5"``."""

    def __init__(self, family: Family, batches: Sequence[dict[str, Any]], path: Path) -> None:
        self.family, self.batches, self.path = family, batches, path
        self.found: dict[str, dict[str, float]] = read_json(path)["losses"] if path.exists() else {}
        self.saved = time.monotonic()
        family.remembered.forget(keep=len(batches))

    def of(self, key: str, member: Member) -> dict[str, float]:
        if key not in self.found:
            self.found[key] = losses_of(self.family, member, self.batches)
            if time.monotonic() - self.saved > KEEP_SECONDS:
                self.save()
        return self.found[key]

    def save(self) -> None:
        write_json(self.path, {"format": 1, "rows": self.rows, "losses": self.found})
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


# --- costs


class Sizes:
    """Bytes of ``model.safetensors`` in the ``int/`` folder of any member, to the byte, without writing it.

    ``folder``: that folder of the largest member. What goes with blocks is what the largest member without them lacks.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        from safetensors import safe_open

        self.family, self._known, self._names = family, dict[Member, int](), dict[tuple[int, ...], set[str]]()
        names = [f"{s.name}_codes" for s in family.switches]
        with safe_open(folder / WEIGHTS, framework="np") as file:
            there = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (no mapping)
            layout = json.loads(file.metadata()["layout"])
        if missing := sorted(names - there.keys()):
            where = f"{folder / WEIGHTS}: {missing[0]}"
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
                with safe_open(Path(folder) / WEIGHTS, framework="np") as file:
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


def bit_operations(family: Family, length: int) -> tuple[Array, float, Array]:
    """(by switch and width [S, W], the rest, the rest of each block [B]) for one text of so many tokens: multiply-adds
    times the bits of both factors. Look-ups count as none, float operands as 32 bits."""
    gm = family.student.gm
    nodes = {site_of(n): n for n in gm.graph.nodes if op_of(n) is not None}
    table = np.zeros((len(family.switches), len(family.bits)))
    for i, switch in enumerate(family.switches):
        for site, op, rule in switch.readers:
            if op == "embedding":
                continue
            rows = length if len(shape_of(nodes[site])) > 2 else 1  # a pooler reads one token
            act = rule.act.bits if rule.act is not None else 32
            table[i] += rows * family.weight(i).numel() * act * np.asarray(family.bits)
    each = {site: _product(family, n, length) for site, n in nodes.items() if op_label(n) in PRODUCTS}
    blocks = np.zeros(family.blocks)
    for block in family.removable:
        there = {site_of(n) for n in without(gm, (block,)).graph.nodes}
        blocks[block] = sum(v for site, v in each.items() if site not in there)
    return table, sum(each.values()), blocks


def _product(family: Family, node: fx.Node, length: int) -> float:
    """Bit operations of a product of two activations."""
    rule = family.student.qconfig.find(site_of(node), op_label(node))
    bits = rule.act.bits if rule is not None and rule.act is not None else 32
    out, left = (_sizes(n, length) for n in (node, tensor_args(node)[0]))
    return float(np.prod(out[1:])) * left[-1] * bits**2 if out and left else 0.0


def _sizes(node: fx.Node, length: int) -> list[int]:
    """Sizes of a value for one text of so many tokens: what varies is the batch in front and the length behind."""
    return [s if s is not None else length if i else 1 for i, s in enumerate(shape_of(node))]


def latency(family: Family, run_ms: Callable[[Member], float]) -> tuple[float, Array]:
    """(milliseconds of the largest member, [B] less without each block). Narrow weights run at the speed of int8, so
    widths do not count; blocks of equal work are measured once. ``run_ms`` converts, runs and times a member."""
    whole = run_ms(family.largest)
    work, _, rest = bit_operations(family, LENGTH)
    owner = np.array(family.owner)
    known: dict[float, float] = {}
    blocks = np.zeros(family.blocks)
    for block in family.removable if family.most_left_out else []:
        size = float(work[owner == block, -1].sum() + rest[block])
        if size not in known:
            known[size] = max(whole - run_ms(replace(family.largest, left_out=(block,))), 0.0)
        blocks[block] = known[size]
    return whole, blocks


def make_tables(losses: Losses, *, term: str, folder: Path, ms: tuple[float, Array] | None) -> Tables:
    """All tables; ``folder``: the ``int/`` folder of the largest member. ``ms``: what :func:`latency` gave, or None."""
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
