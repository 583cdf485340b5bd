"""Which kernels a runtime chose for the matrix products of an exported file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

PRODUCTS = ("MatMul", "Gemm", "Conv")
FUSED_BEHIND = ("Add", "Sub", "Clip", "QuantizeLinear", "Mul", "Div", "Where", "Softmax")
MOVES = ("Reshape", "Transpose", "QuantizeLinear", "DequantizeLinear", "Clip", "Mul", "Add", "MatMul")


@dataclass(frozen=True)
class KernelReport:
    """What ``runtime`` runs.

    ``kernels``: kernel -> count in the optimized model.
    ``sites``: site of each matrix product in the file -> the kernel that computes it ("?": no trace of it was left).
    ``int8``: sites that run on 8-bit integers.
    ``quantized``: sites both of whose operands are dequantized codes in the file.
    """

    runtime: str
    kernels: dict[str, int]
    sites: dict[str, str]
    int8: frozenset[str]
    quantized: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def integer(self) -> int:
        return len(self.int8)

    @property
    def floating(self) -> int:
        return len(self.sites) - len(self.int8)

    @property
    def missed(self) -> tuple[str, ...]:
        """Quantized products that do not run on 8-bit integers: what an export must not leave behind."""
        return tuple(s for s in self.sites if s in self.quantized and s not in self.int8)

    def __str__(self) -> str:
        text = f"{self.runtime}: {self.integer} matrix products in int8 kernels, {self.floating} in fp32"
        text += f"; {len(self.quantized) - len(self.missed)} of {len(self.quantized)} quantized products in int8"
        stay = [s for s in self.sites if s not in self.int8]
        return text + "".join(f"\n  {n}" for n in self.notes) + "".join(f"\n  fp32: {s}" for s in stay)


@dataclass(frozen=True)
class Product:
    """A matrix product in a file: names that a runtime may keep of it, and of what each operand is made from, nearest
    first. ``values`` are the names of the tensors that hold its result, or the result of what may be fused behind.
    ``quantized``: both operands are dequantized codes; ``weight_only``: the weight of a dense layer alone is."""

    site: str
    names: tuple[str, ...]
    values: tuple[str, ...]
    operands: tuple[tuple[str, ...], ...]
    quantized: bool
    weight_only: bool


def products_of(graph: onnx.GraphProto) -> Iterator[Product]:
    """Every matrix product of a file of ours."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    makers = {value: node for node in graph.node for value in node.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        names, values = [node.name], [node.output[0]]
        for _ in range(6):  # a bias, a scale, a mask, a softmax, a clip and a quantizer may be fused into the product
            after = readers.get(values[-1], [])
            if len(after) != 1 or after[0].op_type not in FUSED_BEHIND:
                break
            names.append(after[0].name)
            values.append(after[0].output[0])
        operands = [_ancestry(makers, value) for value in node.input[:2]]
        site = re.sub(r"/[A-Za-z]+(_\d+)?$", "", node.name)
        # OpenVINO names what makes a tensor that leaves the graph after the tensor
        trace = (*names, *values)
        codes = [_is_codes(makers, v) for v in node.input[:2]]
        alone = codes == [False, True] and node.op_type != "Conv"
        yield Product(site, trace, tuple(values), tuple(map(tuple, operands)), all(codes), alone)


def _ancestry(makers: dict[str, onnx.NodeProto], value: str) -> list[str]:
    found = []
    while (node := makers.get(value)) is not None:
        found.append(node.name)
        if node.op_type not in MOVES or len(found) > 16:
            break
        value = node.input[0]
    return found


def _is_codes(makers: dict[str, onnx.NodeProto], value: str) -> bool:
    """Does the value come from DequantizeLinear, perhaps through ops that only move data?"""
    node = makers.get(value)
    while node is not None and node.op_type in (
        "Reshape",
        "Transpose",
        "Gather",
        "Slice",
        "Squeeze",
        "Unsqueeze",
        "Split",
    ):
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"
