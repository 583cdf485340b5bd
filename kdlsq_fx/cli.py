"""The command line: ``kdlsq-fx train | cache | family | convert | export | eval | inspect | demo | bench``.

Exit codes: 0 done, 1 something handed in is wrong (said in a line or two), 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlsq_fx import cli_bench, cli_cache, cli_data, cli_family, cli_train
from kdlsq_fx.cli_parts import TARGETS, add_device, at_least, command, find_tokenizer, resumable, say
from kdlsq_fx.errors import ConfigError, KdlsqError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = parser().parse_args(argv)
    usual = warnings.formatwarning
    warnings.formatwarning = _warning
    try:
        if args.command != "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            do = "run it without torchrun or accelerate launch"
            raise ConfigError(f"{args.command} runs in one process", where="WORLD_SIZE", do=do)
        return int(args.run(args) or 0)
    except KdlsqError as e:
        print(f"kdlsq-fx: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `kdlsq-fx inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as e:  # train.Interrupted is one, and says what was saved
        print(f"\nkdlsq-fx: {str(e) or 'stopped'}", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = usual


def _warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    """Ours as one line, without the place in our code; others' with the kind that they are filtered by."""
    kind = "warning" if category is UserWarning else category.__name__
    return f"kdlsq-fx: {kind}: {message}\n"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="kdlsq-fx", description="Quantize BERT-family models: train, convert, export, run."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (cli_train.add, cli_cache.add, cli_family.add, _convert, _export, _eval, _inspect, _demo, cli_bench.add):
        add(commands)
    return top


def _convert(commands: Any) -> None:
    p = command(commands, "convert", run_convert, "turn a trained qat folder into an integer program")
    p.add_argument("qat", type=Path, help="folder written by train or save_pretrained")
    p.add_argument("out", type=Path, help="folder for the integer program")
    text = "keep ops without an integer form in float (with the kdlsq placement they are kept anyway)"
    p.add_argument("--allow-islands", action="store_true", help=text)


def run_convert(args: argparse.Namespace) -> int:
    from kdlsq_fx.api import convert, from_pretrained
    from kdlsq_fx.files import check_folder, check_stage, model_bytes, read_info

    _check_order("convert", args.qat, args.out)
    read_info(args.qat)
    check_stage(args.out, "int")
    check_folder(args.out)
    program = convert(from_pretrained(args.qat), allow_islands=args.allow_islands or None)
    program.save_pretrained(args.out)
    _copy_tokenizer(args.qat, args.out)
    print(program.summary())
    say(f"{args.out}: {model_bytes(args.out) / 1e6:.1f} MB, without the tokenizer")
    return 0


def _export(commands: Any) -> None:
    p = command(commands, "export", run_export, "write a trained qat folder as an ONNX file")
    p.add_argument("qat", type=Path, help="folder written by train or save_pretrained")
    p.add_argument("file", type=Path, help="the .onnx file to write")
    p.add_argument("--target", default="ort-cpu", choices=TARGETS, help="runtime, or integer: no floats (-int presets)")


def run_export(args: argparse.Namespace) -> int:
    from kdlsq_fx.api import export_onnx, from_pretrained
    from kdlsq_fx.files import check_file

    _check_order("export", args.qat, args.file)
    if args.file.suffix != ".onnx":
        do = f"name a file such as {args.file / 'model.onnx' if args.file.is_dir() else f'{args.file}.onnx'}"
        raise ConfigError("the file's name does not end in .onnx", where=str(args.file), do=do)
    check_file(args.file)
    report = export_onnx(from_pretrained(args.qat), args.file, target=args.target)
    print(report)
    say(f"{args.file}: {args.file.stat().st_size / 1e6:.1f} MB")
    return 0


def _eval(commands: Any) -> None:
    p = command(commands, "eval", run_eval, "score a model (fp32, qat or int) or an ONNX file on a data set")
    p.add_argument("model", type=Path, help="folder, .onnx file, or hub name")
    cli_data.add_options(p)
    add_device(p)
    p.add_argument("--split", choices=("dev", "train", "test"), default="dev", help="which rows")
    p.add_argument("--tokenizer", help="folder with the tokenizer (default: the model's folder or one beside it)")
    p.add_argument("--backend", default="reference", help="what runs an int folder: reference, torch or native")
    p.add_argument("--batch-size", type=at_least(1), default=64, help="rows of a batch")
    p.add_argument("--out", type=Path, help="write the scores and predictions as JSON")


