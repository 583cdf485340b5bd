"""``kdlsq-fx bench MODEL``: latency against the float model on the machine at hand."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cli_parts import command
from .errors import CheckpointError, ConfigError

SHAPES = ("1x128", "8x128", "1x384")


def add(commands: Any) -> None:
    text = "measure latency against the float model: one process per model, alternating, padded batches"
    p = command(commands, "bench", run_bench, text)
    p.add_argument("model", nargs="+", help="qat, int or fp32 folders, or .onnx files")
    p.add_argument("--fp32", help="the float model (default: the folder fp32 near the first model)")
    p.add_argument(
        "--shapes", nargs="+", default=list(SHAPES), metavar="ROWSxLENGTH", help="texts and tokens of a batch"
    )
    p.add_argument("--threads", type=int, default=2, help="CPU threads of each model")
    p.add_argument("--rounds", type=int, default=3, help="processes per model")
    p.add_argument("--seconds", type=float, default=2.0, help="time for each model, shape and round")
    p.add_argument("--backend", default="reference", help="what runs an int folder")


def run_bench(args: argparse.Namespace) -> int:
    from .timing import Shape

    shapes = [str(Shape.parse(s)) for s in args.shapes]
    if min(args.threads, args.rounds) < 1 or args.seconds < 0:
        raise ConfigError("threads and rounds start at 1, seconds at 0", where="bench")
    missing = [m for m in args.model if not Path(m).exists()]
    if missing:
        raise CheckpointError("no such folder or file", where=missing[0], do="give what train or export wrote")
    source = args.fp32 or find_float(Path(args.model[0]))
    vocab, positions = limits_of(source)
    long = [s for s in shapes if 0 < positions < Shape.parse(s).length]
    if long:
        what = f"the model has {positions} positions, {long[0]} has more tokens"
        raise ConfigError(what, where="--shapes", do=f"give shapes such as 1x{positions}")
    with tempfile.TemporaryDirectory() as folder:
        models = {**baselines(source, Path(folder)), **{m: m for m in args.model}}
        results = alternate(models, shapes, vocab=vocab, args=args)
    print(table(results, shapes, base=next(iter(models))))
    return 0


def find_float(model: Path) -> str:
    """The folder ``fp32`` beside the model, as ``train`` lays them out."""
    home = model if model.is_dir() else model.parent
    for folder in (home / "fp32", home.parent / "fp32", home.parent.parent / "fp32"):
        if (folder / "config.json").is_file():
            return str(folder)
    raise CheckpointError(
        "no float model near it", where=str(model), do="name it: --fp32 FOLDER, a .onnx file or minilm"
    )


def baselines(source: str, folder: Path) -> dict[str, str]:
    """The float model under ONNX Runtime (the first, which ratios refer to) and, for a folder, in PyTorch."""
    if source.endswith(".onnx"):
        return {"fp32, ONNX Runtime": source}
    from .backends.onnx import export
    from .capture import capture
    from .opening import model_source, open_hub_model

    captured = capture(open_hub_model(model_source(source)))
    file = folder / "fp32.onnx"
    export(captured.gm.eval(), file, input_names=captured.inputs, output_names=captured.outputs or ())
    return {"fp32, ONNX Runtime": str(file), "fp32, PyTorch": source}


def limits_of(source: str) -> tuple[int, int]:
    """How many ids the float model knows, and its positions; 1000 and 0 where a file does not say."""
    if source.endswith(".onnx"):
        return 1000, 0
    from transformers import AutoConfig

    from .limits import configured_limits
    from .opening import model_source

    vocab, positions = configured_limits(AutoConfig.from_pretrained(model_source(source)))
    return vocab or 1000, positions


def alternate(
    models: Mapping[str, str], shapes: Sequence[str], *, vocab: int, args: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Every model once a round, each time in a new process."""
    from tqdm import tqdm

    from .timing import in_process

    results: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    process = [sys.executable, "-m", "kdlsq_fx.timing"]
    shared = {"shapes": list(shapes), "threads": args.threads, "seconds": args.seconds, "vocab": vocab}
    turns = [name for _ in range(args.rounds) for name in models]
    for name in tqdm(turns, disable=not sys.stderr.isatty(), unit="process"):
        job = {**shared, "model": models[name], "backend": args.backend}
        results[name].append(in_process(process, job, threads=args.threads))
    return results


def table(results: Mapping[str, list[dict[str, Any]]], shapes: Sequence[str], *, base: str) -> str:
    """Median of the rounds' medians, least and largest of them, and how many times faster than ``base``."""
    from .report import columns

    rows = []
    for name, rounds in results.items():
        for shape in shapes:
            medians = [statistics.median(r["ms"][shape]) for r in rounds]
            against = [statistics.median(r["ms"][shape]) for r in results[base]]
            ratio = statistics.median(b / m for b, m in zip(against, medians))
            spread = f"{min(medians):.1f} to {max(medians):.1f}"
            load = f"{statistics.median(r['load_s'] for r in rounds):.2f}"
            peak = f"{max(r['peak_mb'] for r in rounds):.0f}"
            rows.append((name, shape, f"{statistics.median(medians):.1f}", spread, f"{ratio:.2f}", load, peak))
    told = "peak MB: above a process that has loaded torch and kdlsq_fx, which ONNX Runtime alone does not need"
    return columns(("model", "shape", "ms", "rounds", "x fp32", "load s", "peak MB"), rows) + f"\n{told}"
