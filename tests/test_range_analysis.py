"""Range analysis: bounds that adversarial codes reach and random ones never leave; graphs that overflow are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import CONFIGS, calibrated, converted
from families import batch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_cases import CASES, GRID, Operand, constant, every, linear_case
from integer_traces import TRACES
from torch import fx, nn

from kdlsq_fx.api import convert, from_pretrained, prepare_qat
from kdlsq_fx.backends.reference import ReferenceModel
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.cli import main
from kdlsq_fx.errors import InputError, LoweringError, VerifyError
from kdlsq_fx.graph import fetch, put, sited
from kdlsq_fx.op import BY_NAME, op_of
from kdlsq_fx.ops.int_gelu import gelu_constants
from kdlsq_fx.ops.int_mean import LONGEST, mean_constants, numpy_int_mean
from kdlsq_fx.ops.int_norm import norm_constants
from kdlsq_fx.ops.int_softmax import exp_table, prob_divider, score_grid
from kdlsq_fx.pipeline import graph_pass
from kdlsq_fx.presets import build
from kdlsq_fx.qconfig import Rule
from kdlsq_fx.range_analysis import Ranges, analyse_ranges
from kdlsq_fx.ranges import INT32_MAX, Bound, Bounds, Interval, demand_int32, dot_bound, magnitude
from kdlsq_fx.verify import verify

torch.set_num_threads(1)


def both(name: str, args: list[Any]) -> tuple[Bounds, Any, dict[str, Any]]:
    """The rule's bounds, and the result and the intermediates of Python's integers."""
    bounds = BY_NAME[name].bounds(*every(args, lambda o: o.known))  # type: ignore[misc]
    return bounds, *TRACES[name](*every(args, lambda o: o.held))


# ---- random operands never leave what was computed for them


def assert_within(bounds: Bounds, result: Any, inside: dict[str, Any], where: str = "") -> None:
    named = {b.name: b for b in bounds.inside}
    for name, values in [*inside.items(), ("result", result)]:
        bound = Bound(name, bounds.lo, bounds.hi, 0) if name == "result" else named.get(name)
        if bound is not None:
            assert bound.low <= np.min(values) and np.max(values) <= bound.high, (where, bound)
    assert {name for name, b in named.items() if b.least is None} <= inside.keys()


def test_every_primitive_has_a_rule_and_a_case() -> None:
    primitives = {name for name in BY_NAME if name.startswith("int_") or name in ("requantize", "lookup")}
    assert primitives == CASES.keys() == TRACES.keys()
    assert all(BY_NAME[name].bounds is not None for name in primitives)


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_operands_stay_inside(name: str, seed: int) -> None:
    args = CASES[name](np.random.default_rng(seed))
    bounds, result, inside = both(name, args)
    assert_within(bounds, result, inside, name)
    assert all(b.fits for b in bounds.inside)  # then 64 bits, and 32 for products, give what no width limits:
    np.testing.assert_array_equal(BY_NAME[name].numpy(*every(args, lambda o: o.held)), result)  # type: ignore[misc]


@given(seed=st.integers(0, 2**32 - 1))
def test_what_the_lowering_lets_pass_the_analysis_does_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w, bias, zero, _ = linear_case(rng)
    bias = None if bias is None else constant(rng.integers(-INT32_MAX, INT32_MAX, 5))
    bound = dot_bound(w.held, magnitude(x.known.lo, x.known.hi, zero), None if bias is None else bias.held)
    found = every([x, w, bias, zero, bound], lambda o: o.known)
    fits = all(b.fits for b in BY_NAME["int_linear"].bounds(*found).inside)  # type: ignore[misc]
    try:
        demand_int32(bound, "here")
    except LoweringError:
        return
    assert fits


# ---- adversarial operands reach them


def assert_reached(bounds: Bounds, result: Any, inside: dict[str, Any], *names: str) -> None:
    """The result, and the intermediates named, take both ends of their intervals."""
    assert_within(bounds, result, inside)
    assert (np.min(result), np.max(result)) == (bounds.lo, bounds.hi)
    for bound in bounds.inside:
        if bound.name in names:
            assert (np.min(inside[bound.name]), np.max(inside[bound.name])) == (bound.low, bound.high), bound


@pytest.mark.parametrize("zero", [-128, -5, 0, 127])
def test_products_reach_their_bounds(zero: int) -> None:
    rng = np.random.default_rng(1)
    w, bias = rng.integers(-128, 128, (5, 12)), rng.integers(-900, 900, 5)
    worst = np.concatenate([np.where(w > 0, 127, -128), np.where(w > 0, -128, 127)])
    known = Interval(-128, 127, (None, 12))
    reach = both("int_linear", [Operand(known, worst), constant(w), constant(bias), zero])
    assert_reached(*reach, "accumulator")
    args = [
        Operand(known, worst.reshape(10, 4, 3)),
        constant(w.reshape(5, 4, 3)),
        constant(bias),
        [1],
        [0],
        [1],
        1,
        zero,
    ]
    assert_reached(*both("int_conv1d", args), "accumulator")
    a, b = (np.repeat([[-128], [127]], 9, axis=1)[:, None, :] for _ in range(2))
    args = [Operand(Interval(-128, 127, (9,)), a[:, None]), Operand(Interval(-128, 127), b.swapaxes(-1, -2)), 3, zero]
    if zero in (-5, 0):
        assert_reached(*both("int_matmul", args), "accumulator")


def test_fixed_point_reaches_its_bounds() -> None:
    low, high = -(2**31), 2**31 - 1
    acc = Operand(Interval(low, high), np.array([[low] * 3, [high] * 3]))
    factors, shifts = constant(np.array([2**31 - 1, 2**30, 5])), constant(np.array([58, 40, 3]))
    assert_reached(*both("requantize", [acc, factors, shifts, 3, -(2**20), 2**20]), "acc * multiplier")
    assert_reached(*both("requantize", [acc, 2**30, 52, 3, -(2**20), 2**20]), "acc * multiplier")
    ties = Operand(Interval(1, 5), np.array([1, 5]))  # 0.5 and 2.5: both to the even side
    assert_reached(*both("requantize", [ties, 1, 1, 0, -9, 9]), "acc * multiplier")
    names = ("sum", "term 0 * multiplier", "term 1 * multiplier")
    args = [[acc, acc], [factors, 77], [0, 0], 45, 0, -(2**21), 2**21 - 1]
    assert_reached(*both("int_add", args), *names)
    table = constant(np.arange(256)[::-1] - 128)
    assert_reached(*both("lookup", [Operand(Interval(-100, 90), np.array([-100, 90])), table, -128]), "index")


@pytest.mark.parametrize("table", [True, False])
def test_softmax_reaches_its_bounds(table: bool) -> None:
    low, high = -70000, 90000
    rows = np.array([[high] + [low] * 7, [high] * 8])
    keep = np.array([[[True] * 8] * 2, [[True] + [False] * 7] * 2, [[False] * 8] * 2])
    args = [
        Operand(Interval(low, high, (None, 8)), np.stack([rows] * 3)),
        Operand(Interval(0, 1), keep),
        constant(exp_table()) if table else None,
        *score_grid(1e-4, table=table),
        prob_divider(1 / 4000),
        *(7, 0, 2**14),
    ]
    assert_reached(*both("int_softmax", args), "u", "u * multiplier", "e", "e * divider", "sum(e) * 2**22")


def test_layer_norm_reaches_its_bounds_or_comes_near() -> None:
    """Sums, y: reached. v: within n / 4, what rounding the mean may add. t: within 0.1 %, as n is 1,000 and no more."""
    n, low, high = 1000, -(2**21), 2**21 - 1
    one = np.full(n, low)
    one[0] = high
    x = np.stack([np.full(n, low), np.full(n, high), one, -1 - one, np.tile([low, high], n // 2)])
    c = norm_constants(np.full(n, 1.7), np.zeros(n), n, 1e-4, 1e-6, 1e-12, low, high)
    args = [Operand(Interval(low, high), x), constant(c.gain), constant(c.offset), c.fraction, c.eps, c.shift]
    bounds, result, inside = both("int_layer_norm", [*args, 0, -(2**31), 2**31 - 1])
    assert_within(bounds, result, inside)
    named = {b.name: b for b in bounds.inside}
    total, v, y, t = (named[k] for k in ("sum(x) << fraction", "v", "y * f", "t * gain"))
    assert (total.low, total.high) == (min(inside[total.name])[0], max(inside[total.name])[0])
    assert (y.low, y.high) == (np.min(inside["y"]) * 2**31, np.max(inside["y"]) * 2**31)
    assert v.low == np.min(inside["v"]) and 0 <= v.high - np.max(inside["v"]) <= n
    assert 0.999 * t.high <= np.max(inside["t * gain"]) and 0.999 * t.low >= np.min(inside["t * gain"])
    assert 0.999 * bounds.hi <= np.max(result) and 0.999 * bounds.lo >= np.min(result)


def test_gelu_reaches_its_high_end_and_a_seventh_of_its_low_end() -> None:
    codes = np.arange(-(2**15), 2**15)
    args = [Operand(Interval(-(2**15), 2**15 - 1), codes), 9, *gelu_constants(2.0**-12, 1e-5), 0, -(2**21), 2**21]
    bounds, result, inside = both("int_gelu", args)
    assert_within(bounds, result, inside)
    named = {b.name: b for b in bounds.inside}
    for name in ("x * multiplier", "w"):
        assert (named[name].low, named[name].high) == (np.min(inside[name]), np.max(inside[name]))
    out = named["x * w * out_multiplier"]
    assert bounds.hi == np.max(result) and out.high == np.max(inside[out.name])
    assert 8 * np.min(result) <= bounds.lo < 0 and 8 * np.min(inside[out.name]) <= out.low


def test_mean_reaches_its_bounds() -> None:
    x = np.stack([np.full((6, 2), low) for low in (-500, 900)])
    args = [Operand(Interval(-500, 900, (None, 6, 2)), x), Operand(Interval(0, 1), np.ones((2, 6), bool))]
    ints = mean_constants(1.0, 0.5, 6, 900)
    bounds, result, inside = both("int_mean", [*args, 0, *ints, 0, -4000, 4000])
    assert_reached(bounds, result, inside, "s * multiplier")
    count = next(b for b in bounds.inside if b.name == "n << shift")
    assert count.high == np.max(inside["n << shift"])
    with pytest.raises(InputError, match="1048577 tokens"):
        numpy_int_mean(np.zeros((1, LONGEST + 1, 1), np.int8), np.ones((1, LONGEST + 1), bool), 0, *ints, *GRID)


# ---- whole models


def run_and_watch(model: Any, data: dict[str, torch.Tensor], see: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
    """Run the NumPy reference; ``see(step, arguments, result)`` at every node."""
    reference = ReferenceModel(model.gm)

    def watched(step: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = step.function(*args, **kwargs)
            see(step, (args, kwargs), result)
            return result

        return run

    reference.steps = [replace(step, function=watched(step)) for step in reference.steps]
    reference.run(data)


def integers(value: Any) -> Any:
    """Weights that the reference keeps as floats for its GEMM, as the integers they are."""
    if isinstance(value, (list, tuple)):
        return [integers(v) for v in value]
    return value.astype(np.int64) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.endswith("-int")])
def test_every_value_of_bert_lies_in_its_interval(config: str) -> None:
    model = converted(config)
    ranges = analyse_ranges(model.gm)
    intervals = {node.name: found for node, found in ranges.intervals.items()}
    rows: dict[str, list[Bound]] = {}
    for row in ranges.rows:
        rows.setdefault(row.site, []).append(row.bound)
    seen, traced = 0, 0

    def see(step: Any, given: Any, result: Any) -> None:
        nonlocal seen, traced
        known = intervals[step.name]
        if known is None:
            return
        seen += 1
        for part in result if isinstance(result, list) else [result]:
            assert known.lo <= np.min(part) and np.max(part) <= known.hi, step.site
        if step.op in TRACES and config == "W8E8A8-int":
            traced += 1
            exact, inside = TRACES[step.op](*integers(given[0]), **given[1])
            np.testing.assert_array_equal(exact, result)
            assert_within(Bounds(known.lo, known.hi, tuple(rows.get(step.site, ()))), exact, inside, step.site)

    run_and_watch(model, batch(rows=3, length=7, seed=5), see)
    assert seen >= 60 and (traced >= 40 or config != "W8E8A8-int")
    assert not ranges.broken and all(found is not None for n, found in ranges.intervals.items() if is_inner(n))


def is_inner(node: fx.Node) -> bool:
    op = op_of(node)
    return op is not None and op.name != "dequantize"


def test_a_loaded_program_has_the_same_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = converted("W8E8A8-int", "reference")
    model.save_pretrained(tmp_path / "int")
    loaded = from_pretrained(tmp_path / "int")
    assert [str(r) for r in loaded.bounds().rows] == [str(r) for r in model.bounds().rows]
    assert str(loaded.bounds()) == str(model.bounds()) and loaded.integer_only and not loaded.islands
    assert not analyse_ranges(loaded.gm).broken  # with texts of any length: the ops check it when they run
    assert main(["inspect", str(tmp_path / "int"), "--bounds"]) == 0
    text = capsys.readouterr().out
    assert "all fit" in text and "attention.self.query/linear" in text and "2147483647" in text
    assert main(["inspect", str(tmp_path / "int")]) == 0


# ---- graphs that overflow are refused


class Net(nn.Module):
    """Codes, a product, a table, a product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.kinds = nn.Embedding(50, 64), nn.Embedding(2, 64)
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids) + self.kinds((input_ids > 7).long())
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def net(qconfig: Any = "W8E8A8-int") -> Any:
    ids = {"input_ids": batch(4, 6, vocab=50)["input_ids"]}
    qat = prepare_qat(Net().eval(), qconfig, example=ids)
    calibrate(qat, [ids])
    return qat.eval()


