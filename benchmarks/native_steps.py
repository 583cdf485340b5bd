"""What each step of the native backend gave, and how far the machine's ceiling is; writes native_steps.md.

    python benchmarks/native_steps.py [--models minilm] [--shapes 1x128] [--rounds 7]

Every step is a process that keeps its model; they are asked in turn, so that the machine's moods reach all of them. ms:
median over the rounds of the medians of a turn (least to largest). ``ceiling``: what the multiply-adds of the dense
layers and of attention take at the rate of vpdpbusd on registers alone, measured in the same turns; ``of it`` is how
much of that rate a step reaches, all that is not a product counted as lost.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, say

from kdlsq_fx.timing import PAUSE, Shape, padded

HERE = Path(__file__).resolve().parent
STEPS = {
    "torch": "int graph on torch ops (products in float64 or int32)",
    "onednn": "dense layers in oneDNN, requantization fused; all else torch",
    "kernels": "own kernels, each op apart",
    "linear": "+ bias, requantization, GELU and quantize behind a dense layer",
    "rows": "+ softmax and LayerNorm with the quantize behind them",
    "attention": "+ attention as one kernel (and sum + LayerNorm in integers)",
}
PLACEMENTS = ("W8E8A8-lsq", "W8E8A8-lsq-int")
MODELS = {"bert-base": (12, 768, 3072), "minilm": (6, 384, 1536)}
PEAK = r"""
#include <immintrin.h>
#include <omp.h>
#include <cstdint>
extern "C" int64_t peak(int64_t n, int threads) {
  int64_t all = 0;
#pragma omp parallel num_threads(threads) reduction(+ : all)
  {
    __m512i acc[12], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) acc[j] = _mm512_set1_epi32(j);  // equal ones would be computed once
    for (int64_t i = 0; i < n; ++i) {
      asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], a, b);
    }
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) all += _mm512_reduce_add_epi32(acc[j]);
  }
  return all;
}
"""


def products(name: str, shape: Shape) -> float:
    """Multiplications and additions of the dense layers and of attention's two products, padding included."""
    layers, hidden, inner = MODELS[name]
    tokens = shape.rows * shape.length
    return 2.0 * layers * tokens * (4 * hidden * hidden + 2 * hidden * inner + 2 * hidden * shape.length)


def float_model(name: str) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    layers, hidden, inner = MODELS[name]
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    return BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()


def build(name: str, folder: Path) -> None:
    """Both placements as int folders; random weights, whose values no speed depends on."""
    import torch

    import kdlsq_fx as kq

    for preset in PLACEMENTS:
        if (folder / preset).exists():
            continue
        qat = kq.prepare_qat(float_model(name), preset)
        batches = [padded(Shape(4, 128), vocab=30522, seed=seed) for seed in range(2)]
        kq.calibrate(qat, [{k: torch.from_numpy(v) for k, v in b.items()} for b in batches], progress=False)
        kq.convert(qat.eval()).save_pretrained(folder / preset)


def opened(step: str, folder: Path) -> Any:
    """``run(batch)`` of one step."""
    import torch

    import kdlsq_fx as kq
    from kdlsq_fx.backends.native import translate
    from kdlsq_fx.backends.native_fusions import FUSIONS, fuse_linear, fuse_norm, fuse_softmax

    model = kq.from_pretrained(folder, backend="torch")
    fusions = {
        "onednn": (fuse_linear,),
        "kernels": (),
        "linear": (fuse_linear,),
        "rows": (fuse_linear, fuse_norm, fuse_softmax),
        "attention": FUSIONS,
    }
    gm = model.gm
    if step != "torch":
        gm, _ = translate(gm, fusions[step], own=step != "onednn")
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]

    def run(batch: Any) -> None:
        with torch.no_grad():
            gm(*(torch.from_numpy(batch[n]) for n in names))

    return run


