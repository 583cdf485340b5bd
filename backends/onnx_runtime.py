"""Runs ONNX files under ONNX Runtime, and reads from its optimized model which kernels it chose."""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import CheckpointError, InputError

INTEGER_KERNELS = (
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "QGemm",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "QAttention",
    "QLinearConv",
    "ConvInteger",
)
FLOAT_KERNELS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Attention", "MultiHeadAttention", "Conv", "FusedConv")
PRODUCTS = ("MatMul", "Gemm", "Conv")


class OnnxModel:
    """An ONNX Runtime session on the CPU: ``model({"input_ids": array, ...})`` -> outputs by name.

    ``optimize``: ORT_ENABLE_ALL, else ORT_DISABLE_ALL. ``threads``: 0 lets the runtime choose.
    Raises CheckpointError for files that cannot be loaded, InputError for inputs that do not fit.
    """

    def __init__(self, path: str | Path, *, optimize: bool = True, threads: int = 0, save_optimized: str = "") -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if save_optimized:
            options.optimized_model_filepath = save_optimized
        if optimize and int8_saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")  # uint8 weights: slower, never wrong
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as err:  # the runtime's own exceptions share no base class
            raise CheckpointError(f"ONNX Runtime cannot load {path}: {err}", do="export it again") from None
        self.input_names = tuple(i.name for i in self.session.get_inputs())
        self.output_names = tuple(o.name for o in self.session.get_outputs())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        missing = [n for n in self.input_names if n not in batch]
        if missing:
            raise InputError(f"the model needs {', '.join(missing)}", do=f"give {', '.join(self.input_names)}")
        feed = {n: np.asarray(batch[n]) for n in self.input_names}
        try:
            results = self.session.run(None, feed)
        except Exception as err:
            raise InputError(f"ONNX Runtime refuses the batch: {err}") from None
        return dict(zip(self.output_names, results))


def run_onnx(path: str | Path, batch: Mapping[str, Any], optimize: bool = True) -> dict[str, NDArray[Any]]:
    """One run of a file: arrays by input name -> arrays by output name."""
    return OnnxModel(path, optimize=optimize)(batch)


@functools.cache
def int8_saturates() -> bool:
    """True where uint8 x int8 products of this CPU and ONNX Runtime lose large sums (AVX2, AVX-512 without VNNI).

    Pairs of products are added in 16 bits there: 2 * 255 * 127 does not fit. Weights of 7 bits and fewer always do.
    """
    import onnxruntime as ort

    a, b = np.full((4, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    node = onnx.helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    entry = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.UINT8, [4, 64])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [4, 32])
    graph = onnx.helper.make_graph([node], "probe", [entry], [result], [onnx.numpy_helper.from_array(b, "b")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return not bool((session.run(None, {"a": a})[0] == 255 * 127 * 64).all())


@dataclass(frozen=True)
class KernelReport:
    """What ONNX Runtime runs. ``kernels``: op type -> count in the optimized model; ``sites``: site of each matrix
    product -> the kernel that computes it ("?" where the optimizer left no trace of it)."""

    kernels: dict[str, int]
    sites: dict[str, str]

    @property
    def integer(self) -> int:
        return sum(self.kernels.get(k, 0) for k in INTEGER_KERNELS)

    @property
    def floating(self) -> int:
        return sum(self.kernels.get(k, 0) for k in FLOAT_KERNELS)

    def __str__(self) -> str:
        stay = [s for s, k in self.sites.items() if k in FLOAT_KERNELS]
        text = f"{self.integer} matrix products in int8 kernels, {self.floating} in fp32"
        if self.integer and int8_saturates():
            text += (
                "\n  this CPU's int8 kernels saturate at 16 bits: use 7-bit weights, "
                "or the session option session.x64quantprecision=1"
            )
        return text + "".join(f"\n  fp32: {s}" for s in stay)


def kernel_report(path: str | Path) -> KernelReport:
    """Load ``path`` with all optimizations, read the optimized model back, and count its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/optimized.onnx"
        OnnxModel(path, save_optimized=file, threads=1)
        optimized = onnx.load(file).graph
    kernels = Counter(n.op_type for n in optimized.node)
    makers = {name: n.op_type for n in optimized.node for name in n.output}
    by_name = {re.sub(r"^fused |/MatMulAddFusion.*$", "", n.name): n.op_type for n in optimized.node if n.name}
    sites: dict[str, str] = {}
    for site, name, values in _products(onnx.load(str(path)).graph):
        found = [makers[v] for v in values if makers.get(v) in (*INTEGER_KERNELS, *FLOAT_KERNELS)]
        sites[site] = found[0] if found else by_name.get(name, "?")
    return KernelReport(dict(kernels), sites)


def _products(graph: onnx.GraphProto) -> list[tuple[str, str, list[str]]]:
    """(site, node name, names of the values that may hold its result) of every matrix product in a file of ours."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        values = [node.output[0]]
        for _ in range(4):  # a bias, a clip and a quantizer may be fused into the product
            after = readers.get(values[-1], [])
            if len(after) != 1 or after[0].op_type not in ("Add", "Clip", "QuantizeLinear", "Mul", "Div"):
                break
            values.append(after[0].output[0])
        found.append((re.sub(r"/[A-Za-z]+(_\d+)?$", "", node.name), node.name, values))
    return found
