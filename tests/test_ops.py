"""Made from each op's sample: torch against the NumPy meaning, and against a file of that one op in ONNX Runtime."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import kdlsq_fx.ops.integer
import kdlsq_fx.ops.qdq  # noqa: F401  (both fill the table)
from kdlsq_fx.backends.onnx import export
from kdlsq_fx.backends.onnx_runtime import run_onnx
from kdlsq_fx.errors import ConfigError
from kdlsq_fx.op import BY_NAME, BY_TARGET, Op, Signature, declare

torch.set_num_threads(1)

IN_TRAINING_ONLY = {"lsq", "bias_grid", "norm_on_grid"}  # tests/test_lsq.py, tests/test_integer_forms.py
TABLE = [op for name, op in sorted(BY_NAME.items()) if name not in IN_TRAINING_ONLY]
WRITTEN = [op for op in TABLE if op.onnx is not None or op.name in ("quantize", "dequantize")]


def flat(value: Any) -> list[np.ndarray]:
    return [np.asarray(v) for v in (value if isinstance(value, (list, tuple)) else [value])]


def as_numpy(value: Any) -> Any:
    """The same argument for the NumPy meaning."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, torch.dtype):
        return np.dtype(str(value).removeprefix("torch."))
    if isinstance(value, (list, tuple)):
        return type(value)(as_numpy(v) for v in value)
    return value


def callable_of(op: Op) -> Any:
    return op.target(0.1).eval() if isinstance(op.target, type) else op.target


def close(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for f, w in zip(found, wanted):
        assert f.shape == w.shape
        assert f.dtype == w.dtype
        if w.dtype.kind == "f":
            np.testing.assert_allclose(f, w, rtol=3e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(f, w)


def test_every_op_has_a_sample_and_a_meaning_in_numpy() -> None:
    assert len(TABLE) > 100
    assert [op.name for op in TABLE if op.sample is None or op.numpy is None] == []


@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.name)
def test_signature_fits_the_schema(op: Op) -> None:
    """No more operand kinds than the op has tensors (a list counts for one kind and repeats it)."""
    signature = Signature.parse(op.sig)
    assert (signature.operands[:1] == ("same",)) == (signature.result == "same")
    if isinstance(op.target, torch._ops.OpOverload):
        tensors = [a for a in op.target._schema.arguments if "Tensor" in str(a.type)]
        many = any("List" in str(a.type) or "[]" in str(a.type) for a in tensors)
        assert many or len(signature.operands) <= len(tensors)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_an_island_is_exact_in_float64(approximate: str) -> None:
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    wanted = torch.nn.functional.gelu(x, approximate=approximate).numpy()
    found = BY_NAME["gelu"].numpy(x.numpy(), approximate)  # type: ignore[misc]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.name)
def test_numpy_equals_torch(op: Op) -> None:
    assert op.sample is not None and op.numpy is not None
    args, kwargs = op.sample()
    with torch.no_grad():
        wanted = flat(callable_of(op)(*args, **kwargs))
    close(flat(op.numpy(*as_numpy(args), **{k: as_numpy(v) for k, v in kwargs.items()})), wanted)


def one_op(op: Op) -> tuple[fx.GraphModule, dict[str, torch.Tensor], int]:
    """A float graph of one call on its sample: floats and ids enter as inputs, ``weight`` operands as constants."""
    assert op.sample is not None
    args, kwargs = op.sample()
    graph, root, feed = fx.Graph(), nn.Module(), {}
    kinds = iter(op.signature.operands)

    def place(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return [place(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        kind = next(kinds, "float")
        name = f"x{len(graph.nodes)}"
        parameter = kind == "int" and feed  # multipliers, tables and gains: constants of every lowered graph
        step = op.name in ("quantize", "dequantize", "integer_layer_norm") and value.ndim < 2
        if kind in ("weight", "bias") or parameter or step:
            root.register_buffer(name, value)
            node = graph.get_attr(name)
        else:
            feed[name] = value
            node = graph.placeholder(name)
        node.meta["val"] = value
        return node

    placed = [place(a) for a in args]
    result = callable_of(op)(*args, **kwargs)
    if isinstance(op.target, type):
        root.add_module("sub", callable_of(op))
        node = graph.call_module("sub", tuple(placed))
    else:
        node = graph.call_function(op.target, tuple(placed), kwargs)
    node.meta.update(val=result, site=f"here/{op.name}")
    outputs = [node]
    if isinstance(result, (list, tuple)):
        outputs = [graph.call_function(operator.getitem, (node, i)) for i in range(len(result))]
        for i, part in enumerate(outputs):
            part.meta.update(val=result[i], site=f"here/part:{i}")
    graph.output(tuple(outputs))
    gm = fx.GraphModule(root, graph)
    gm.meta["stage"] = "qdq" if op.name in ("quantize", "dequantize") else "float"
    return gm, feed, len(outputs)


@pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("op", WRITTEN, ids=lambda op: op.name)
def test_onnx_equals_torch(op: Op, optimize: bool, tmp_path: Path) -> None:
    if op.name.startswith("size_"):
        pytest.skip("works on sizes; test_onnx.py runs it in whole models")
    if op.name == "sym_size":
        pytest.skip("gives a size, no tensor; test_onnx.py runs it in whole models")
    gm, feed, count = one_op(op)
    with torch.no_grad():
        wanted = [t.numpy() for t in gm(*feed.values())]
    file = tmp_path / "op.onnx"
    export(gm, file, target="spec")
    found = run_onnx(file, {k: v.numpy() for k, v in feed.items()}, optimize)
    close([found[f"output_{i}"] for i in range(count)], wanted)


def test_an_op_is_declared_once():
    known = BY_NAME["gelu"]
    with pytest.raises(ConfigError, match=r"(?s)'gelu'.*is declared already.*another name"):
        declare(Op(name="gelu", target=torch.special.bessel_j0, sig="act -> act"))
    with pytest.raises(ConfigError, match="'gelu'"):
        declare(Op(name="my_gelu", target=known.target, sig="act -> act"))
    assert BY_NAME["gelu"] is known and BY_TARGET[known.target] is known and "my_gelu" not in BY_NAME
