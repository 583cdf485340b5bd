"""Seconds and peak memory of prepare_qat and convert on BERT-base at 3 to 24 layers; writes compile_time.md.

    python benchmarks/compile_time.py            one process per size, one after another

Weights are random: what a figure depends on is the size. Peak memory is the process's largest resident set while the
verb ran, less what was resident before the model was built, as a multiple of the float32 weights (the model's own copy
of them included). CPU seconds are those of the process, all its threads together: on a machine that does other work
too they say more than the wall clock does, and the page gives the load it was written under.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAYERS = (3, 6, 12, 24)


def resident() -> float:
    """MiB resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


class Peak:
    """Largest resident size while the block runs, sampled every 10 ms."""

    def __enter__(self) -> Peak:
        self.value, self._on = resident(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self.value = max(self.value, resident())
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()


def measure(layers: int, preset: str) -> dict[str, float]:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    import kdlsq_fx as kq

    kq.prepare_qat  # noqa: B018  (imports are not what is measured)
    kq.convert  # noqa: B018
    torch.manual_seed(0)
    gc.collect()
    base = resident()
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers)).eval()
    weights = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    ids = torch.randint(5, 1000, (2, 16))
    with Peak() as peak_prepare:
        start, cpu = time.perf_counter(), time.process_time()
        qat = kq.prepare_qat(model, preset)
        prepare, prepare_cpu = time.perf_counter() - start, time.process_time() - cpu
    kq.calibrate(qat, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], progress=False)
    del model
    gc.collect()
    with Peak() as peak_convert:
        start, cpu = time.perf_counter(), time.process_time()
        int_model = kq.convert(qat)
        convert, convert_cpu = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    int_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return {
        "layers": layers,
        "weights": weights,
        "prepare": prepare,
        "convert": convert,
        "prepare_cpu": prepare_cpu,
        "convert_cpu": convert_cpu,
        "first_run": time.perf_counter() - start,
        "peak_prepare": (peak_prepare.value - base) / weights,
        "peak_convert": (peak_convert.value - base) / weights,
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="W4E4A8")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.preset)))
        return 0
    rows: dict[int, list[dict[str, float]]] = {n: [] for n in LAYERS}
    for _ in range(args.repeat):
        for n in LAYERS:
            command = [sys.executable, __file__, "--one", str(n), "--preset", args.preset]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows[n].append(json.loads(out.splitlines()[-1]))
            print(n, rows[n][-1], file=sys.stderr)
    (HERE / "compile_time.md").write_text(report(rows, args), encoding="utf-8")
    return 0


def report(rows: dict[int, list[dict[str, float]]], args: argparse.Namespace) -> str:
    def middle(n: int, key: str) -> float:
        return sorted(r[key] for r in rows[n])[len(rows[n]) // 2]

    names = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "numpy"))
    lines = [
        "# Compile time on BERT-base",
        "",
        f"Written by `benchmarks/compile_time.py`: preset {args.preset}, hidden 768, random weights (seed 0),",
        f"median of {args.repeat} processes per size. {os.cpu_count()} cores ({platform.machine()}),",
        f"Python {platform.python_version()},",
        f"{names}; {datetime.date.today()}.",
        f"Jobs that wanted a core at the end, its own among them: {os.getloadavg()[0]:.1f}; where there are more than",
        "cores the wall clock shows the other jobs too. "
        f"Threads per process: {os.environ.get('OMP_NUM_THREADS', 'all')}.",
        "",
        "| layers | fp32 weights MiB | prepare_qat CPU s | wall s | convert CPU s | wall s | first integer run s "
        "| peak prepare | peak convert |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for n in LAYERS:
        lines.append(
            f"| {n} | {middle(n, 'weights'):.0f} | {middle(n, 'prepare_cpu'):.1f} | {middle(n, 'prepare'):.1f} "
            f"| {middle(n, 'convert_cpu'):.1f} | {middle(n, 'convert'):.1f} "
            f"| {middle(n, 'first_run'):.1f} | {middle(n, 'peak_prepare'):.2f}x | {middle(n, 'peak_convert'):.2f}x |"
        )
    for key in ("prepare_cpu", "convert_cpu"):
        slope = (middle(24, key) - middle(3, key)) / 21
        guess = middle(3, key) + slope * 9
        lines.append("")
        lines.append(
            f"{key.removesuffix('_cpu')}: {slope:.2f} CPU seconds a layer; a straight line through 3 and 24 layers "
            f"gives {guess:.1f} s at 12, measured {middle(12, key):.1f} s."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
