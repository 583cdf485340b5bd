"""``kdlsq-fx cache``: a teacher's targets on disk, to train without the teacher.

Loads neither torch nor transformers: ``--help`` has to be quick.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kdlsq_fx import cli_data, cli_learning
from kdlsq_fx.cli_parts import at_least, command, resumable, say
from kdlsq_fx.errors import ConfigError


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
    cli_learning.add_loss(p, loss="hsk", compress="1l_10t_0.1h")


def run(args: argparse.Namespace) -> int:
    from kdlsq_fx import opening
    from kdlsq_fx.files import check_no_model, make_folder
    from kdlsq_fx.kd_cache_build import build_cache

    _check(args)
    check_no_model(args.out)
    make_folder(args.out)  # a wrong name is said before any work
    teacher = opening.model_source(args.teacher)
    student = opening.model_source(args.model) if args.model else teacher
    tokenizer = cli_learning.shared_tokenizer(student, teacher)
    dataset, _, _ = cli_data.load(args, tokenizer)
    opening.check_teacher(teacher, dataset.task)
    padded = cli_learning.check_models(student, teacher, dataset)
    loss = cli_learning.chosen_loss(args, tokenizer.sep_token_id, padded=padded)
    kd = _distiller(student, teacher, dataset.task, args, loss)
    say(f"{dataset.task.name}: {len(dataset.train)} rows of train\n{kd.report()}")
    before = _written(args.out)
    with resumable(args.out):
        cache = build_cache(
            kd, dataset.train, args.out, store=args.store, batch_size=args.batch_size, tokenizer=tokenizer
        )
    if _written(args.out) == before:
        say(f"{args.out} was complete already, nothing was added")
    print(cache.report())
    return 0


def _check(args: argparse.Namespace) -> None:
    """ConfigError for options that cannot be, and for a loss that cannot be stored."""
    from kdlsq_fx.kd_named import named_loss

    chosen = cli_learning.chosen_loss(args)
    compress = chosen.get("compress")
    do = f"or learn with the teacher running: kdlsq-fx train --teacher {args.teacher}"
    if named_loss(args.loss).padding == "paper":
        stored = args.loss.removesuffix("-release")
        what = "padded positions count in it, and they are not stored"
        raise ConfigError(what, where=f"--loss {args.loss}", do=f"give --loss {stored}, {do} --loss {args.loss}")
    if compress is not None and compress.features == "magnitude-batch" and compress.width < 1:
        what = "which features it keeps depends on the batch, and batches change"
        do = f"give --features magnitude, which chooses for each token, {do} --features magnitude-batch"
        raise ConfigError(what, where="--features magnitude-batch", do=do)


def _distiller(student: str, teacher: str, task: Any, args: argparse.Namespace, loss: dict[str, Any]) -> Any:
    """The student with its loss and teacher, on the GPU where there is one."""
    import torch

    from kdlsq_fx.api import prepare_qat
    from kdlsq_fx.distillation import distill
    from kdlsq_fx.opening import load_task_model

    above = load_task_model(teacher, task, seed=args.seed).eval()
    start = above if student == teacher else load_task_model(student, task, seed=args.seed)
    kd = distill(prepare_qat(start, args.qconfig), above, **loss)
    return kd.to("cuda" if torch.cuda.is_available() else "cpu")


def _written(folder: Path) -> dict[str, int]:
    """When each shard was written, in nanoseconds."""
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*.safetensors")}