def node_of(gm: fx.GraphModule, op: str, site: str) -> fx.Node:
    return next(n for s, n in sited(gm.graph).items() if s.startswith(site) and op_of(n).name == op)  # type: ignore[union-attr]


def break_bias(gm: fx.GraphModule) -> None:
    bias = node_of(gm, "int_linear", "first/").args[2]
    values = fetch(gm, str(bias.target)).clone()  # type: ignore[union-attr]
    values[3] = 2**31 - 20
    put(gm, str(bias.target), values)  # type: ignore[union-attr]


def break_multiplier(gm: fx.GraphModule) -> None:
    node = node_of(gm, "requantize", "first/")
    node.args = (node.args[0], 2**40, *node.args[2:])


def break_shift(gm: fx.GraphModule) -> None:
    node = node_of(gm, "requantize", "first/")
    node.args = (*node.args[:2], 63, *node.args[3:])


def break_table(gm: fx.GraphModule) -> None:
    table = node_of(gm, "lookup", "relu").args[1]
    values = fetch(gm, str(table.target)).to(torch.int32)  # type: ignore[union-attr]
    values[-1] = 2**28
    put(gm, str(table.target), values)  # type: ignore[union-attr]


def shorten_table(gm: fx.GraphModule) -> None:
    table = node_of(gm, "lookup", "relu").args[1]
    put(gm, str(table.target), fetch(gm, str(table.target))[:-1])  # type: ignore[union-attr]


