"""The best members of a family under budgets, by exact optimization over tables; nothing is run here.

A member's loss is taken to be the loss of its blocks being left out plus what each switch adds on its own: the tables
hold what was measured for one change at a time. For each set of blocks that may be left out, one binary variable says
"this switch has this width"; SciPy's HiGHS solves it exactly. The next best is found by forbidding the best.

Changes are not independent: many together cost more than their sum, and most where wide and narrow stand side by side.
So :func:`within` holds the search to a few widths, and :func:`near` makes tables again around a member that was found,
of single steps from there; the same search goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .family import Member

Array = NDArray[np.float64]
COSTS = ("bytes", "bitops", "ms")
UNITS = {"bytes": (2**20, "MiB"), "bitops": (1e9, "G bit operations"), "ms": (1.0, "ms")}


@dataclass(frozen=True)
class Tables:
    """What the search knows.

    ``bits`` [W] the widths; ``names`` [S] the switches; ``blocks`` [S] the block that a switch belongs to, -1: none.
    ``loss`` [S, W]: how much more the loss is with this switch alone at this width, all others at the largest (or, in
    tables of :func:`near`, as in its member); NaN: not to be taken.
    ``costs`` name -> [S, W], of each switch; ``fixed`` name -> the rest of the model with all blocks;
    ``per_block`` name -> [B], what goes with a block besides its switches. ``depths``: set of blocks left out -> how
    much more the loss is with all switches at the largest width. ``bytes_of``: a member's size to the byte, which
    its sum over the tables is at most.
    """

    bits: tuple[int, ...]
    names: tuple[str, ...]
    blocks: tuple[int, ...]
    loss: Array
    costs: Mapping[str, Array]
    fixed: Mapping[str, float]
    per_block: Mapping[str, Array]
    depths: Mapping[tuple[int, ...], float]
    bytes_of: Callable[[Member], float] | None = None

    def rest(self, cost: str, left_out: tuple[int, ...]) -> float:
        """What everything but the switches costs."""
        return float(self.fixed[cost] - self.per_block[cost][list(left_out)].sum())

    def there(self, left_out: tuple[int, ...]) -> NDArray[np.bool_]:
        """[S]: the switches that are still part of the model."""
        return ~np.isin(self.blocks, left_out) | (np.asarray(self.blocks) < 0)

    def chosen(self, member: Member) -> Array:
        """[S, W] of 0 and 1; rows of switches in left-out blocks are 0."""
        picked = np.asarray(member.bits)[:, None] == np.asarray(self.bits)[None, :]
        return picked * self.there(member.left_out)[:, None].astype(np.float64)

    def bound(self, cost: str, member: Member) -> float:
        """What a member costs by the tables: all of it, but for some bytes of a file's header."""
        return self.rest(cost, member.left_out) + float((self.chosen(member) * self.costs[cost]).sum())

    def cost(self, cost: str, member: Member) -> float:
        """What a member costs."""
        exact = cost == "bytes" and self.bytes_of is not None
        return float(self.bytes_of(member)) if exact else self.bound(cost, member)  # type: ignore[misc]

    def keeps(self, member: Member, budgets: Mapping[str, float]) -> bool:
        """Whether a member costs at most what each budget (cost -> at most) allows."""
        return all(self.cost(cost, member) <= most for cost, most in budgets.items())

    def expected(self, member: Member) -> float:
        """The loss above that of the largest member, were all changes independent."""
        return self.depths[member.left_out] + float(self.loss[self.chosen(member) > 0].sum())


def smallest(tables: Tables, cost: str = "bytes") -> float:
    """The least that any member costs."""
    bits = tuple(tables.bits[k] for k in tables.costs[cost].argmin(axis=1))
    return min(tables.cost(cost, Member(bits, d)) for d in tables.depths)


def best(tables: Tables, budgets: Mapping[str, float], count: int = 1) -> list[Member]:
    """The ``count`` members of least expected loss that keep every budget (cost -> at most), best first; fewer where
    there are no more. Where sizes are exact (``bytes_of``), a member may be missed that is nearer to its budget than
    the digits of its header are to those of the smallest: some ten bytes. ConfigError where a budget is
    below what the smallest member costs, which it names."""
    check_budgets(tables, budgets)
    forbidden: dict[tuple[int, ...], list[Array]] = {d: [] for d in tables.depths}
    open_: dict[tuple[int, ...], Member | None] = {d: _solve(tables, budgets, d, []) for d in tables.depths}
    found: list[Member] = []
    while len(found) < count:
        candidates = [m for m in open_.values() if m is not None]
        if not candidates:
            break
        winner = min(candidates, key=tables.expected)
        found.append(winner)
        forbidden[winner.left_out].append(tables.chosen(winner))
        open_[winner.left_out] = _solve(tables, budgets, winner.left_out, forbidden[winner.left_out])
    return found


def proposals(tables: Tables, budgets: Mapping[str, float], count: int) -> list[Member]:
    """Members to measure, for tables only add changes up: the ``count`` best, the best of each two neighbouring widths,
    and every uniform member that keeps the budgets."""
    pairs = [m for pair in pairwise(tables.bits) for m in best(within(tables, *pair), budgets)]
    uniform = [Member((bits,) * len(tables.names)) for bits in tables.bits]
    return list(
        dict.fromkeys([*best(tables, budgets, count), *pairs, *(m for m in uniform if tables.keeps(m, budgets))])
    )


