"""What becomes of an exported file in the runtime it is for: kernels counted, warnings given."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx
from torch import fx

from ..summary import summarize_export
from .cpu import lacks_vnni
from .onnx import ExportReport
from .onnx_kernels import KernelReport, products_of

KEEPS_FLOATS = {  # the setting without which float activations of a quantized weight are rounded to 8 bits
    "ort-cpu": "the session option session.qdq_matmulnbits_accuracy_level=1",
    "openvino": "the property DYNAMIC_QUANTIZATION_GROUP_SIZE=0",
}
SUBBYTE = {onnx.TensorProto.INT2: "int2", onnx.TensorProto.INT4: "int4"}


def checked(report: ExportReport, gm: fx.GraphModule, before: int) -> ExportReport:
    """The report with the runtime's kernels and a summary; warns of what would run in floats, wrongly, or not at all.

    ``gm``: the qdq graph that was written; ``before``: bytes of the float32 weights.
    """
    kernels = count_kernels(report.path, report.target)
    notes = []
    if kernels is not None:
        package = "openvino" if report.target == "openvino" else "onnxruntime"
        done = f"{len(kernels.quantized) - len(kernels.missed)} of {len(kernels.quantized)}"
        notes.append(f"{kernels.runtime} {version(package)}: {done} quantized matrix products in int8 kernels")
    else:
        why = (
            "OpenVINO is not installed (pip install openvino)"
            if report.target == "openvino"
            else "no runtime was asked"
        )
        notes.append(f"kernels not counted: {why}; int8 below is how the file is written, not what a runtime does")
    for text in (
        *_missed(kernels),
        *_about_weights_alone(report, kernels),
        *_about_cpu(report),
        *_about_subbyte(report),
    ):
        warnings.warn(text, stacklevel=3)
    sites, int8 = (kernels.sites, kernels.int8) if kernels is not None else ({}, frozenset())
    summary = summarize_export(gm, before, report.bytes, sites, int8, report.folded, notes)
    return replace(report, kernels=kernels, summary=summary)


def count_kernels(path: Path, target: str) -> KernelReport | None:
    """The kernels of the runtime that ``target`` names; None where that runtime is not at hand."""
    if target == "ort-cpu":
        from .onnx_runtime import kernel_report

        return kernel_report(path)
    if target == "openvino" and importlib.util.find_spec("openvino") is not None:
        from .openvino_runtime import openvino_report

        return openvino_report(path)
    return None


def _missed(kernels: KernelReport | None) -> Iterator[str]:
    if kernels is not None and kernels.missed:
        first = ", ".join(f"{s} ({kernels.sites[s]})" for s in kernels.missed[:3])
        yield f"{kernels.runtime} runs {len(kernels.missed)} quantized products in floats: {first}"


def _about_weights_alone(report: ExportReport, kernels: KernelReport | None) -> Iterator[str]:
    """Seen with ONNX Runtime 1.32 (MatMulNBits) and OpenVINO 2026.4 (dynamic quantization), both by default."""
    if report.target not in KEEPS_FLOATS:
        return
    sites = [p.site for p in products_of(onnx.load(str(report.path)).graph) if p.weight_only]
    if report.target == "ort-cpu" and kernels is not None:
        sites = [s for s in sites if kernels.sites[s] == "MatMulNBits"]
    if sites:
        runtime = "OpenVINO" if report.target == "openvino" else "ONNX Runtime"
        yield (
            f"{len(sites)} products have quantized weights and float activations ({', '.join(sites[:3])}): {runtime} "
            f"rounds these activations to 8 bits by default; run the file with {KEEPS_FLOATS[report.target]}, or give "
            "the rule an act="
        )


def _about_cpu(report: ExportReport) -> Iterator[str]:
    name = lacks_vnni()
    if name and report.target in ("ort-cpu", "openvino"):
        runtime = "OpenVINO" if report.target == "openvino" else "ONNX Runtime"
        yield (
            f"{name} has no VNNI: uint8 x int8 products saturate at 16 bits there and {runtime} may return wrong "
            "numbers; train with 7-bit weights (W7E8A8), or run the file on another CPU"
        )


def _about_subbyte(report: ExportReport) -> Iterator[str]:
    """What ONNX Runtime 1.32 does with typed 2- and 4-bit weights (seen with it; docs/targets.md)."""
    if report.target != "spec":
        return
    graph = onnx.load(str(report.path)).graph
    types = {i.name: SUBBYTE[i.data_type] for i in graph.initializer if i.data_type in SUBBYTE}
    if not types:
        return
    widths = {i.name: list(i.dims) for i in graph.initializer}
    read = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in types}
    yield (
        f"ONNX Runtime computes products of {' and '.join(sorted(set(types.values())))} weights in floats, several "
        "times slower than int8, or refuses to load them; the file is for tools that follow the ONNX text: "
        "use target='ort-cpu' to run it there"
    )
    products = {p.site: p for p in products_of(graph)}
    for node in graph.node:
        weight = read.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or types[weight] != "int2" or widths[weight][-1] % 4 == 0:
            continue
        site = next((s for s, p in products.items() if p.names[0] == node.name), node.name)
        if not products[site].quantized:
            yield (
                f"ONNX Runtime 1.32 returns wrong numbers for the int2 weight of {site}: its {widths[weight][-1]} "
                "outputs are no multiple of 4"
            )
