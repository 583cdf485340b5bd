"""The small table at the end of a conversion or an export: sizes, what runs on integers, what does not and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from .graph import moves_data, plumbing, site_of
from .lowering import Island
from .op import op_of
from .packing import packed_bytes
from .report import columns, site_rows
from .views import View

PRODUCTS = ("linear", "conv1d", "matmul", "bmm")


@dataclass(frozen=True)
class Row:
    """``count`` ops of one kind that run in ``where`` ("int8", "int", "float"; "none" where no op is left), and ``why``
    ("" for integers)."""

    op: str
    count: int
    where: str
    why: str


@dataclass(frozen=True)
class Summary:
    """What was made of a model. Sizes in bytes; ``before``: its float32 weights, 0 where they are not known;
    ``after``: the constants as they are stored, or the file.

    ``notes``: a line each, such as the count of int8 kernels that a runtime chose.
    """

    before: int
    after: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def products(self) -> int:
        """Matrix products on integers."""
        return sum(r.count for r in self.rows if r.op in PRODUCTS and r.where != "float")

    def __str__(self) -> str:
        size = f"{self.after / 1e6:.1f} MB"
        if self.before:
            times = self.before / self.after
            how = f"{times:.1f}x smaller" if times > 1 else "no smaller"
            size = f"{self.before / 1e6:.1f} MB of float32 weights -> {size}, {how}"
        table = columns(("op", "count", "runs in", "because"), [(r.op, r.count, r.where, r.why) for r in self.rows])
        return "\n".join((size, *self.notes, table))


def float_bytes(gm: fx.GraphModule) -> int:
    """Bytes of the float32 weights of a float or qat graph, shared ones once, scales of quantizers left out."""
    from .lsq import Lsq

    scales = {id(p) for m in gm.modules() if isinstance(m, Lsq) for p in m.parameters()}
    return sum(p.numel() * 4 for p in gm.parameters() if id(p) not in scales)


def stored_bytes(gm: fx.GraphModule) -> int:
    """Bytes of all parameters and buffers as an int folder holds them, packed; shared ones once."""
    held = {id(t): t for t in (*gm.parameters(), *gm.buffers())}
    return sum(packed_bytes(t.detach().cpu().numpy()) for t in held.values())


def summarize_int(gm: fx.GraphModule, before: int) -> Summary:
    """Of an int graph: every op by the name it had in the float model, and the reasons of its float islands."""
    islands: dict[str, Island] = {i.site: i for i in gm.meta.get("islands", ())}
    hidden = plumbing(gm.graph)
    labels: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and op_of(node) is not None and node not in hidden and not moves_data(node):
            site = site_of(node)
            if not site.endswith(("/q", "/w", "/dq", "/real")):
                labels.setdefault(site, View.label(node))
    found = [
        (islands[site].op, "float", _in_general(islands[site].reason)) if site in islands else (label, "int", "")
        for site, label in labels.items()
    ]
    return Summary(before, stored_bytes(gm), _grouped(found))


def summarize_export(
    gm: fx.GraphModule,
    before: int,
    after: int,
    kernels: dict[str, str],
    int8: frozenset[str],
    folded: frozenset[str],
    notes: Iterable[str],
) -> Summary:
    """Of a qdq graph as a runtime runs it: ``kernels`` by site as it chose them, ``int8`` those on 8-bit integers,
    ``folded`` those that the file needs no op for.

    Where no runtime was asked (``kernels`` is empty) a quantized product counts as int8.
    """
    found = []
    for site, op, got, why in site_rows(gm):
        if site in folded:
            found.append((op, "none", "a scale of the product in front holds its number"))
        elif op in PRODUCTS and kernels:
            if site in int8:
                found.append((op, "int8", ""))
            else:
                found.append((op, "float", why if got == "float" else f"the runtime chose {kernels.get(site, '?')}"))
        elif op in PRODUCTS and got != "float":
            found.append((op, "int8", ""))
        elif got == "integer":
            found.append((op, "float", "no product: QDQ leaves it between dequantize and quantize"))
        else:
            found.append((op, "float", why if got == "float" else "no product: its result is quantized behind it"))
    tables = [n for n in gm.graph.nodes if (known := op_of(n)) is not None and known.name == "embedding"]
    found += [("embedding", "int8", "")] * sum("decision" not in n.meta for n in tables)  # freeze let them gather codes
    return Summary(before, after, _grouped(found), tuple(notes))


def _in_general(reason: str) -> str:
    """A reason without the name of the operand, so that equal ones are counted together."""
    return re.sub(r"^its operand \S+ is", "an operand is", reason)


def _grouped(found: Iterable[tuple[str, str, str]]) -> tuple[Row, ...]:
    counted = Counter(found)
    order = sorted(counted, key=lambda key: (key[1] == "float", -counted[key], key))
    return tuple(Row(op, counted[op, where, why], where, why) for op, where, why in order)