def within(tables: Tables, low: int, high: int) -> Tables:
    """Tables of the members whose widths all lie from ``low`` to ``high``."""
    bits = np.asarray(tables.bits)
    return replace(tables, loss=np.where((bits < low) | (bits > high), np.nan, tables.loss))


def near(tables: Tables, member: Member, losses: Mapping[tuple[int, int], float]) -> Tables:
    """Tables of the members whose switches are at most one width from ``member``'s, at its depth. ``losses``:
    (switch, index of the width) -> how much more the loss is than ``member``'s, for each such single step. A cost
    ``"moves"`` counts the switches that differ from ``member``."""
    at = np.array([tables.bits.index(b) for b in member.bits])
    loss = np.full_like(tables.loss, np.nan)
    loss[np.arange(len(at)), at] = 0.0
    for step, more in losses.items():
        loss[step] = more
    moves = (np.arange(len(tables.bits))[None, :] != at[:, None]).astype(np.float64)
    costs, fixed = {**tables.costs, "moves": moves}, {**tables.fixed, "moves": 0.0}
    per_block = {**tables.per_block, "moves": np.zeros_like(tables.per_block["bytes"])}
    depths = {member.left_out: 0.0}
    return replace(tables, loss=loss, costs=costs, fixed=fixed, per_block=per_block, depths=depths)


def steps_from(tables: Tables, member: Member) -> list[tuple[tuple[int, int], Member]]:
    """Every member one width of one switch away: ((switch, index of its width), member)."""
    found = []
    for i in np.flatnonzero(tables.there(member.left_out)):
        at = tables.bits.index(member.bits[i])
        for k in (at - 1, at + 1):
            if 0 <= k < len(tables.bits):
                bits = (*member.bits[:i], tables.bits[k], *member.bits[i + 1 :])
                found.append(((int(i), k), replace(member, bits=bits)))
    return found


def check_budgets(tables: Tables, budgets: Mapping[str, float]) -> None:
    """ConfigError for a cost that is not in the tables, and for a budget that no member keeps."""
    for cost, most in budgets.items():
        if cost not in tables.costs:
            raise ConfigError(f"there is no table of {cost!r}", do=f"budgets are of {', '.join(tables.costs)}")
        refuse_below(most, smallest(tables, cost), cost)


def refuse_below(most: float, least: float, cost: str = "bytes") -> None:
    """ConfigError where a budget is below what the smallest member costs; it names that."""
    if most < least:
        size, unit = UNITS[cost] if cost != "bytes" or least >= UNITS[cost][0] / 10 else (1.0, cost)
        enough = f"{np.ceil(1e4 * least / size) / 1e4:.4f}".rstrip("0").rstrip(".")
        asked = f"{most:.0f}" if unit == "bytes" else f"{most / size:.4g}"
        what = f"a budget of {asked} {unit} is below the smallest model, {enough} {unit}"
        do = f"ask for at least {enough} {unit}, "
        do += "allow narrower widths (--bits), " * (cost != "ms") + "or more blocks to be left out (--leave-out)"
        do += "; times vary from run to run, so leave some room" * (cost == "ms")
        raise ConfigError(what, where=f"budget of {cost}", do=do)


def _solve(
    tables: Tables, budgets: Mapping[str, float], left_out: tuple[int, ...], forbidden: list[Array]
) -> Member | None:
    """The best member of one depth, or None. ``forbidden``: members found before."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    there = tables.there(left_out)
    rows, width = int(there.sum()), len(tables.bits)
    rooms = {cost: most - tables.rest(cost, left_out) for cost, most in budgets.items()}
    if not rows:
        member = Member((tables.bits[-1],) * len(there), left_out)
        return member if not forbidden and tables.keeps(member, budgets) else None
    one_each = LinearConstraint(np.kron(np.eye(rows), np.ones(width)), 1, 1)
    cuts = [LinearConstraint(old[there].reshape(1, -1), -np.inf, rows - 1) for old in forbidden]
    loss = tables.loss[there].reshape(-1)
    open_ = np.isfinite(loss).astype(np.float64)
    loss = np.nan_to_num(loss)
    loss = loss / max(float(np.abs(loss).max()), 1e-30)
    while all(room >= tables.costs[cost][there].min(axis=1).sum() for cost, room in rooms.items()):
        limited = []
        for cost, room in rooms.items():
            # The solver's tolerance, 1e-6, is absolute: a tenth of a byte, else of the largest entry.
            size = 1e5 if cost == "bytes" else max(float(tables.costs[cost].max()), 1e-30)
            limited.append(LinearConstraint(tables.costs[cost][there].reshape(1, -1) / size, -np.inf, room / size))
        found = milp(
            loss, integrality=np.ones(rows * width), bounds=Bounds(0, open_), constraints=[one_each, *limited, *cuts],
            options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if found.x is None:
            return None
        bits = np.full(len(there), tables.bits[-1])  # switches that are gone stand at the largest width
        bits[there] = np.asarray(tables.bits)[found.x.reshape(rows, width).argmax(axis=1)]
        member = Member(tuple(int(b) for b in bits), left_out)
        if tables.keeps(member, budgets):
            return member
        spare = {cost: rooms[cost] + tables.rest(cost, left_out) - tables.bound(cost, member) for cost in budgets}
        if min(spare.values()) >= 0:
            # Over by some bytes of the header, as members of that sum are, and they may be many.
            rooms["bytes"] -= spare["bytes"] + 0.5
        else:  # over by less than the solver's tolerance
            cuts.append(LinearConstraint(tables.chosen(member)[there].reshape(1, -1), -np.inf, rows - 1))
    return None