def understate_bound(gm: fx.GraphModule) -> None:
    node = node_of(gm, "int_linear", "first/")
    node.kwargs = {**node.kwargs, "bound": 1000}


def unknown_weight(gm: fx.GraphModule) -> None:
    node = node_of(gm, "int_linear", "second/")
    node.args = (node.args[0], node.args[0], *node.args[2:])


@pytest.mark.parametrize(
    "change, where, message",
    [
        (
            break_bias,
            "first/linear",
            r"accumulator of int_linear can be -?\d+\.\.214[78]\d{6}, its limits are .*2147483647",
        ),
        (
            break_multiplier,
            "first/linear/q",
            r"multiplier of requantize is 1099511627776, its limits are 0\.\.2147483647",
        ),
        (break_shift, "first/linear/q", r"shift of requantize is 63, its limits are 1\.\.62"),
        (
            break_table,
            "second/linear",
            r"accumulator of int_linear can be .*, its limits are -2147483647\.\.2147483647",
        ),
        (shorten_table, "relu/q", r"index of lookup can be 0\.\.254, its limits are 0\.\.253"),
        (understate_bound, "first/linear", r"stated bound of int_linear is 1000, its limits are \d{6,}\.\."),
        (unknown_weight, "second/linear", "its weight is no constant"),
    ],
)
def test_hand_broken_graphs_are_refused_by_site_and_bound(
    change: Callable[[fx.GraphModule], None], where: str, message: str
) -> None:
    gm = convert(net()).gm
    verify(gm)
    change(gm)
    with pytest.raises(VerifyError, match=message) as caught:
        verify(gm)
    assert caught.value.where == where


