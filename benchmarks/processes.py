"""Does training in several processes take the steps of one? MiniLM's student on real rows, fifty steps.

    export OMP_NUM_THREADS=1                                                # as torchrun sets it
    python benchmarks/processes.py DATA --out runs/p/one
    torchrun --nproc-per-node 2 benchmarks/processes.py DATA --out runs/p/two
    python benchmarks/processes.py DATA --out runs/p/halves --micro-batches 2   # one process, the sums of two
    python benchmarks/processes.py DATA --out runs/p/reversed --reverse     # the control: one process, other sums
    python benchmarks/processes.py --compare runs/p/two runs/p/halves runs/p/one runs/p/reversed

``DATA`` is a folder in GLUE's layout. ``--reverse`` turns the rows of every batch around: the same gradient, added up
in another order. ``--double`` trains in float64. There is no dropout unless ``--dropout`` leaves the model's.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import kdlsq_fx as kq
from kdlsq_fx import data, opening, processes, train


@dataclass(frozen=True)
class Reversed:
    """The same batches with their rows in reverse."""

    rows: data.Encoded

    def order(self, **given: Any) -> list[np.ndarray]:
        return [batch[::-1] for batch in self.rows.order(**given)]

    def batch(self, rows: np.ndarray, *, part: slice = slice(None)) -> dict[str, torch.Tensor]:
        return self.rows.batch(rows, part=part)

    @property
    def fingerprint(self) -> str:
        return self.rows.fingerprint


def run(args: argparse.Namespace) -> None:
    processes.join()
    device = processes.device()
    source = opening.model_source("minilm")
    dataset = data.load(args.data, opening.load_tokenizer(source))
    model = opening.load_task_model(source, dataset.task, seed=0).eval().to(device)
    qat = kq.prepare_qat(model, args.qconfig).to(device)
    kq.calibrate(qat, dataset.train.sample(4, batch_size=args.batch_size, seed=0), progress=False)
    for module in qat.modules():
        if isinstance(module, torch.nn.Dropout) and not args.dropout:
            module.p = 0.0
    kd = kq.distill(qat, model, gold=1.0)
    if args.double:
        kd.double()
    rows: train.Source = Reversed(dataset.train) if args.reverse else dataset.train

    def on_step(step: int, _: torch.nn.Module) -> None:
        if step == 1 and processes.first():
            grads = {k: p.grad.clone() for k, p in kd.named_parameters() if p.grad is not None}
            save_file(grads, args.out / "gradients.safetensors")

    train.fit(
        kd, rows, out_dir=args.out, steps=args.steps, batch_size=args.batch_size, on_step=on_step,
        groups=kq.param_groups(kd, lr=5e-5), title=args.qconfig, micro_batches=args.micro_batches,
    )  # fmt: skip
    if processes.first():
        save_file({k: v.clone() for k, v in kd.state_dict().items()}, args.out / "weights.safetensors")
    processes.leave()


def compare(folders: list[Path]) -> None:
    """Each run against the first: the largest difference of the logged losses, and of the first gradient, whose
    tensors are each measured against their own largest entry."""
    one, *others = folders
    for other in others:
        a, b = (losses(f) for f in (one, other))
        apart = np.abs(a - b)
        x, y = (load_file(f / "gradients.safetensors") for f in (one, other))
        off = max(float((x[k] - y[k]).abs().max() / x[k].abs().max()) for k in x if float(x[k].abs().max()))
        whole = float(sum(((x[k] - y[k]).double() ** 2).sum() for k in x) ** 0.5)
        whole /= float(sum((v.double() ** 2).sum() for v in x.values()) ** 0.5)
        beyond = np.flatnonzero(apart > 1e-5)
        first = f"step {beyond[0] + 1}" if len(beyond) else "none"
        ends = [load_file(f / "weights.safetensors") for f in (one, other)]
        moved = max(float((v.double() - ends[1][k].double()).abs().max()) for k, v in ends[0].items() if v.numel())
        print(
            f"{other.name} against {one.name}: {len(a)} steps, loss {a[0]:.5f} to {a[-1]:.5f}; largest difference "
            f"{apart.max():.1e} ({(apart / a).max():.1e} of the loss), first above 1e-5: {first}; first gradient "
            f"{whole:.1e} (norm), {off:.1e} (worst entry); last weights {moved:.1e}"
        )


def losses(folder: Path) -> np.ndarray:
    lines = (folder / "log.tsv").read_text().splitlines()[1:]
    return np.array([float(line.split("\t")[1]) for line in lines])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="folder in GLUE's layout")
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--qconfig", default="W4E4A8")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--micro-batches", type=int, default=0)
    parser.add_argument("--compare", nargs="+", type=Path)
    given = parser.parse_args()
    compare(given.compare) if given.compare else run(given)
