"""The exact search of a family, against enumeration of every member of tiny tables."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdlsq_fx.errors import ConfigError
from kdlsq_fx.family import Member
from kdlsq_fx.family_search import Tables, best, near, proposals, smallest, steps_from, within


def tables(seed: int, *, switches: int = 4, widths: tuple[int, ...] = (2, 4, 8), blocks: int = 2) -> Tables:
    rng = np.random.default_rng(seed)
    owner = tuple(int(b) for b in rng.integers(-1, blocks, switches))
    loss = rng.random((switches, len(widths))) - 0.1
    loss[:, -1] = 0.0
    sizes = rng.integers(1, 50, switches)[:, None] * np.array(widths, float)
    depths = {(): 0.0, (0,): 0.3 * rng.random(), (0, 1): 1.0}
    costs = {"bytes": sizes, "ms": np.zeros_like(sizes)}
    per_block = {"bytes": rng.random(blocks) * 5, "ms": np.array([1.0, 2.0])}
    fixed = {"bytes": 20.0, "ms": 7.0}
    return Tables(widths, tuple(map(str, range(switches))), owner, loss, costs, fixed, per_block, depths)


def enumerated(t: Tables, budgets: dict[str, float]) -> list[tuple[float, Member]]:
    """Every member that keeps the budgets, written as plain loops; switches that are gone stand at the largest."""
    found = []
    for gone, base in t.depths.items():
        here = [i for i, b in enumerate(t.blocks) if b not in gone or b < 0]
        for pick in itertools.product(range(len(t.bits)), repeat=len(here)):
            loss, cost = base, {c: t.fixed[c] - sum(t.per_block[c][b] for b in gone) for c in budgets}
            bits = [t.bits[-1]] * len(t.names)
            for i, k in zip(here, pick):
                loss += t.loss[i][k]
                bits[i] = t.bits[k]
                for c in budgets:
                    cost[c] += t.costs[c][i][k]
            if all(cost[c] <= most for c, most in budgets.items()):
                found.append((float(loss), Member(tuple(bits), gone)))
    return sorted(found, key=lambda pair: pair[0])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0))
def test_the_best_few_are_those_that_enumeration_finds(seed: int, share: float) -> None:
    t = tables(seed)
    everything = enumerated(t, {"bytes": np.inf})
    sizes = [t.cost("bytes", m) for _, m in everything]
    budget = min(sizes) + share * (max(sizes) - min(sizes))
    want = enumerated(t, {"bytes": budget})
    found = best(t, {"bytes": budget}, 5)
    assert len(found) == min(5, len(want)) == len(set(found))
    np.testing.assert_allclose([t.expected(m) for m in found], [loss for loss, _ in want[: len(found)]], atol=1e-9)
    assert all(t.cost("bytes", m) <= budget for m in found)
    assert smallest(t) == pytest.approx(min(sizes))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pair", [(2, 4), (4, 8)])
def test_the_best_of_two_widths_is_that_of_enumeration(seed: int, pair: tuple[int, int]) -> None:
    t = tables(seed)
    budget = (t.cost("bytes", Member((4,) * 4, ())) + t.cost("bytes", Member((pair[0],) * 4, ()))) / 2
    kept = [
        (loss, m)
        for loss, m in enumerated(t, {"bytes": budget})
        if all(b in pair for b, there in zip(m.bits, t.there(m.left_out)) if there)
    ]
    found = best(within(t, *pair), {"bytes": budget})
    assert [t.expected(m) for m in found] == pytest.approx([loss for loss, _ in kept[:1]])
    assert all(b in pair for b, there in zip(found[0].bits, t.there(found[0].left_out)) if there)


@pytest.mark.parametrize("seed", range(6))
def test_the_search_goes_on_from_a_member(seed: int) -> None:
    """Single steps from a member, at its depth: the best with at most so many moves is what enumeration finds."""
    t, rng = tables(seed), np.random.default_rng(seed)
    member = Member(tuple(int(b) for b in rng.choice(t.bits, 4)), [(), (0,)][seed % 2])
    steps = steps_from(t, member)
    assert all(
        sum(a != b for a, b in zip(m.bits, member.bits)) == 1 and m.left_out == member.left_out for _, m in steps
    )
    more = {step: float(rng.random() - 0.6) for step, _ in steps}
    around, budget = near(t, member, more), t.cost("bytes", member) + 40
    for moves in range(4):
        want = []
        for pick in itertools.product(range(len(t.bits)), repeat=4):
            other = Member(tuple(t.bits[k] for k in pick), member.left_out)
            changed = [(i, k) for i, k in enumerate(pick) if t.bits[k] != member.bits[i]]
            if len(changed) <= moves and all(c in more for c in changed) and t.cost("bytes", other) <= budget:
                want.append(sum(more[c] for c in changed))
        found = best(around, {"bytes": budget, "moves": moves})[0]
        assert around.expected(found) == pytest.approx(min(want)) and t.cost("bytes", found) <= budget
        assert around.cost("moves", found) <= moves and around.expected(member) == 0.0


def test_a_latency_budget_acts_through_the_blocks() -> None:
    t = tables(3)
    assert best(t, {"bytes": 1e9, "ms": 5.0})[0].left_out == (0, 1)  # 7 - 1 - 2 is the first at or below 5
    assert {m.left_out for m in best(t, {"ms": 6.0}, 4)} <= {(0,), (0, 1)}


@pytest.mark.parametrize(("budgets", "says"), [({"bytes": 1.0}, "below the smallest"), ({"watts": 1.0}, "no table")])
def test_what_cannot_be_kept_is_an_error(budgets: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        best(tables(1), budgets)


def test_a_budget_is_kept_to_the_byte() -> None:
    """The solver's tolerance is wider than a byte of a table of millions."""
    sizes = np.array([[3e6 + 1, 1.2e7], [7.0, 8.0]])
    t = Tables((2, 8), ("a", "b"), (-1, -1), np.array([[1.0, 0.0], [1.0, 0.0]]), {"bytes": sizes}, {"bytes": 0.0},
               {"bytes": np.zeros(0)}, {(): 0.0})  # fmt: skip
    assert best(t, {"bytes": 1.2e7 + 8})[0].bits == (8, 8)
    assert best(t, {"bytes": 1.2e7 + 7})[0].bits == (8, 2)
    assert best(t, {"bytes": 1.2e7 + 6})[0].bits == (2, 8)