def peak_of(threads: int) -> Any:
    """``run(batch)`` that does 12 * 16 * 4 multiply-adds a turn of a loop and thread."""
    import torch  # noqa: F401  (one OpenMP pool for all)

    from kdlsq_fx.compiled import compiled

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "peak.cpp"
        source.write_text(PEAK, encoding="utf-8")
        library = ctypes.CDLL(str(compiled("peak", [source])))
    library.peak.argtypes = (ctypes.c_int64, ctypes.c_int)
    return lambda batch: library.peak(4_000_000, threads)


PEAK_OPS = 2.0 * 12 * 64 * 4_000_000


def child(step: str, folder: Path, threads: int) -> None:
    """Answers each line ``8x128`` with the median milliseconds of a turn."""
    import torch

    torch.set_num_threads(threads)
    run = peak_of(threads) if step == "peak" else opened(step, folder)
    print("ready", flush=True)
    for line in sys.stdin:
        batch = padded(Shape.parse(line.strip()), vocab=30522)
        times = []
        for index in range(6):
            began = time.perf_counter()
            run(batch)
            if index:
                times.append((time.perf_counter() - began) * 1e3)
        print(json.dumps(statistics.median(times)), flush=True)


def measure(name: str, preset: str, args: argparse.Namespace) -> list[str]:
    """The lines of one table."""
    folder = args.runs / name / preset
    steps = ["peak", *(s for s in STEPS if s != "torch" or not args.quick)]
    command = [sys.executable, str(Path(__file__).resolve()), "--threads", str(args.threads), "--folder", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    running = {s: subprocess.Popen([*command, "--child", s], **pipes) for s in steps}
    ms: dict[tuple[str, str], list[float]] = {(s, shape): [] for s in steps for shape in args.shapes}
    try:
        for step, process in running.items():
            if process.stdout.readline().strip() != "ready":
                raise SystemExit(f"{step} of {name} did not start")
        for index in range(args.rounds):
            for shape in args.shapes:
                for step, process in running.items():
                    time.sleep(PAUSE)
                    process.stdin.write(f"{shape}\n")
                    process.stdin.flush()
                    ms[step, shape].append(float(process.stdout.readline()))
            say(f"{name} {preset}: round {index + 1} of {args.rounds}")
    finally:
        for process in running.values():
            process.kill()
    return table(name, preset, ms, args)


def table(name: str, preset: str, ms: dict[tuple[str, str], list[float]], args: argparse.Namespace) -> list[str]:
    rate = {s: PEAK_OPS * args.threads / statistics.median(ms["peak", s]) / 1e6 for s in args.shapes}
    lines = [f"## {name}, {preset}", "", f"| step | {' | '.join(args.shapes)} |", "|---" * (len(args.shapes) + 1) + "|"]
    for step, what in STEPS.items():
        if (step, args.shapes[0]) not in ms:
            continue
        cells = []
        for shape in args.shapes:
            mine = ms[step, shape]
            least = products(name, Shape.parse(shape)) / rate[shape] / 1e6
            of = statistics.median(mine)
            cells.append(f"{of:.1f} ms ({min(mine):.1f} to {max(mine):.1f}), {least / of:.0%} of it")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    least = [f"{products(name, Shape.parse(s)) / rate[s] / 1e6:.1f} ms at {rate[s]:.0f} GOP/s" for s in args.shapes]
    return [*lines, f"| ceiling | {' | '.join(least)} |", ""]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    p.add_argument("--shapes", nargs="+", default=["1x128", "8x128", "1x384"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--quick", action="store_true", help="without the slow first step")
    p.add_argument("--runs", type=Path, default=Path("runs/native_steps"))
    p.add_argument("--out", type=Path, default=HERE / "native_steps.md")
    p.add_argument("--child", help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        child(args.child, args.folder, args.threads)
        return 0
    import datetime

    import torch

    lines = [
        "# The native backend, step by step", "",
        f"Written by `benchmarks/native_steps.py` on {datetime.date.today().isoformat()}: {machine('cpu')}, "
        f"{args.threads} threads, torch {torch.__version__}, {args.rounds} rounds.",
        *(__doc__ or "").split("\n\n")[2].splitlines(), "",
    ]  # fmt: skip
    for name in args.models:
        build(name, args.runs / name)
        for preset in PLACEMENTS:
            lines += measure(name, preset, args)
            args.out.write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
