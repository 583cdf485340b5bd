"""Latency of peers and ours side by side on this machine; writes latency.md.

    python benchmarks/latency.py --threads 2                 everything; goes on where it was stopped
    python benchmarks/latency.py --models minilm --shapes 1x128 --peers ort_fp32 ours_ort --rounds 1 --seconds 0.5
    python benchmarks/latency.py --report                    the table of what is measured so far

Peers: ``pip install kdlsq-fx[peers]``; one that is not installed is reported as missing. Every model is built once into
``runs/latency/<model>``, then measured in a new process per round, models in turn, with a pause between processes.
Results are kept per model, shape and round. All quantized models are made from the same float weights and the same
calibration batches, ours by ``calibrate`` alone. Fidelity is that of the first output (real tokens only) to the float
model's in PyTorch on one batch that is not among the calibration batches.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdlsq_fx.errors import KdlsqError
from kdlsq_fx.files import write_json
from kdlsq_fx.timing import Run, Shape, in_process, measure, open_runner, padded, torch_runner

HERE = Path(__file__).resolve().parent
SHAPES = ("1x128", "8x128", "1x384", "32x64")
MODELS = ("bert-base", "minilm")
CALIBRATION = [(Shape(4, 128), seed) for seed in range(1, 9)]
PROBE = (Shape(64, 64), 99)


@functools.cache
def float_model(name: str) -> Any:
    """BERT-base with random weights (speed and size do not depend on them), or the packaged all-MiniLM-L6-v2."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from kdlsq_fx.opening import model_source, open_hub_model

    if name == "minilm":
        return open_hub_model(model_source("minilm"))
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig()).eval()


def calibration(name: str) -> Iterator[dict[str, np.ndarray]]:
    """Batches of padded ids; the same for every quantized model."""
    vocab = float_model(name).config.vocab_size
    yield from (padded(shape, vocab=vocab, seed=seed) for shape, seed in CALIBRATION)


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {k: torch.from_numpy(v) for k, v in batch.items()}


# Builders: each writes a file (or nothing) into the model's folder. Recipes are the arguments in them.


def build_fp32(name: str, file: Path) -> None:
    """The float graph as captured, without any fusion by hand."""
    from kdlsq_fx.backends.onnx import export
    from kdlsq_fx.capture import capture

    captured = capture(float_model(name))
    export(captured.gm.eval(), file, input_names=captured.inputs, output_names=captured.outputs or ())


def build_ort_dynamic(name: str, file: Path) -> None:
    """quantize_dynamic: int8 weights per channel, MatMul and Gather, activations at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(fp32_file(name), file, weight_type=QuantType.QInt8, per_channel=True)


def build_ort_optimized(name: str, file: Path) -> None:
    """onnxruntime.transformers.optimizer (model_type="bert"), then quantize_dynamic as above."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    heads, hidden = (getattr(float_model(name).config, k) for k in ("num_attention_heads", "hidden_size"))
    fused = optimize_model(str(fp32_file(name)), model_type="bert", num_heads=heads, hidden_size=hidden)
    between = file.with_suffix(".fp32.onnx")
    fused.save_model_to_file(str(between))
    print(fused.get_fused_operator_statistics(), file=sys.stderr)
    quantize_dynamic(between, file, weight_type=QuantType.QInt8, per_channel=True)
    between.unlink()


def build_ort_static(name: str, file: Path) -> None:
    """quantize_static: QDQ around MatMul alone (the fastest of its placements), uint8 x int8, per channel, min-max."""
    import onnxruntime.quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = calibration(name)

        def get_next(self) -> Any:
            return next(self.batches, None)

    q.quantize_static(
        fp32_file(name), file, Reader(), quant_format=q.QuantFormat.QDQ, op_types_to_quantize=["MatMul"],
        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8, per_channel=True,
        calibrate_method=q.CalibrationMethod.MinMax,
    )  # fmt: skip


def build_nncf(name: str, file: Path) -> None:
    """nncf.quantize(model_type=TRANSFORMER): its defaults, with SmoothQuant and bias correction."""
    import nncf
    import openvino as ov

    data = nncf.Dataset(list(calibration(name)))
    model = nncf.quantize(ov.Core().read_model(fp32_file(name)), data, model_type=nncf.ModelType.TRANSFORMER)
    ov.save_model(model, file, compress_to_fp16=False)


