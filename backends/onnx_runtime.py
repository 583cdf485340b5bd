"""Runs ONNX files under ONNX Runtime, and reads from its optimized model which kernels it chose."""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import CheckpointError, InputError
from .onnx_kernels import KernelReport, products_of

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
SATURATES = (
    "this CPU's int8 kernels saturate at 16 bits: use 7-bit weights, or the session option session.x64quantprecision=1"
)
FLOAT_KERNELS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Attention", "MultiHeadAttention", "Conv", "FusedConv")


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
        # else products of float activations by quantized weights round the activations to 8 bits, unasked
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
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


def kernel_report(path: str | Path) -> KernelReport:
    """Load ``path`` with all optimizations, read the optimized model back, and find every product of the file in it."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/optimized.onnx"
        OnnxModel(path, save_optimized=file, threads=1)
        optimized = onnx.load(file).graph
    kernels = Counter(n.op_type for n in optimized.node)
    makers = {name: n.op_type for n in optimized.node for name in n.output}
    by_name = {re.sub(r"^fused |/MatMulAddFusion.*$", "", n.name): n.op_type for n in optimized.node if n.name}
    sites: dict[str, str] = {}
    quantized = set()
    for product in products_of(onnx.load(str(path)).graph):
        found = [makers[v] for v in product.values if makers.get(v) in (*INTEGER_KERNELS, *FLOAT_KERNELS)]
        sites[product.site] = found[0] if found else by_name.get(product.names[0], "?")
        quantized |= {product.site} if product.quantized else set()
    int8 = frozenset(s for s, k in sites.items() if k in INTEGER_KERNELS)
    notes = (SATURATES,) if int8 and int8_saturates() else ()
    return KernelReport("ONNX Runtime", dict(kernels), sites, int8, frozenset(quantized), notes)