def test_a_broken_table_of_exponentials_is_refused() -> None:
    @graph_pass("int")
    def grow(gm: fx.GraphModule) -> None:
        node = node_of(gm, "int_softmax", "bert.encoder.layer.0")
        table = fetch(gm, str(node.args[2].target)).clone()  # type: ignore[union-attr]
        table[5] = 2**15 + 1
        put(gm, str(node.args[2].target), table)  # type: ignore[union-attr]

    with pytest.raises(VerifyError, match=r"e of int_softmax can be 0\.\.32769, its limits are 0\.\.32768") as caught:
        convert(calibrated("W8E8A8-int"), passes=[grow])
    assert caught.value.where.startswith("bert.encoder.layer.0.attention.self/")


# ---- integers only


def test_a_float_in_an_integer_only_graph_is_refused() -> None:
    @graph_pass("int")
    def move_floats(gm: fx.GraphModule) -> None:
        """dequantize -> view: a mover of floats, which is no island of its own"""
        (out,) = gm.graph.find_nodes(op="output")
        value = out.args[0][0]
        with gm.graph.inserting_before(out):
            new = gm.graph.call_function(torch.ops.aten.view.default, (value, [-1, 3]))
        new.meta["val"] = value.meta["val"].view(-1, 3)
        out.args = ((new,),)

    with pytest.raises(VerifyError, match="integer-only, yet 2 nodes make floats") as caught:
        convert(net(), passes=[move_floats])
    assert caught.value.where == "second/linear/real"


