"""``kdlsq-fx cache``, and the options of ``train`` that say what a student learns from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kdlsq_fx.cli_parts import DATA_HELP, at_least, command, say
from kdlsq_fx.errors import ConfigError

LOSSES = ("kdlsq", "kdlsq-release", "ternarybert", "ternarybert-release", "hsk", "hsk-release")  # kd_named loads torch
TOKENS = ("left", "right", "cls", "attention", "attention-no-sep")
FEATURES = ("magnitude", "magnitude-batch", "random", "uniform")


def add(commands: Any) -> None:
    text = "run a teacher over a data set once and store what a student needs of it, to train without the teacher"
    p = command(commands, "cache", run, text)
    p.add_argument("--data", required=True, help=DATA_HELP)
    p.add_argument("--teacher", required=True, help="fine-tuned classifier: folder or hub name")
    p.add_argument("--model", help="the student's folder or hub name (default: the teacher is its own student)")
    p.add_argument("--qconfig", default="W4E4A8", help="a preset of the student: its sites are what the cache is for")
    p.add_argument("--out", type=Path, default=Path("cache"), help="folder of the cache; a stopped run goes on in it")
    p.add_argument("--store", choices=("fp16", "fp32", "int8"), default="fp16", help="of hidden states and attention")
    p.add_argument("--batch-size", type=at_least(1), default=64, help="rows of a batch of the teacher")
    p.add_argument("--max-length", type=at_least(4), help="tokens of a row, as in training")
    p.add_argument("--seed", type=at_least(0), default=42, help="of a new head of the student")
    add_loss(p, loss="hsk", compress="1l_10t_0.1h")


def add_loss(p: argparse.ArgumentParser, *, loss: str, compress: str | None) -> None:
    """``--loss`` and what is kept of the teacher's hidden states."""
    p.add_argument("--loss", choices=LOSSES, default=loss, help="what the student learns from the teacher")
    text = "what is kept of the hidden states: 1l_10t_0.1h is 1 layer, 10 tokens, a tenth of the features; whole: all"
    p.add_argument("--compress", default=compress or "whole", help=text)
    p.add_argument("--tokens", choices=TOKENS, default="attention-no-sep", help="which tokens are kept")
    p.add_argument("--features", choices=FEATURES, default="magnitude", help="which features are kept")
    p.add_argument("--mask", choices=("teacher", "both"), default="teacher", help="on which side the others are 0")


def add_training(p: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    p.add_argument("--cache", type=Path, help="learn from a folder made by `kdlsq-fx cache`, without a teacher")
    add_loss(p, loss="kdlsq", compress=None)


def chosen_loss(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The keywords of ``distill`` that the options ask for."""
    from kdlsq_fx.compression import Compression

    if args.compress == "whole":
        return {"loss": args.loss}
    more = {"tokens": args.tokens, "features": args.features, "mask": args.mask}
    compress = Compression.parse(args.compress, separator=tokenizer.sep_token_id, **more)
    return {"loss": args.loss, "compress": compress}


def recipe_of(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The fields of ``job.Recipe`` that say what a student of ``train`` learns from."""
    if args.cache is None:
        return {"teacher": not args.no_teacher, "distil": chosen_loss(args, tokenizer)}
    if args.no_teacher or args.teacher:
        do = "leave --no-teacher and --teacher away; --model names where the student starts"
        raise ConfigError("a cache takes the place of the teacher", where="--cache", do=do)
    if args.loss != "kdlsq" or args.compress != "whole":
        raise ConfigError("a cache has its loss and compression", where="--cache", do="leave --loss, --compress away")
    return {"teacher": True, "cache": str(args.cache)}


def run(args: argparse.Namespace) -> int:
    import torch

    from kdlsq_fx import data, opening
    from kdlsq_fx.api import prepare_qat
    from kdlsq_fx.distillation import distill
    from kdlsq_fx.files import make_folder
    from kdlsq_fx.kd_cache_build import build_cache

    make_folder(args.out)  # a wrong name is said before any work
    source = opening.model_source(args.teacher)
    tokenizer = opening.load_tokenizer(source)
    dataset = data.load(args.data, tokenizer, max_length=args.max_length)
    if not opening.is_classifier(source, dataset.task):
        do = "fine-tune one first: kdlsq-fx train leaves it in OUT/fp32"
        raise ConfigError(f"the teacher is no classifier of {dataset.task.name}", where=source, do=do)
    teacher = opening.load_classifier(source, dataset.task, seed=args.seed).eval()
    start = teacher
    if args.model:
        start = opening.load_classifier(opening.model_source(args.model), dataset.task, seed=args.seed)
    kd = distill(prepare_qat(start, args.qconfig), teacher, **chosen_loss(args, tokenizer))
    kd.to("cuda" if torch.cuda.is_available() else "cpu")
    say(f"{dataset.task.name}: {len(dataset.train)} rows of train\n{kd.report()}")
    try:
        cache = build_cache(
            kd, dataset.train, args.out, store=args.store, batch_size=args.batch_size, tokenizer=tokenizer
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; whole shards are kept in {args.out}, run again to go on") from None
    print(cache.report())
    return 0
