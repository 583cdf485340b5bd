"""The runner file: alone with NumPy, bit for bit the reference, and clear about what it cannot run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import converted
from families import batch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from kdlsq_fx import ops, run_int
from kdlsq_fx.api import convert, prepare_qat
from kdlsq_fx.backends.reference import ReferenceModel
from kdlsq_fx.calibration import calibrate
from kdlsq_fx.files import CONSTANTS
from kdlsq_fx.op import BY_NAME
from kdlsq_fx.ops.int_gelu import gelu_constants
from kdlsq_fx.ops.int_mean import mean_constants
from kdlsq_fx.ops.int_norm import norm_constants
from kdlsq_fx.ops.int_softmax import exp_table, prob_divider, score_grid
from kdlsq_fx.program import PROGRAM, save_program
from kdlsq_fx.run_int import ProgramError

assert ops  # fills the op table


# One op at a time: its own sample, as a program of one node


def integers(value: Any) -> Any:
    """A sample for integer programs: float tensors, numbers and dtypes as integers."""
    if isinstance(value, (list, tuple)):
        return [integers(v) for v in value]
    if isinstance(value, dict):
        return {k: integers(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.round().clamp(-100, 100).to(torch.int32)
    if isinstance(value, float):
        return int(max(value, -7))
    return torch.int64 if value == torch.float32 else value


def one_op(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[fx.GraphModule, dict[str, torch.Tensor], Any]:
    """A graph of one op (integer tensors are its inputs, float ones its constants), its inputs, and torch's result."""
    graph, root, inputs = fx.Graph(), nn.Module(), dict[str, torch.Tensor]()

    def placed(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [placed(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            root.register_buffer("scale", value)
            return graph.get_attr("scale")
        node = graph.placeholder(f"x{len(inputs)}")
        node.meta["val"] = inputs[node.name] = value
        return node

    placed_args = tuple(placed(a) for a in args)
    node = graph.call_function(BY_NAME[name].target, placed_args, {k: placed(v) for k, v in kwargs.items()})
    result = BY_NAME[name].target(*args, **kwargs)
    node.meta.update(val=result, site=f"here/{name}")
    graph.output((node,))
    return fx.GraphModule(root, graph), inputs, result


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {k: v.numpy() for k, v in inputs.items()}


@pytest.mark.parametrize("name", sorted(run_int.OPS))
def test_every_op_is_the_declared_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    sample = BY_NAME[name].sample
    assert sample is not None
    args, kwargs = sample()
    if name != "dequantize":
        args, kwargs = integers(args), integers(kwargs)
    gm, inputs, want = one_op(name, args, kwargs)
    save_program(gm, tmp_path)
    assert json.loads((tmp_path / PROGRAM).read_text())["integer_only"]
    for exact in (False, True):
        (got,) = run_int.load(tmp_path, exact)(**arrays(inputs)).values()
        pairs = list(zip(want, got, strict=True)) if isinstance(want, (list, tuple)) else [(want, got)]
        for expected, found in pairs:
            np.testing.assert_array_equal(np.asarray(expected), found, strict=isinstance(want, torch.Tensor))


def same(name: str, *args: Any) -> None:
    """The runner and the compiler's own NumPy meaning, which were written apart, on the same arguments."""
    numpy = BY_NAME[name].numpy
    assert numpy is not None
    with np.errstate(all="raise"):
        got = run_int.OPS[name](*args)
    np.testing.assert_array_equal(got, numpy(*args), strict=True)


SCALES = st.floats(1e-7, 1.0)
SEEDS = st.integers(0, 2**32)


@given(SEEDS, SCALES, st.floats(1e-4, 0.1), st.integers(1, 40), st.booleans(), st.integers(0, 31))
def test_softmax(seed: int, scale: float, step: float, length: int, table: bool, size: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(-(2**size), 2**size, (3, 2, length), dtype=np.int64).astype(np.int32)
    keep = rng.random((3, 1, length)) < 0.7  # rows without any key among them
    multiplier, shift, limit = score_grid(scale, table=table)
    exps = exp_table().numpy() if table else None
    for mask in (keep, None):
        same("int_softmax", scores, mask, exps, multiplier, shift, limit, prob_divider(step), -3, -128, 127)


@given(SEEDS, st.integers(1, 64), st.integers(0, 21), st.floats(1e-9, 1.0), st.floats(1e-4, 1.0))
def test_layer_norm(seed: int, n: int, size: int, scale: float, step: float) -> None:
    rng = np.random.default_rng(seed)
    gamma, beta = rng.normal(size=n), rng.normal(size=n)
    c = norm_constants(gamma, beta, n, scale, step, 1e-12, -(2**21), 2**21 - 1)
    x = rng.integers(-(2**size), 2**size, (5, n)).astype(np.int32)
    x[0], x[1] = -(2**21), np.where(np.arange(n) % 2, -(2**21), 2**21 - 1)  # no variance, and the largest
    same("int_layer_norm", x, c.gain.numpy(), c.offset.numpy(), c.fraction, c.eps, c.shift, 7, -128, 127)


@given(SEEDS, st.floats(1e-7, 1.0), st.floats(1e-4, 1.0), st.integers(0, 21), st.integers(-128, 127))
def test_gelu(seed: int, scale: float, step: float, size: int, zero_point: int) -> None:
    x = np.random.default_rng(seed).integers(-(2**size), 2**size, 100).astype(np.int32)
    x[:3] = zero_point, -(2**21), 2**21 - 1
    same("int_gelu", x, zero_point, *gelu_constants(scale, step), -100, -128, 127)


@given(SEEDS, st.integers(1, 30), st.floats(1e-3, 1.0), st.floats(1e-3, 1.0))
def test_mean(seed: int, length: int, scale: float, step: float) -> None:
    rng = np.random.default_rng(seed)
    x, keep = rng.integers(-128, 128, (6, length, 5)).astype(np.int8), rng.random((6, length)) < 0.6
    keep[0] = False
    same("int_mean", x, keep, -4, *mean_constants(scale, step, length, 132), 3, -128, 127)


# The arithmetic against exact fractions


@given(st.integers(-(2**62) + 1, 2**62 - 1), st.integers(1, 62))
def test_round_shift_is_half_to_even(v: int, n: int) -> None:
    assert int(run_int.round_shift(np.int64(v), n)) == round(Fraction(v, 2**n))


@given(st.integers(-(2**61), 2**61), st.integers(1, 2**61 - 1))
def test_round_divide_is_half_to_even(n: int, d: int) -> None:
    assert int(run_int.round_divide(np.int64(n), np.int64(d))) == round(Fraction(n, d))
    near_half = d // 2 if n % 2 else d - d // 2
    assert int(run_int.round_divide(np.int64(near_half), np.int64(d))) == round(Fraction(near_half, d))


@given(st.integers(0, 2**32 - 1))
def test_i_sqrt_is_the_floor(n: int) -> None:
    for value in (n, math.isqrt(n) ** 2, max(math.isqrt(n) ** 2 - 1, 0)):
        assert int(run_int.i_sqrt(np.int64(value))) == math.isqrt(value)
        assert int(run_int.bits(np.int64(value))) == value.bit_length()


# Whole models


class Small(nn.Module):
    """Ids, a mask made of them, products, a table: integer-only in the ``-int`` placement."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.kinds = nn.Embedding(50, 16), nn.Embedding(2, 16)
        self.first, self.act, self.second = nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids) + self.kinds(1 - (input_ids > 7).long())
        return self.second(self.act(self.first(x)))  # type: ignore[no-any-return]


def small_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": batch(rows, length, vocab=50)["input_ids"]}


def small() -> Any:
    qat = prepare_qat(Small().eval(), "W4E4A8-lsq-int", example=small_batch(3, 7))
    calibrate(qat, [small_batch(6, 9)])
    return convert(qat.eval())


MODELS: dict[str, tuple[Callable[[], Any], Callable[[int, int], dict[str, torch.Tensor]]]] = {
    "small": (small, small_batch),
    "bert": (lambda: converted("W8E8A8-int", "reference"), batch),
    "zero points": (lambda: converted("W4E4A4-lsq+-int", "reference"), batch),
    "channels": (lambda: converted("W2-channels-int", "reference"), batch),
    "roberta": (lambda: converted("W8E8A8-int", "reference", "roberta"), batch),
    "albert": (lambda: converted("W8E8A8-int", "reference", "albert"), batch),
    "squeezebert": (lambda: converted("W8E8A8-int", "reference", "squeezebert"), batch),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """(kind, the integer model, its folder)."""
    model = MODELS[request.param][0]()
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder of the small model, to damage."""
    small().save_pretrained(tmp_path / "int")
    return tmp_path / "int"


def inputs_of(model: Any, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: data[name] for name in model.input_names}


def both(model: Any, data: dict[str, torch.Tensor], program: run_int.Program) -> tuple[Any, ...]:
    """Outputs and codes by site: of the reference backend, and of the runner."""
    want_sites: dict[str, Any] = {}
    got_sites: dict[str, Any] = {}

    def keep(site: str, codes: Any) -> Any:
        want_sites[site] = codes
        return codes

    want = ReferenceModel(model.gm).run(data, hook=keep)
    got = program(sites=got_sites.__setitem__, **arrays(data))
    return want, want_sites, list(got.values()), got_sites


@pytest.mark.parametrize("rows, length", [(1, 1), (4, 9), (3, 16), (2, 33)])
@pytest.mark.parametrize("exact", [False, True])
def test_outputs_and_codes_are_the_references(
    saved: tuple[str, Any, Path], rows: int, length: int, exact: bool
) -> None:
    kind, model, folder = saved
    data = inputs_of(model, MODELS[kind][1](rows, length))
    want, want_sites, got, got_sites = both(model, data, run_int.load(folder, exact))
    assert list(got_sites) == list(want_sites) and len(got_sites) >= 3
    for site, codes in want_sites.items():
        np.testing.assert_array_equal(codes, got_sites[site], err_msg=site, strict=True)
    for expected, found in zip(want, got, strict=True):
        np.testing.assert_array_equal(expected, found, strict=True)
        assert np.ptp(found) > 0 or found.size == 1


def test_the_file_states_types_and_grids(saved: tuple[str, Any, Path]) -> None:
    kind, model, folder = saved
    text = json.loads((folder / PROGRAM).read_text())
    data = inputs_of(model, MODELS[kind][1](3, 8))
    assert text["integer_only"] and [row["name"] for row in text["inputs"]] == list(model.input_names)
    program = run_int.load(folder)
    real, codes = program(**arrays(data)), program(codes=True, **arrays(data))
    for row in text["outputs"]:
        assert codes[row["name"]].dtype.kind == "i"
        again = (codes[row["name"]].astype(np.float32) - row["zero_point"]) * np.float32(row["scale"])
        assert real[row["name"]].dtype == row["dtype"]
        np.testing.assert_array_equal(again, real[row["name"]])
    sizes = {"batch": 3, "length": 8}
    values: dict[str, Any] = {}
    program._frees = [[] for _ in program.steps]  # keep every value
    run = program._run
    program._run = lambda step, seen: values.setdefault(step["name"], run(step, seen))  # type: ignore[method-assign]
    program(**arrays(data))
    for node in text["nodes"]:
        if "op" in node and node["dtype"] != "size":
            found = values[node["name"]]
            assert str(found.dtype) == node["dtype"], node
            assert list(found.shape) == [eval(str(s), {}, sizes) for s in node["shape"]], node


ALONE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "safetensors", "kdlsq_fx", "transformers"):
            raise ImportError(name + " was imported")
sys.meta_path.insert(0, Refuse())
try:
    import torch
except ImportError:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def alone(*args: object) -> subprocess.CompletedProcess[str]:
    """The command, where every import of torch, safetensors and this package fails."""
    command = [sys.executable, "-I", "-c", ALONE, *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_the_folder_runs_by_itself(saved: tuple[str, Any, Path], tmp_path: Path) -> None:
    kind, model, folder = saved
    data = inputs_of(model, MODELS[kind][1](4, 9))
    np.savez(tmp_path / "in.npz", **arrays(data))
    files = ("--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz", "--sites", tmp_path / "sites.npz")
    done = alone(folder / "run_int.py", folder, *files, "--show")
    assert done.returncode == 0, done.stderr
    assert "int_linear" in done.stdout and "input_ids: int64 ['batch', 'length']" in done.stdout
    want, sites, _, _ = both(model, data, run_int.load(folder))
    for expected in want:  # what came out is printed, and where it was written
        assert f"{expected.dtype}{list(expected.shape)}, from {float(expected.min()):.6g} to" in done.stdout
    assert f"written to {tmp_path / 'out.npz'}: {len(want)} arrays" in done.stdout
    with np.load(tmp_path / "out.npz") as outputs, np.load(tmp_path / "sites.npz") as codes:
        for expected, found in zip(want, outputs.values(), strict=True):
            np.testing.assert_array_equal(expected, found, strict=True)
        assert set(codes) == set(sites)


def test_a_folder_alone_is_shown(saved: tuple[str, Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_int.main([str(saved[2])]) == 0
    said = capsys.readouterr().out
    assert "input_ids: int64" in said and "nothing was run: give --input" in said
    with pytest.raises(SystemExit) as stopped:
        run_int.main([str(saved[2]), "--output", "x.npz"])
    assert stopped.value.code == 2 and "without --input" in capsys.readouterr().err


# What cannot be run


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    program = json.loads((path / PROGRAM).read_text())
    change(program)
    (path / PROGRAM).write_text(json.dumps(program))


def first(program: Any, op: str) -> Any:
    return next(n for n in program["nodes"] if n.get("op") == op)


def test_a_truncated_or_padded_safetensors_file(copied: Path) -> None:
    whole = (copied / CONSTANTS).read_bytes()
    for data in (whole[:0], whole[:5], whole[: len(whole) // 2], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:]):
        (copied / CONSTANTS).write_bytes(data)
        with pytest.raises(ProgramError, match=r"constants\.safetensors is (truncated|damaged)"):
            run_int.load(copied)


def tensors_file(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "row",
    [
        {"dtype": "I8", "shape": [4], "data_offsets": [0, 5]},
        {"dtype": "I8", "shape": [4], "data_offsets": [1, 5]},
        {"dtype": "I32", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "I8", "shape": [-4], "data_offsets": [0, 4]},
        {"dtype": "F8", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "I8", "shape": [4]},
    ],
)
def test_headers_that_lie(row: Any) -> None:
    good = {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}
    np.testing.assert_array_equal(
        run_int.read_safetensors(tensors_file({"a": good}, b"\x01\x02\xff\x00"), "it")["a"], [1, 2, -1, 0]
    )
    with pytest.raises(ProgramError, match="it is"):
        run_int.read_safetensors(tensors_file({"a": row}, b"\x01\x02\xff\x00"), "it")


def test_the_constants_of_another_program(copied: Path) -> None:
    data = bytearray((copied / CONSTANTS).read_bytes())
    data[-1] ^= 1
    (copied / CONSTANTS).write_bytes(data)
    with pytest.raises(ProgramError, match="is not the file"):
        run_int.load(copied)
    edit(copied, lambda p: p["constants"].update(sha256=hashlib.sha256(data).hexdigest()))
    run_int.load(copied)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.update(format=99), "format 99"),
        (lambda p: first(p, "requantize").update(op="teleport"), "'teleport' at 'first/linear/q'.*not integer-only"),
        (lambda p: first(p, "requantize").update(dtype="float32"), "'requantize' at 'first/linear/q' makes floats"),
        (lambda p: next(n for n in p["nodes"] if "constant" in n).update(constant="gone"), "'gone' is missing"),
        (lambda p: p["nodes"].remove(first(p, "requantize")), "'act/gelu/q' reads 'requantize'"),
        (lambda p: p.pop("nodes"), "damaged"),
        (lambda p: first(p, "lookup").pop("args"), "damaged"),
        (lambda p: p["outputs"][0].update(value={"node": "nobody"}), "'outputs' reads 'nobody'|makes floats"),
        (lambda p: p.update(constants=None), "cannot be read"),
        (lambda p: p["constants"].update(file="../constants.safetensors"), "no plain file name"),
    ],
)
def test_damaged_programs(copied: Path, change: Callable[[Any], Any], message: str) -> None:
    edit(copied, change)
    with pytest.raises(ProgramError, match=message):
        run_int.load(copied)


def test_missing_files_and_the_command_s_errors(copied: Path, tmp_path: Path) -> None:
    (copied / CONSTANTS).unlink()
    with pytest.raises(ProgramError, match="cannot be read"):
        run_int.load(copied)
    done = alone(copied / "run_int.py", tmp_path / "nowhere")
    assert done.returncode == 1 and "cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_a_program_with_float_islands_names_the_first(tmp_path: Path) -> None:
    converted("W8E8A8", "reference").save_pretrained(tmp_path)
    assert json.loads((tmp_path / PROGRAM).read_text())["integer_only"] is False
    site, op, _ = json.loads((tmp_path / PROGRAM).read_text())["islands"][0]
    with pytest.raises(ProgramError, match=f"not integer-only: op '{op}' at '{site}' stays float: "):
        run_int.load(tmp_path)
    edit(tmp_path, lambda p: p.update(islands=[]))
    with pytest.raises(ProgramError, match=r"at 'bert\..*not integer-only"):
        run_int.load(tmp_path)


def test_inputs_that_do_not_fit(copied: Path) -> None:
    program, ids = run_int.load(copied), small_batch(2, 3)["input_ids"].numpy()
    for wrong, message in (
        ({}, "takes the inputs input_ids, not none"),
        ({"ids": ids}, "not ids"),
        ({"input_ids": ids[0]}, r"int64\[3\], not int64\['batch', 'length'\]"),
        ({"input_ids": ids.astype(np.float32)}, "float32"),
        ({"input_ids": ids + 50}, "the table has 50 rows"),
        ({"input_ids": -ids - 1}, "at 'words/embedding'"),
    ):
        with pytest.raises(ProgramError, match=message):
            program(**wrong)
    np.testing.assert_array_equal(
        *(list(program(input_ids=x).values())[0] for x in (ids, ids.astype(np.int8)))  # any integer type will do
    )


def test_too_long_an_inner_product_is_refused() -> None:
    ones = np.ones((1, 5), np.int8)
    assert run_int.int_matmul(ones, ones.T, a_max=2**14, b_max=2**14) == 5
    with pytest.raises(ProgramError, match="32 bits"):
        run_int.int_matmul(ones, ones.T, a_max=2**15, b_max=2**15)


def test_the_page_names_every_op_and_its_example_is_right() -> None:
    page = (Path(__file__).parents[1] / "docs" / "integer_format.md").read_text(encoding="utf-8")
    spoken_of = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", page))))
    assert {name.removesuffix("_tensor") for name in run_int.OPS} <= spoken_of
    assert run_int.requantize(np.int32(-20123), 1639065329, 39, 0, -127, 127) == -60