def test_islands_are_refused_where_integers_were_promised() -> None:
    qat = net(build("W8E8A8-int").with_rules(Rule(site="first/*", op="linear", weight=None, act=None)))
    with pytest.raises(LoweringError, match=r"(?s)\d ops stay in floats.*first/linear \(linear\): its.*allow_islands"):
        convert(qat)
    kept = convert(qat, allow_islands=True)
    assert {i.site for i in kept.islands} >= {"first/linear"} and not kept.integer_only
    with pytest.raises(LoweringError, match="promises integers"):
        convert(net("W8E8A8"), allow_islands=False)  # what the kdlsq placement leaves in float, refused on demand
    assert convert(net("W8E8A8")).islands


def test_convert_lists_the_islands_and_keeps_them_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrated("W8E8A8-int", "modernbert").save_pretrained(tmp_path / "qat")
    command = ["convert", str(tmp_path / "qat"), str(tmp_path / "int")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "ops stay in floats" in said and "--allow-islands" in said and "more" in said
    assert main([*command, "--allow-islands"]) == 0
    loaded = from_pretrained(tmp_path / "int")
    assert loaded.islands and not loaded.integer_only and "all fit" in str(loaded.bounds())
    assert main(["inspect", str(tmp_path / "qat"), "--bounds"]) == 1


def test_the_ranges_of_an_empty_graph() -> None:
    assert "site" in str(Ranges({}, ()))