def test_the_error_names_the_smallest_size() -> None:
    t = tables(1)
    big = Tables(t.bits, t.names, t.blocks, t.loss, {"bytes": t.costs["bytes"] * 2**20}, {"bytes": 0.0},
                 {"bytes": np.zeros(2)}, {(): 0.0})  # fmt: skip
    least = sum(min(row) for row in t.costs["bytes"])
    with pytest.raises(ConfigError, match=f"{least:g} MiB"):
        best(big, {"bytes": 2**20})
    assert best(big, {"bytes": least * 2**20})[0].bits == (2,) * 4


@pytest.mark.parametrize(("seed", "share"), [(0, 0.3), (1, 0.6), (2, 1.0), (3, 0.05)])
def test_proposals_are_the_best_of_all_and_of_neighbouring_widths_and_the_uniform_ones(seed: int, share: float) -> None:
    t = tables(seed)
    sizes = [t.cost("bytes", m) for _, m in enumerated(t, {"bytes": np.inf})]
    budget = {"bytes": min(sizes) + share * (max(sizes) - min(sizes))}
    found = proposals(t, budget, 3)
    fitting = [m for _, m in enumerated(t, budget)]
    assert found[: min(3, len(fitting))] == fitting[:3] and len(set(found)) == len(found)
    for pair in ((2, 4), (4, 8)):
        there = [m for m in fitting if {b for b, on in zip(m.bits, t.there(m.left_out)) if on} <= set(pair)]
        assert not there or min(t.expected(m) for m in found if m in there) == t.expected(there[0])
    uniform = [Member((bits,) * 4) for bits in t.bits]
    assert {m for m in uniform if t.keeps(m, budget)} <= set(found) <= set(fitting)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0), more=st.sampled_from([3, 30, 700]))
def test_a_member_over_by_its_header_is_passed_by(seed: int, share: float, more: int) -> None:
    """Exact sizes are some bytes above the tables' sums, of tables as large as a vocabulary's; the search ends."""
    t = tables(seed)
    costs = {**t.costs, "bytes": np.round(t.costs["bytes"]) * 30_000}
    t = replace(t, costs=costs, per_block={**t.per_block, "bytes": np.round(t.per_block["bytes"])})
    exact = replace(t, bytes_of=lambda m: t.bound("bytes", m) + more)
    sums = [t.bound("bytes", m) for _, m in enumerated(t, {"bytes": np.inf})]
    budget = np.round(min(sums) + share * (max(sums) - min(sums))) + more
    (found,) = best(exact, {"bytes": budget})
    assert t.expected(found) == pytest.approx(enumerated(t, {"bytes": budget - more})[0][0], abs=1e-9)
