"""``kdlsq-fx cache``, and the options of ``train`` that say what a student learns from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kdlsq_fx import cli_data
from kdlsq_fx.cli_parts import at_least, command, positive, resumable, say
from kdlsq_fx.errors import ConfigError

LOSSES = ("kdlsq", "kdlsq-release", "ternarybert", "ternarybert-release", "hsk", "hsk-release")  # kd_named loads torch
TOKENS = ("left", "right", "cls", "attention", "attention-no-sep")
FEATURES = ("magnitude", "magnitude-batch", "random", "uniform")
CHOSEN = {"tokens": "attention-no-sep", "features": "magnitude", "mask": "teacher"}
SPAN = 100.0


def add(commands: Any) -> None:
    text = "run a teacher over a data set once and store what a student needs of it, to train without the teacher"
    p = command(commands, "cache", run, text)
    cli_data.add_options(p)
    p.add_argument("--teacher", required=True, help="fine-tuned model of the task: folder or hub name")
    p.add_argument("--model", help="the student's folder or hub name (default: the teacher is its own student)")
    p.add_argument("--qconfig", default="W4E4A8", help="a preset of the student: its sites are what the cache is for")
    p.add_argument("--out", type=Path, default=Path("cache"), help="folder of the cache; a stopped run goes on in it")
    p.add_argument("--store", choices=("fp16", "fp32", "int8"), default="fp16", help="of hidden states and attention")
    p.add_argument("--batch-size", type=at_least(1), default=64, help="rows of a batch of the teacher")
    p.add_argument("--seed", type=at_least(0), default=42, help="of a new head of the student")
    add_loss(p, loss="hsk", compress="1l_10t_0.1h")


def add_loss(p: argparse.ArgumentParser, *, loss: str | None, compress: str | None) -> None:
    """``--loss`` and what is kept of the teacher's hidden states; None: kdlsq and whole, where nothing was given."""
    text = "what the student learns from the teacher" + ("" if loss else " (default: kdlsq)")
    p.add_argument("--loss", choices=LOSSES, default=loss, help=text)
    text = "what is kept of the hidden states: 1l_10t_0.1h is 1 layer, 10 tokens, a tenth of the features; whole: all"
    p.add_argument("--compress", default=compress, help=text + ("" if compress else " (default: whole)"))
    kept = "(with --compress; default: {})"
    for name, choices, text in (
        ("tokens", TOKENS, "which tokens are kept"),
        ("features", FEATURES, "which features are kept"),
        ("mask", ("teacher", "both"), "on which side the others are 0"),
    ):
        p.add_argument(f"--{name}", choices=choices, help=f"{text} {kept.format(CHOSEN[name])}")
    text = "weight of start and end (--task squad; default: 100, as in KDLSQ's release); their mean is small"
    p.add_argument("--span", type=positive, help=text)


def add_training(p: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    p.add_argument("--cache", type=Path, help="learn from a folder made by `kdlsq-fx cache`, without a teacher")
    add_loss(p, loss=None, compress=None)


def chosen_loss(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The keywords of ``distill`` that the options ask for. ConfigError for a choice among what is kept whole."""
    from kdlsq_fx.compression import Compression

    chosen = {"loss": args.loss or "kdlsq"} | ({"span": args.span or SPAN} if args.task == cli_data.SQUAD else {})
    given = {name: getattr(args, name) for name in CHOSEN if getattr(args, name)}
    if args.compress in (None, "whole"):
        for name in given:
            do = "leave it away, or say with --compress how much is kept, such as 1l_10t_0.1h"
            raise ConfigError("everything of the hidden states is kept", where=f"--{name}", do=do)
        return chosen
    compress = Compression.parse(args.compress, separator=tokenizer.sep_token_id, **given)
    return chosen | {"compress": compress}


def check_training(args: argparse.Namespace) -> None:
    """ConfigError for options of ``train`` that cannot go together, CheckpointError for a cache that is not there:
    said before any work."""
    from kdlsq_fx.kd_cache import Cache

    learning = [f"--{name}" for name in ("loss", "compress", *CHOSEN, "span") if getattr(args, name)]
    if args.cache is not None:
        if args.no_teacher or args.teacher:
            do = "leave --no-teacher and --teacher away; --model names where the student starts"
            raise ConfigError("a cache takes the place of the teacher", where="--cache", do=do)
        if learning:
            do = f"leave {', '.join(learning)} away"
            raise ConfigError("a cache has its loss and compression", where="--cache", do=do)
        Cache.open(args.cache)
    wants = ["--teacher"] * bool(args.teacher) + learning + ["--more"] * bool(args.more)
    if args.no_teacher and wants:
        do = f"leave {', '.join(wants)} away, or --no-teacher" + "; --model names the start" * bool(args.teacher)
        raise ConfigError(f"without a teacher there is nothing that {wants[0]} could mean", where="--no-teacher", do=do)


def recipe_of(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The fields of ``job.Recipe`` that say what a student of ``train`` learns from."""
    if args.cache is not None:
        return {"teacher": True, "cache": str(args.cache)}
    return {"teacher": not args.no_teacher, "distil": chosen_loss(args, tokenizer)}


def run(args: argparse.Namespace) -> int:
    import torch

    from kdlsq_fx import opening
    from kdlsq_fx.api import prepare_qat
    from kdlsq_fx.distillation import distill
    from kdlsq_fx.files import make_folder
    from kdlsq_fx.kd_cache_build import build_cache
    from kdlsq_fx.limits import check_fits

    make_folder(args.out)  # a wrong name is said before any work
    source = opening.model_source(args.teacher)
    tokenizer = opening.load_tokenizer(source)
    dataset, _, _ = cli_data.load(args, tokenizer)
    opening.check_teacher(source, dataset.task)
    teacher = opening.load_task_model(source, dataset.task, seed=args.seed).eval()
    start = teacher
    if args.model:
        start = opening.load_task_model(opening.model_source(args.model), dataset.task, seed=args.seed)
    for model in (teacher, start):
        check_fits(model, dataset)
    kd = distill(prepare_qat(start, args.qconfig), teacher, **chosen_loss(args, tokenizer))
    kd.to("cuda" if torch.cuda.is_available() else "cpu")
    say(f"{dataset.task.name}: {len(dataset.train)} rows of train\n{kd.report()}")
    with resumable(args.out):
        cache = build_cache(
            kd, dataset.train, args.out, store=args.store, batch_size=args.batch_size, tokenizer=tokenizer
        )
    print(cache.report())
    return 0