def run_eval(args: argparse.Namespace) -> int:
    from kdlsq_fx import job, opening
    from kdlsq_fx.files import check_file, write_json
    from kdlsq_fx.limits import check_fits

    if args.out:
        check_file(args.out)
    opening.check_model(args.model, backend=args.backend)
    tokenizer = opening.load_tokenizer(str(args.tokenizer or find_tokenizer(args.model)))
    dataset, measure, figures = cli_data.load(args, tokenizer)
    model = opening.open_model(args.model, dataset.task, backend=args.backend)
    check_fits(model, dataset, train=False)
    row = measure(args.model.stem, "eval", model, dataset)
    for name in figures or job.figures(dataset.task):
        print(f"{name}\t{row.scores[name]:.2f} ± {row.scores[name + '_se']:.2f}")
    if args.out:
        predictions = cli_data.named(args, dataset, row.predictions)
        write_json(args.out, {"rows": len(dataset.dev), "scores": row.scores, "predictions": predictions})
    cli_data.forget(dataset)
    return 0


def _inspect(commands: Any) -> None:
    p = command(commands, "inspect", run_inspect, "print for every site what it got and why")
    p.add_argument("model", help="qat or int folder; or any model folder or hub name, with --qconfig")
    p.add_argument("--qconfig", help="preset or JSON file (default: W8E8A8, or what the folder was trained with)")
    text = "of an int folder: how large every accumulator and intermediate can get, and its limit"
    p.add_argument("--bounds", action="store_true", help=text)


def run_inspect(args: argparse.Namespace) -> int:
    from kdlsq_fx.api import from_pretrained, prepare_qat
    from kdlsq_fx.files import INFO, read_info, read_json
    from kdlsq_fx.opening import model_source, open_hub_model

    info = Path(args.model) / INFO
    if args.bounds and not (info.is_file() and read_json(info).get("stage") == "int"):
        raise ConfigError("only an int folder has bounds", where=args.model, do="convert a trained qat folder first")
    if info.is_file():
        if args.qconfig:
            do = "leave --qconfig away, or inspect the fp32 model with it"
            raise ConfigError("the folder has its own qconfig", where=args.model, do=do)
        found = from_pretrained(args.model)
        print(found.bounds() if args.bounds else found.table())
        return 0
    if info.parent.is_dir() and not (info.parent / "config.json").is_file():
        read_info(info.parent)
    print(prepare_qat(open_hub_model(model_source(args.model)), args.qconfig or "W8E8A8").table())
    return 0


def _demo(commands: Any) -> None:
    text = "distil all-MiniLM-L6-v2 on English text that comes with Python, convert, export, compare, search"
    p = command(commands, "demo", run_demo, text)
    p.add_argument("--qconfig", default="W4E4A8", help="preset of the student")
    text = "output folder; a run found in it goes on (default: demo-out/QCONFIG)"
    p.add_argument("--out", type=Path, help=text)
    p.add_argument("--steps", type=at_least(1), help="training steps (default: what fits in 10 minutes on 2 cores)")
    p.add_argument("--seed", type=at_least(0), default=42, help="of the order of the texts")
    p.add_argument("--threads", type=at_least(1), help="CPU threads (default: as many as there are cores)")


def run_demo(args: argparse.Namespace) -> int:
    from kdlsq_fx import demo

    args.out = args.out or Path("demo-out") / args.qconfig
    with resumable(args.out):
        return int(demo.main(args) or 0)


def _check_order(command: str, qat: Path, out: Path) -> None:
    from kdlsq_fx.files import stage_of

    if stage_of(out) == "qat" and stage_of(qat) != "qat":
        do = f"first the qat folder: kdlsq-fx {command} {out} {qat}"
        raise ConfigError("the two are the wrong way round", where=f"{qat} {out}", do=do)


def _copy_tokenizer(source: Path, out: Path) -> None:
    """Tokenizer files travel with the program, so that `eval` needs nothing else."""
    from kdlsq_fx.files import TOKENIZER_FILES, write_atomic

    for path in source.iterdir():
        if path.is_file() and path.name.startswith(TOKENIZER_FILES):
            write_atomic(out / path.name, lambda name, path=path: shutil.copyfile(path, name))  # type: ignore[misc]