def recipe(*, integer: bool = False) -> Any:
    """Calibrated, not trained; nearest to the float MiniLM of what was tried (docs/decisions/0014-openvino.md).

    Weights min-max per output channel, tables per row, first scales of activations from their least and largest value:
    inputs of dense layers with an offset, attention without one (OpenVINO computes attention in floats where its
    operands have offsets). Integers only: the same without offsets.
    """
    import kdlsq_fx as kq

    weight = kq.QSpec(bits=8, quantizer="minmax", axis=0)
    if integer:
        base = kq.preset("W8E8A8-lsq-int")
        return replace(base, rules=tuple(_from_extremes(rule, weight) for rule in base.rules))
    plain, offset = (kq.QSpec(bits=8, quantizer=q, init="minmax") for q in ("lsq", "lsq+"))
    return kq.preset("W8E8A8-lsq").with_rules(
        kq.Rule(op="linear", weight=weight, act=offset),
        kq.Rule(op="matmul", act=plain),
        *(kq.Rule(site=f"**.{t}_embeddings/*", op="embedding", weight=weight) for t in ("word", "position")),
    )


def _from_extremes(rule: Any, weight: Any) -> Any:
    act, wide = (spec and replace(spec, init="minmax") for spec in (rule.act, rule.wide))
    return replace(rule, act=act, wide=wide, weight=weight if rule.op == "linear" else rule.weight)


def calibrated(name: str, *, integer: bool = False) -> Any:
    import kdlsq_fx as kq

    qat = kq.prepare_qat(float_model(name), recipe(integer=integer))
    kq.calibrate(qat, [tensors(b) for b in calibration(name)], progress=False)
    return qat.eval()


def build_ours(target: str, name: str, file: Path) -> None:
    """``recipe()``, exported."""
    import kdlsq_fx as kq

    print(kq.export_onnx(calibrated(name, integer=target == "integer"), file, target=target), file=sys.stderr)


def build_native(name: str, file: Path) -> None:
    """``recipe()`` as an int folder, for ``backend="native"``."""
    import kdlsq_fx as kq

    kq.convert(calibrated(name)).save_pretrained(file)


def fp32_file(name: str) -> Path:
    return ARGS.runs / name / "fp32.onnx"


# Openers: how a process gets something to run.


def open_file(name: str, file: Path, threads: int) -> Run:
    return open_runner(str(file), threads=threads)


def open_openvino(name: str, file: Path, threads: int, **hints: str) -> Run:
    from kdlsq_fx.backends.openvino_runtime import OpenVinoModel

    return OpenVinoModel(file, threads=threads, hints=hints)


