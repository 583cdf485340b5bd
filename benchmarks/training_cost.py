"""What one QAT step costs beside an fp32 step: seconds, peak memory, warm-up; writes training_cost.md and a JSON.

    python benchmarks/training_cost.py                          MiniLM and BERT-base on the CPU
    python benchmarks/training_cost.py --device cuda            the same on a GPU, with bf16 autocast beside fp32
    python benchmarks/training_cost.py --scaling                also 3 to 24 layers and 32 to 512 tokens

Weights are random: what a figure depends on is the size. A step is ``train.fit``'s own: forward, backward, AdamW
(fused), dropout on, rows padded to various lengths. All variants of a model run in turn, one step of each a round, in
one process; a ratio is the median over rounds of (step / fp32 step of that round), its spread the quartiles. Peak
memory comes from one process per variant. fp32 is the Hugging Face model with eager attention. ``plain`` is the same
qat model with the fused kernels off (KDLSQ_FUSED=0).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "training_cost"
SIZES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "base": {},
    "tiny": {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 1000},
}
NAMES = {"minilm": "MiniLM (6 x 384)", "base": "BERT-base (12 x 768)", "tiny": "a toy (2 x 48)"}
CPU = ("fp32", "qat", "qat plain", "qat+KD", "qat+KD plain", "teacher")
CUDA = (*CPU, "fp32 bf16", "qat bf16", "qat+KD bf16")
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


class Given:
    """One batch, as a :class:`kdlsq_fx.train.Source`."""

    fingerprint = ""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.given = batch

    def order(self, **_: Any) -> list[np.ndarray]:
        return []

    def batch(self, rows: np.ndarray, *, part: slice = slice(None)) -> dict[str, Any]:
        return self.given


def variants(
    size: dict[str, int], device: str, batch: int, length: int, preset: str, *, only: str = ""
) -> dict[str, Callable[[], Any]]:
    """Functions that make one step, by name. The student of qat and of qat+KD is one model; where ``only`` qat is
    asked, the float model is let go after ``prepare_qat``, as a user without a teacher would."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    import kdlsq_fx as kq
    from kdlsq_fx import fused, train
    from kdlsq_fx.watching import Stop

    torch.manual_seed(0)
    config = BertConfig(**{"num_attention_heads": 12, **size})
    model = BertForSequenceClassification(config).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(5, config.vocab_size, (batch, length))
    mask = (torch.arange(length) < torch.linspace(length / 4, length, batch).long().unsqueeze(1)).long()
    given = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (batch,))}
    unlabelled = {k: v for k, v in given.items() if k != "labels"}
    made: dict[str, Any] = {"model": model}
    del model

    def student() -> Any:
        if "qat" not in made:
            made["qat"] = kq.prepare_qat(made["model"], preset)
            kq.calibrate(made["qat"], [{k: v[:8] for k, v in unlabelled.items()}], progress=False)
            made["qat"].to(device)
            if only.split(" ", maxsplit=1)[0] == "qat":
                del made["model"]
        return made["qat"]

    def distiller() -> Any:
        if "kd" not in made:
            made["kd"] = kq.distill(student(), made["model"]).to(device)
        return made["kd"]

    def optimizer(of: str) -> Any:
        if f"{of} optimizer" not in made:
            module = made["model"].to(device) if of == "fp32" else student()
            made[f"{of} optimizer"] = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
        return made[f"{of} optimizer"]

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def step(kind: str, precision: str, on: bool) -> None:
        fused.use(on)
        module = {"fp32": lambda: made["model"], "qat": student, "qat+KD": distiller}[kind]()
        of = "fp32" if kind == "fp32" else "qat"
        own = optimizer(of)
        loss = train._Loss(module.train(), precision)
        train._step(loss, own, Given(given), np.arange(batch), 0.0, Stop(), "")
        wait()

    def teach() -> None:
        with torch.no_grad():
            distiller().teacher(**unlabelled)
        wait()

    def function(name: str) -> Callable[[], Any]:
        if name == "teacher":
            return teach
        kind, _, rest = name.partition(" ")
        return lambda: step(kind, "bf16" if rest == "bf16" else "fp32", rest != "plain")

    return {name: function(name) for name in (CUDA if device == "cuda" else CPU)}


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each variant and ratios to fp32, all in turn."""
    import torch

    from kdlsq_fx import fused

    steps = variants(json.loads(args.size), args.device, args.batch, args.length, args.preset)
    if args.only:
        steps = {k: v for k, v in steps.items() if k in args.only.split(",")}
    first = {}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        first[name] = time.perf_counter() - start
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    ratios = {n: [a / b for a, b in zip(s, seconds["fp32"])] for n, s in seconds.items()}
    return {
        "seconds": seconds,
        "median": {n: statistics.median(s) for n, s in seconds.items()},
        "ratio": {n: quartiles(r) for n, r in ratios.items()},
        "first_step": first,
        "warm_up": dict(fused.warm_up_seconds),
        "fused": {device: kernels is not None for device, kernels in fused._kernels.items()},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third)."""
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, mid, high


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak MiB of three steps of one variant: of the process on the CPU, of torch's allocator on CUDA."""
    import torch

    step = variants(json.loads(args.size), args.device, args.batch, args.length, args.preset, only=args.only)[args.only]
    for _ in range(3):
        step()
    if args.device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated() / 2**20}
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def child(args: argparse.Namespace, what: str, size: dict[str, int], env: dict[str, str], **changed: Any) -> Any:
    """One measurement in its own process; None, with the reason printed, where it fails."""
    given = {**vars(args), **changed}
    command = [sys.executable, __file__, "--child", what, "--size", json.dumps(size)]
    for name in ("device", "batch", "length", "preset", "repeats", "only"):
        command += [f"--{name}", str(given[name])]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{what} {changed}: {done.stderr.strip()[-600:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measured(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Everything about one model."""
    size = SIZES[name]
    mallocs = {"default": {}, "raised": GLIBC} if args.device == "cpu" else {"default": {}}
    with tempfile.TemporaryDirectory() as empty:
        cold = child(args, "time", size, {"KDLSQ_CACHE": empty, "TRITON_CACHE_DIR": empty}, repeats=1, only="fp32,qat")
    found: dict[str, Any] = {"model": name, "cold": cold}
    for label, env in mallocs.items():
        found[label] = child(args, "time", size, env)
        names = CUDA if args.device == "cuda" else CPU
        found[f"{label} peak"] = {
            n: (child(args, "memory", size, env, only=n) or {}).get("peak") for n in names if n != "teacher"
        }
    return found


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """qat beside fp32 over layers and over tokens, at MiniLM's width."""
    shapes = [(n, args.length) for n in (3, 6, 12, 24)] + [(6, n) for n in (32, 128, 256, 512)]
    rows = []
    for layers, length in shapes:
        size = {**SIZES["minilm"], "num_hidden_layers": layers}
        batch = max(1, min(args.batch, args.batch * args.length // length))
        got = child(args, "time", size, GLIBC, length=length, batch=batch, only="fp32,qat")
        if got:
            rows.append({"layers": layers, "batch": batch, "length": length} | {k: got[k] for k in ("median", "ratio")})
    return rows


def page(found: dict[str, Any]) -> str:
    """training_cost.md from the JSON."""
    lines = [
        f"# What a QAT step costs: {found['device_kind']}",
        "",
        f"`{found['command']}`, {found['date']}. {found['machine']}. {found['versions']}. Preset {found['preset']}, "
        f"batch {found['batch']}, length {found['length']}, {found['repeats']} rounds. Load of the machine before: "
        f"{found['load']:.1f}. How each figure is made: the head of training_cost.py.",
        "",
    ]
    for model in found["models"]:
        for label in ("default", "raised"):
            times, peaks = model.get(label), model.get(f"{label} peak") or {}
            if not times:
                continue
            title = NAMES[model["model"]] + ("" if label == "default" else ", glibc thresholds raised")
            lines += [f"## {title}", "", "| step | ms | ratio to fp32 (quartiles) | peak MiB | ratio |"]
            lines += ["|---|---|---|---|---|"]
            for name, seconds in times["median"].items():
                low, mid, high = times["ratio"][name]
                peak, base = peaks.get(name), peaks.get("fp32")
                of = f"{peak:.0f} | {peak / base:.2f}" if peak and base else "- | -"
                lines.append(f"| {name} | {seconds * 1000:.1f} | {mid:.2f} ({low:.2f} to {high:.2f}) | {of} |")
            lines.append("")
        if model["cold"]:
            once = ", ".join(f"{k} {v:.1f} s" for k, v in model["cold"]["warm_up"].items()) or "none"
            later = (
                ", ".join(f"{k} {v:.2f} s" for k, v in (model["default"] or {}).get("warm_up", {}).items()) or "none"
            )
            lines += [f"Warm-up of the kernels: {once} the first time on a machine, {later} from the cache.", ""]
    if found["scaling"]:
        lines += [
            "## Layers and tokens",
            "",
            "| layers | batch x length | fp32 ms | qat ms | ratio |",
            "|---|---|---|---|---|",
        ]
        for row in found["scaling"]:
            fp32, qat = (row["median"][k] * 1000 for k in ("fp32", "qat"))
            shape = f"{row['batch']} x {row['length']}"
            lines.append(f"| {row['layers']} | {shape} | {fp32:.1f} | {qat:.1f} | {row['ratio']['qat'][1]:.2f} |")
        lines.append("")
    return "\n".join(lines)


def where(device: str) -> str:
    import torch
    from common import machine

    return f"{machine(device)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", default="minilm,base", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--preset", default="W2E2A8")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7, help="rounds; a few hundred on a GPU")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder for the page and the JSON")
    parser.add_argument("--child", choices=("time", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps({"time": timed, "memory": memory}[args.child](args)))
        return

    load = os.getloadavg()[0]
    found = {
        "command": " ".join(["python", "benchmarks/training_cost.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device_kind": "CPU" if args.device == "cpu" else "CUDA",
        "machine": where(args.device),
        "versions": ", ".join(f"{k} {version(k)}" for k in ("torch", "transformers"))
        + f", Python {platform.python_version()}",
        "load": load,
        **{k: getattr(args, k) for k in ("preset", "batch", "length", "repeats")},
        "models": [measured(args, name) for name in args.models.split(",")],
        "scaling": scaling(args) if args.scaling else [],
    }  # fmt: skip
    suffix = "" if args.device == "cpu" else "_cuda"
    results, pages = (args.out, args.out) if args.out else (RESULTS, HERE)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"training_cost{suffix}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (pages / f"training_cost{suffix}.md").write_text(page(found), encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    main()
