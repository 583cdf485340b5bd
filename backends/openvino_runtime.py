"""Runs ONNX files under OpenVINO, and reads from its compiled model in which precision each product runs.

OpenVINO is an extra (``pip install kdlsq-fx[openvino]``); without it the functions here raise ConfigError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import CheckpointError, ConfigError, InputError
from .onnx_kernels import KernelReport, Product, products_of

BYTES = ("i8", "u8")
# what stays float stays float32, also in front of a quantized weight
HINTS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "NUM_STREAMS": 1}


def openvino() -> Any:
    """The package. ConfigError where it is not installed."""
    try:
        import openvino as package
    except ImportError:
        raise ConfigError("OpenVINO is not installed", do="pip install openvino") from None
    return package


class OpenVinoModel:
    """A compiled model on the CPU: ``model({"input_ids": array, ...})`` -> outputs by name.

    ``threads``: 0 lets the runtime choose. Floats are computed in float32, also on CPUs that have bfloat16; ``hints``
    are OpenVINO's own settings and override that.
    Raises ConfigError without OpenVINO, CheckpointError for files it cannot load, InputError for unfitting inputs.
    """

    def __init__(self, path: str | Path, *, threads: int = 0, hints: Mapping[str, Any] | None = None) -> None:
        package = openvino()
        settings = {**HINTS, **({"INFERENCE_NUM_THREADS": threads} if threads else {}), **(hints or {})}
        try:
            self.compiled = package.Core().compile_model(str(path), "CPU", settings)
        except Exception as err:  # RuntimeError, and the frontend's own
            raise CheckpointError(f"OpenVINO cannot load {path}: {err}", do="export it for target='openvino'") from None
        self.request = self.compiled.create_infer_request()
        self.input_names = tuple(i.get_any_name() for i in self.compiled.inputs)
        self.output_names = tuple(o.get_any_name() for o in self.compiled.outputs)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        missing = [n for n in self.input_names if n not in batch]
        if missing:
            raise InputError(f"the model needs {', '.join(missing)}", do=f"give {', '.join(self.input_names)}")
        try:
            results = self.request.infer({n: np.asarray(batch[n]) for n in self.input_names})
        except Exception as err:
            raise InputError(f"OpenVINO refuses the batch: {err}") from None
        return {name: np.array(results[i]) for i, name in enumerate(self.output_names)}


def openvino_report(path: str | Path) -> KernelReport:
    """Compile ``path`` as ``OpenVinoModel`` does, and find every product of the file in the compiled graph.

    A fully connected layer runs in int8 where its ``runtimePrecision`` says so. Attention is one ``Subgraph`` there: a
    product inside runs in int8 where all that comes into the subgraph for it does so in 8 bits. Of a layer with float
    activations that precision is its weight's.
    """
    compiled = OpenVinoModel(path, threads=1).compiled
    graph = _Compiled(compiled.get_runtime_model())
    file = onnx.load(str(path), load_external_data=False).graph
    products = list(products_of(file))
    sites = {p.site: "f32, its weight in bytes" if p.weight_only else graph.kernel_of(p) for p in products}
    int8 = frozenset(s for s, k in sites.items() if k.endswith(BYTES))
    return KernelReport("OpenVINO", graph.counts, sites, int8, frozenset(p.site for p in products if p.quantized))


class _Compiled:
    """The nodes of a compiled model by the names of the ONNX nodes (or values) they were made from."""

    def __init__(self, model: Any) -> None:
        self.made: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        for node in model.get_ordered_ops():
            kind = _info(node, "layerType")
            if kind in ("Const", "Input", "Output"):
                continue
            label = f"{kind} {_info(node, 'runtimePrecision')}"
            self.counts[label] = self.counts.get(label, 0) + 1
            for name in _names(node):
                self.made.setdefault(name, node)

    def kernel_of(self, product: Product) -> str:
        """Kind and precision of the node that computes a product, "?" where the compiler left no trace of it."""
        node = next((self.made[n] for n in product.names if n in self.made), None)
        if node is None:
            return "?"
        kind, precision = _info(node, "layerType"), _info(node, "runtimePrecision")
        if kind == "Subgraph":
            incoming = [self._precision(names, node) for names in product.operands]
            narrow = all(p in BYTES for p in incoming if p)
            precision = next((p for p in incoming if p), precision) if narrow else "f32"
        return f"{kind} {precision}"

    def _precision(self, ancestors: tuple[str, ...], node: Any) -> str:
        """Type of the nearest of an operand's ancestors that another node computes; "" where the node itself does."""
        for name in ancestors:
            maker = self.made.get(name)
            if maker is not None:
                own = maker.get_friendly_name() == node.get_friendly_name()
                return "" if own else str(maker.get_output_element_type(0).get_type_name())
        return ""


def _names(node: Any) -> Iterator[str]:
    """Names of ONNX nodes that went into a node; a layer whose own name is lost has it in the name of its weight."""
    names = [node.get_friendly_name(), *_info(node, "originalLayersNames").split(",")]
    if _info(node, "layerType") == "FullyConnected":
        names.append(node.input_value(1).get_node().get_friendly_name())
    for name in names:
        yield name
        yield name.removesuffix("/DequantizationMultiply").removesuffix("/transpose_b")


def _info(node: Any, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""