def open_native(name: str, file: Path, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    return open_runner(str(file), threads=threads, backend="native")


def open_torch(name: str, file: Path, threads: int, *, bf16: bool = False) -> Run:
    """The Hugging Face model itself, with its own choice of attention (sdpa)."""
    import torch

    torch.set_num_threads(threads)
    model = float_model(name)
    return torch_runner(model.to(torch.bfloat16) if bf16 else model)


def open_torchao(name: str, file: Path, threads: int) -> Run:
    """PT2E with X86InductorQuantizer's default recipe, then torch.compile with freezing; loading includes both.

    Compiled anew for every shape (dynamic=False): with dynamic shapes its int8 patterns were not matched, and it took
    206 ms in place of a quarter of that at 1x128.
    """
    import torch
    import torch._inductor.config as inductor
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.set_num_threads(threads)
    inductor.freezing = True
    model, first = float_model(name), tensors(next(calibration(name)))
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        graph = torch.export.export(model, (), first, dynamic_shapes=dict.fromkeys(first, dims), strict=False).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        graph = prepare_pt2e(graph, quantizer)
        for batch in calibration(name):
            graph(**tensors(batch))
        compiled = torch.compile(convert_pt2e(graph), dynamic=False)

    def run(batch: Any) -> Any:
        with torch.no_grad():
            return compiled(**tensors(batch))

    run(next(calibration(name)))
    return run


@dataclass(frozen=True)
class Peer:
    """``build`` writes ``file`` ("" for none); ``open`` makes of it what is measured; ``needs``: packages."""

    label: str
    file: str
    build: Callable[[str, Path], None] | None
    open: Callable[[str, Path, int], Run]
    needs: tuple[str, ...] = ()


PART = functools.partial
OV = ("openvino",)
BF16 = PART(open_openvino, INFERENCE_PRECISION_HINT="bf16")  # OpenVINO's own default on CPUs that have it
PEERS = {
    "ort_fp32": Peer("ONNX Runtime fp32", "fp32.onnx", build_fp32, open_file),
    "ort_dynamic": Peer("ONNX Runtime dynamic int8", "ort_dynamic.onnx", build_ort_dynamic, open_file),
    "ort_optimized": Peer(
        "ONNX Runtime optimizer + dynamic int8", "ort_optimized.onnx", build_ort_optimized, open_file
    ),
    "ort_static": Peer("ONNX Runtime static int8", "ort_static.onnx", build_ort_static, open_file),
    "openvino_fp32": Peer("OpenVINO fp32", "fp32.onnx", build_fp32, open_openvino, OV),
    "nncf_int8": Peer("OpenVINO, NNCF int8", "nncf.xml", build_nncf, open_openvino, (*OV, "nncf")),
    "nncf_bf16": Peer("OpenVINO, NNCF int8, floats in bf16", "nncf.xml", None, BF16, OV),
    "torch_fp32": Peer("PyTorch fp32", "", None, open_torch),
    "torch_bf16": Peer("PyTorch bf16", "", None, PART(open_torch, bf16=True)),
    "torchao": Peer("torchao PT2E int8, compiled", "", None, open_torchao, ("torchao",)),
    "ours_ort": Peer("ours, ort-cpu", "ours_ort.onnx", PART(build_ours, "ort-cpu"), open_file),
    "ours_openvino": Peer("ours, openvino", "ours_openvino.onnx", PART(build_ours, "openvino"), open_openvino, OV),
    "ours_openvino_bf16": Peer("ours, openvino, floats in bf16", "ours_openvino.onnx", None, BF16, OV),
    "ours_integer": Peer("ours, integers only", "ours_integer.onnx", PART(build_ours, "integer"), open_file),
    "ours_native": Peer("ours, native", "ours_native", build_native, open_native),
}


def one(job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: build what is missing, or measure. ``{"missing": reason}`` where it cannot be had."""
    peer, name = PEERS[job["peer"]], job["model"]
    absent = [p for p in peer.needs if importlib.util.find_spec(p) is None]
    if absent:
        return {"missing": f"{', '.join(absent)} not installed"}
    file = ARGS.runs / name / peer.file
    try:
        if job["build"]:
            if peer.build is not None:  # a file that is there may be half written
                file.parent.mkdir(parents=True, exist_ok=True)
                peer.build(name, file)
            return {"mb": size_mb(file) if peer.file else None}
        return measured(peer, name, file, job)
    except (ImportError, KdlsqError, RuntimeError, ValueError) as err:
        return {"missing": f"{type(err).__name__}: {str(err).splitlines()[0][:200]}"}


def measured(peer: Peer, name: str, file: Path, job: dict[str, Any]) -> dict[str, Any]:
    opened: list[Run] = []

    def load() -> Run:
        opened.append(peer.open(name, file, job["threads"]))
        return opened[0]

    vocab = 30522
    result = measure(load, [Shape.parse(s) for s in job["shapes"]], vocab=vocab, seconds=job["seconds"])
    probe = padded(PROBE[0], vocab=vocab, seed=PROBE[1])
    out = opened[0](probe)
    values = out if isinstance(out, (tuple, list)) else list(out.values()) if hasattr(out, "values") else [out]
    first = values[0]
    result["probe"] = real_tokens(np.asarray(first.float() if hasattr(first, "float") else first), probe).tolist()
    return result


def real_tokens(out: np.ndarray, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Flat; padding left out where there is a value per token, which is then averaged per text."""
    if out.ndim == 3:
        mask = batch["attention_mask"][..., None]
        out = (out * mask).sum(1) / mask.sum(1)
    return out.astype(np.float64).ravel()


def size_mb(file: Path) -> float:
    """A file with the weights beside it (.xml and .bin), or a folder."""
    parts = file.rglob("*") if file.is_dir() else [file, file.with_suffix(".bin")]
    return sum(p.stat().st_size for p in parts if p.is_file()) / 1e6


def store(name: str, peer: str) -> Path:
    return ARGS.runs / name / "results" / f"{peer}.json"


def known(name: str, peer: str) -> dict[str, Any]:
    file = store(name, peer)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rounds": {}}


def ask(job: dict[str, Any]) -> dict[str, Any]:
    """A new process for one job; a crash is a result too."""
    command = [sys.executable, str(Path(__file__).resolve()), "--runs", str(ARGS.runs), "--one"]
    try:
        return in_process(command, job, threads=job["threads"])
    except KdlsqError as err:
        return {"missing": str(err).splitlines()[0][:200]}


def run_all() -> None:
    """Build all, then round by round every model and peer, only what is not measured yet."""
    for name in ARGS.models:
        (ARGS.runs / name / "results").mkdir(parents=True, exist_ok=True)
        for peer in ["ort_fp32", *(p for p in ARGS.peers if p != "ort_fp32")]:
            found = known(name, peer)
            if "mb" not in found or "missing" in found:
                found.pop("missing", None)
                found |= ask({"peer": peer, "model": name, "build": True, "threads": ARGS.threads})
                write_json(store(name, peer), found)
            print(f"{name} {peer}: {found.get('missing') or 'built'}", file=sys.stderr, flush=True)
    for index in range(ARGS.rounds):
        for name in ARGS.models:
            for peer in ARGS.peers:
                measure_round(name, peer, str(index))


def measure_round(name: str, peer: str, index: str) -> None:
    found = known(name, peer)
    have = found["rounds"].setdefault(index, {"ms": {}})
    shapes = [s for s in ARGS.shapes if s not in have["ms"]]
    if "missing" in found or not shapes:
        return
    job = {"peer": peer, "model": name, "build": False, "shapes": shapes}
    answer = ask(job | {"threads": ARGS.threads, "seconds": ARGS.seconds})
    if "missing" in answer:
        found["missing"] = answer["missing"]
    else:
        have["ms"] |= answer.pop("ms")
        found["probe"] = answer.pop("probe")
        have |= {k: v for k, v in answer.items() if k not in have}
    write_json(store(name, peer), found)
    print(f"round {index} {name} {peer}: {answer.get('missing') or 'done'}", file=sys.stderr, flush=True)
    write_report()


def write_report() -> None:
    from importlib.metadata import PackageNotFoundError, version

    from common import machine

    def versions() -> Iterator[str]:
        for package in ("torch", "onnxruntime", "openvino", "nncf", "torchao"):
            try:
                yield f"{package} {version(package)}"
            except PackageNotFoundError:
                yield f"{package} missing"

    lines = [
        "# Latency, size and fidelity", "",
        f"Written by `benchmarks/latency.py`: {ARGS.threads} threads, a new process per model and round, in turn.",
        "ms: median of the rounds' medians (least to largest); x: median over the rounds of ONNX Runtime fp32 / this.",
        "Cosine, largest and relative difference: first output against PyTorch fp32, one batch (MiniLM: token means).",
        "peak MB: rise above a process that has loaded torch and kdlsq_fx (some 220 MB, which ONNX Runtime alone does "
        "not need).",
        f"{machine('cpu')}, {os.cpu_count()} cores, {datetime.date.today()}; load {os.getloadavg()[0]:.1f} at the end.",
        f"{', '.join(versions())}.", "",
    ]  # fmt: skip
    for name in ARGS.models:
        lines += table_of(name)
    ARGS.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table_of(name: str) -> list[str]:
    head = ["model", *ARGS.shapes, "MB", "load s", "peak MB", "cosine", "max abs", "relative"]
    lines = [f"## {name}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    base, exact = known(name, "ort_fp32"), known(name, "torch_fp32").get("probe")
    for peer in ARGS.peers:
        found = known(name, peer)
        if "missing" in found:
            lines.append(f"| {PEERS[peer].label} | missing: {found['missing']} |" + " |" * (len(head) - 2))
            continue
        rounds = [r for r in found["rounds"].values() if "load_s" in r]
        if not rounds:
            continue
        cells = [PEERS[peer].label, *(cell(found, base, s) for s in ARGS.shapes)]
        cells += [f"{found['mb']:.1f}" if found.get("mb") else "–"]
        cells += [f"{statistics.median(r['load_s'] for r in rounds):.2f}", f"{max(r['peak_mb'] for r in rounds):.0f}"]
        lines.append(f"| {' | '.join([*cells, *fidelity(found.get('probe'), exact)])} |")
    return [*lines, ""]


def cell(found: dict[str, Any], base: dict[str, Any], shape: str) -> str:
    """``median (least to largest), ratio``, or a dash."""
    mine = {i: statistics.median(r["ms"][shape]) for i, r in found["rounds"].items() if shape in r["ms"]}
    theirs = {i: statistics.median(r["ms"][shape]) for i, r in base["rounds"].items() if shape in r["ms"]}
    if not mine:
        return "–"
    text = f"{statistics.median(mine.values()):.1f} ({min(mine.values()):.1f} to {max(mine.values()):.1f})"
    ratios = [theirs[i] / mine[i] for i in mine if i in theirs]
    return text + (f", {statistics.median(ratios):.2f}x" if ratios else "")


def fidelity(probe: list[float] | None, exact: list[float] | None) -> list[str]:
    if probe is None or exact is None:
        return ["–"] * 3
    a, b = np.asarray(probe), np.asarray(exact)
    cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
    return [f"{cosine:.5f}", f"{np.abs(a - b).max():.4f}", f"{np.linalg.norm(a - b) / np.linalg.norm(b):.4f}"]


def main() -> int:
    global ARGS  # noqa: PLW0603  (builders and openers share the folder)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--shapes", nargs="+", default=list(SHAPES))
    p.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=3.0, help="for each model, shape and round")
    p.add_argument("--runs", type=Path, default=Path("runs/latency"))
    p.add_argument("--out", type=Path, default=HERE / "latency.md")
    p.add_argument("--report", action="store_true", help="write the table of what is there, measure nothing")
    p.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    ARGS = p.parse_args()
    if ARGS.one:
        print(json.dumps(one(ARGS.one)))
        return 0
    if not ARGS.report:
        run_all()
    write_report()
    return 0


ARGS = argparse.Namespace()

if __name__ == "__main__":
    sys.exit(main())
