"""What every integer of an int graph can be, and the proof that no accumulator and no intermediate overflows.

One walk from the inputs to the outputs: a constant is in the interval of its own codes, an op with a ``bounds`` rule
(kdlsq_fx/op.py) where the rule puts it, data movers pass the interval on, and what is left (ids, masks, sizes) is in
that of its dtype. The rules also bound what an op computes inside. Interval arithmetic on the actual codes of weights
and tables; nothing is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .errors import VerifyError
from .graph import fetch, moves_data, site_of
from .integer_only import dtype_of
from .lowering import array
from .op import op_of, tensor_args
from .ranges import Bound, Bounds, Interval, largest_size
from .report import columns

UNBOUNDED = 2**40  # no dimension of a tensor is this long
LENGTH = "length"  # what a program calls the number of tokens, see program_types.py


@dataclass(frozen=True)
class Row:
    """One thing that an op computes inside, and how large it gets."""

    site: str
    op: str
    bound: Bound

    def __str__(self) -> str:
        b = self.bound
        least = -b.limit if b.least is None else b.least
        found = f"is {b.low}" if b.low == b.high else f"can be {b.low}..{b.high}"
        return f"{b.name} of {self.op} {found}, its limits are {least}..{b.limit}"


@dataclass(frozen=True)
class Ranges:
    """The interval of every node (None: floats, or nothing is known) and all that was bounded inside the ops."""

    intervals: dict[fx.Node, Interval | None]
    rows: tuple[Row, ...]

    @property
    def broken(self) -> list[Row]:
        """What does not fit, in graph order."""
        return [row for row in self.rows if not row.bound.fits]

    def __str__(self) -> str:
        """The accumulators and intermediates as a table; conditions on constants only where they do not hold."""
        shown = [r for r in self.rows if r.bound.least is None or not r.bound.fits]
        cells = [_cells(row) for row in shown]
        text = columns(("site", "op", "intermediate", "low", "high", "limit", "bits", "of"), cells)
        if not shown:
            return text
        tightest = max(shown, key=lambda r: r.bound.largest / max(r.bound.limit, 1))
        fit = "all fit" if not self.broken else f"{len(self.broken)} DO NOT FIT"
        return f"{text}\n{len(shown)} bounds, {fit}; tightest: {tightest.bound.name} at {tightest.site}"


def _cells(row: Row) -> tuple[str, str, str, int, int, int, int, int]:
    b = row.bound
    return row.site, row.op, b.name, b.low, b.high, b.limit, b.largest.bit_length(), b.limit.bit_length()


def analyse_ranges(gm: fx.GraphModule, *, longest: int | None = None) -> Ranges:
    """Walk an int graph, as lowered or as loaded from a program.

    ``longest``: the most tokens of a text, where the graph does not say it (a loaded program). Raises VerifyError with
    the site where an op cannot be bounded at all; what can be but does not fit is in ``broken``.
    """
    intervals: dict[fx.Node, Interval | None] = {}
    rows: list[Row] = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            intervals[node] = of_constant(fetch(gm, str(node.target)))
        elif node.op != "output":
            intervals[node] = _of_node(node, intervals, rows, _sizes(node, longest))
    return Ranges(intervals, tuple(rows))


def of_constant(value: Any) -> Interval | None:
    """The interval of a tensor of integers, with its values; None for floats and for what is no tensor."""
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        return None
    low, high = (int(value.min()), int(value.max())) if value.numel() else (0, 0)
    return Interval(low, high, tuple(value.shape), array(value))


def _of_node(
    node: fx.Node, intervals: dict[fx.Node, Interval | None], rows: list[Row], sizes: tuple[int | None, ...]
) -> Interval | None:
    op, dtype = op_of(node), dtype_of(node)
    if dtype is not None and (dtype.is_floating_point or dtype.is_complex):
        return None
    if op is not None and op.bounds is not None:
        bounds = _ruled(node, intervals)
        rows += [Row(site_of(node), op.name, bound) for bound in bounds.inside]
        return Interval(bounds.lo, bounds.hi, sizes)
    if op is not None and moves_data(node):
        source = intervals.get(tensor_args(node)[0])
        return None if source is None else Interval(source.lo, source.hi, sizes)
    if dtype is None:
        return None
    if dtype is torch.bool:
        return Interval(0, 1, sizes)
    info = torch.iinfo(dtype)
    return Interval(int(info.min), int(info.max), sizes)


def _ruled(node: fx.Node, intervals: dict[fx.Node, Interval | None]) -> Bounds:
    op = op_of(node)
    known: Any = intervals.get
    args: Any = fx.node.map_arg(node.args, known)
    kwargs: Any = fx.node.map_arg(node.kwargs, known)
    try:
        return op.bounds(*args, **kwargs)  # type: ignore[union-attr, misc]
    except (ValueError, TypeError, AttributeError) as err:  # the last two: floats, or nothing, where integers belong
        raise VerifyError(
            f"nothing bounds this {op.name}: {err}",  # type: ignore[union-attr]
            where=site_of(node),
            do="its operands must be integers, its weights and tables constants",
        ) from err


def _sizes(node: fx.Node, longest: int | None) -> tuple[int | None, ...]:
    """The largest length of each dimension; parts of a split have none that are known."""
    value = node.meta.get("val")
    shape = value.shape if isinstance(value, torch.Tensor) else node.meta.get("type", {}).get("shape", ())
    return tuple(_size(s, longest) for s in shape)


def _size(size: Any, longest: int | None) -> int | None:
    if isinstance(size, str):
        return longest if size == LENGTH else None
    largest = largest_size(size, UNBOUNDED)
    return None if largest == UNBOUNDED else largest
