"""``kdlsq-fx family``: one training, then a model for each budget; or only what each weight loses at fewer bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kdlsq_fx.cli_parts import (
    DATA_HELP,
    add_device,
    add_fp32,
    at_least,
    command,
    device_of,
    fp32_epochs,
    positive,
    resumable,
    say,
)
from kdlsq_fx.errors import ConfigError


def add(commands: Any) -> None:
    text = "train once, then write a model for each budget of bytes: widths of weights and depth chosen by search"
    p = command(commands, "family", run, text)
    p.add_argument("model", help="fine-tuned classifier, or an encoder that is fine-tuned first; `minilm` is packaged")
    p.add_argument("--data", required=True, help=DATA_HELP)
    p.add_argument("--budget", default="", help="sizes of constants.safetensors, such as 6MiB,8MiB,11MiB,16MiB")
    p.add_argument("--latency", type=positive, metavar="MS", help="most milliseconds of a text of 128 tokens")
    text = "most bit operations of a text of 128 tokens, in 1e9: multiply-adds times the bits of both factors"
    p.add_argument("--bit-operations", type=positive, metavar="G", help=text)
    p.add_argument("--sensitivity", action="store_true", help="train nothing, only measure each weight at fewer bits")
    p.add_argument("--out", type=Path, default=Path("runs/family"), help="output folder; a run found in it goes on")
    p.add_argument("--qconfig", default="W8E8A8", help="preset or JSON file for all but the widths of the weights")
    p.add_argument("--bits", default="2,3,4,6,8", help="widths that a weight can have")
    p.add_argument("--leave-out", type=at_least(0), default=0, help="at most so many blocks are left out of a member")
    p.add_argument("--draws", choices=("one", "sandwich"), default="one", help="members of a training step")
    p.add_argument("--steps", type=at_least(1), default=1000, help="training steps")
    p.add_argument("--lr", type=positive, default=2e-4, help="learning rate of the weights")
    add_fp32(p)
    p.add_argument("--batch-size", type=at_least(1), default=32, help="rows of a batch")
    p.add_argument("--max-length", type=at_least(4), help="tokens of a row")
    p.add_argument("--seed", type=at_least(0), default=42, help="of the order of rows, the draws, the rows held out")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the matrix products in training")
    p.add_argument("--held-out", type=at_least(1), default=500, help="rows of train that only the search reads")
    text = "so many of them make its tables, the others choose members"
    p.add_argument("--calibration", type=at_least(1), default=128, help=text)
    text = "members of a budget that those others are asked about"
    p.add_argument("--candidates", type=at_least(1), default=6, help=text)
    add_device(p)


def run(args: argparse.Namespace) -> int:
    from dataclasses import asdict, replace

    from kdlsq_fx import data, family_costs, family_job, job, opening
    from kdlsq_fx.files import SETTINGS, belongs_to, make_folder
    from kdlsq_fx.limits import check_fits
    from kdlsq_fx.qconfig import resolve

    budgets, limits = _asked(args)
    qconfig = resolve(args.qconfig)
    plan = family_job.Plan(
        qconfig=qconfig, bits=_widths(args.bits), leave_out=args.leave_out, draws=args.draws, steps=args.steps,
        lr=args.lr, batch_size=args.batch_size, seed=args.seed, precision=args.precision,
        calibration=args.calibration, candidates=args.candidates,
    )  # fmt: skip
    if args.sensitivity:
        plan = replace(plan, steps=0, leave_out=0)
    out = make_folder(args.out)
    made = out / ("sensitivity" if args.sensitivity else "members")
    with resumable(out):
        source = opening.model_source(args.model)
        tokenizer = opening.load_tokenizer(source)
        dataset = replace(data.load(args.data, tokenizer, max_length=args.max_length), device=device_of(args.device))
        check_fits(opening.load_config(source), dataset)
        dataset, held_out = data.held_out(dataset, args.held_out, seed=args.seed)
        shared = {"batch_size": args.batch_size, "seed": args.seed, "precision": args.precision}
        fp32 = job.Settings(
            epochs=fp32_epochs(args, source, dataset.task), lr=args.fp32_lr, warmup=0.1, clip=1.0, **shared
        )
        hashes = {"train": dataset.train.fingerprint, "held_out": held_out.fingerprint}
        known = {"model": source, "held_out": args.held_out, "fp32": vars(fp32), "data": hashes}
        planned = {"plan": {**asdict(plan), "qconfig": qconfig.to_dict()}}
        for folder, options in ((out, known), (made, planned)):
            if (folder / SETTINGS).is_file():  # a new folder stays empty until the plan is known to be sound
                belongs_to(folder, options)
        ms = None
        if not (made / "family" / family_job.STATE).is_file():
            model = opening.load_task_model(source, dataset.task, seed=args.seed)
            least = {"bytes": min(budgets.values()), **limits} if budgets else {}
            ms = family_job.check(model, dataset, held_out, plan, least, made)
        belongs_to(out, known)
        belongs_to(make_folder(made), planned)
        if ms is not None:
            family_costs.keep_latency(made, ms)
        start = job.start_model(source, dataset, tokenizer, out=out, settings=fp32)
        task = family_job.Job(start, dataset, held_out, plan, made)
        return _look(task) if args.sensitivity else _write(task, budgets, tokenizer, limits)


def _asked(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """(name of each model -> bytes, what all of them have to keep besides)."""
    from kdlsq_fx.family_job import parse_size

    sizes = [t for t in "".join(args.budget.split()).split(",") if t]
    for option in ("budget", "latency", "bit_operations"):
        if args.sensitivity and getattr(args, option):
            where = f"--{option.replace('_', '-')}"
            do = f"leave away {where} to look, or --sensitivity: it comes with the models too"
            raise ConfigError("that is for models, and --sensitivity writes none", where=where, do=do)
    if not sizes and not args.sensitivity:
        do = "give --budget 6MiB,8MiB to write models, or --sensitivity only to look"
        raise ConfigError("a family is for budgets, or to look at", where="--budget", do=do)
    most = {"ms": (args.latency, 1.0, "ms"), "bitops": (args.bit_operations, 1e9, "G")}
    limits = {cost: given * unit for cost, (given, unit, _) in most.items() if given}
    also = "".join(f"-{str(given).removesuffix('.0')}{name}" for given, _, name in most.values() if given)
    return {f"{t}{also}": float(parse_size(t)) for t in sizes}, limits


def _look(task: Any) -> int:
    from kdlsq_fx import family_report

    task.train()
    print(family_report.write_sensitivity(task))
    say(f"written to {task.out}/sensitivity.md, sensitivity.json and sensitivity.svg")
    return 0


def _write(task: Any, budgets: dict[str, float], tokenizer: Any, limits: dict[str, float]) -> int:
    from kdlsq_fx import family_job, family_report

    say(f"{len(task.family.switches)} weights of {len(task.family.bits)} widths, {task.family.blocks} blocks")
    task.train()
    family_report.write_sensitivity(task)
    rows = family_job.run(task, budgets, tokenizer, limits=limits, say=say)
    print(family_report.write_table(task, rows))
    say(f"written to {task.out}: table.md, table.json, pareto.svg, sensitivity.svg and a folder for each budget")
    return 0


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(f"{text!r} names no widths", where="--bits", do="write 2,3,4,6,8") from None
