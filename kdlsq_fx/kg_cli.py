"""What the command line adds for knowledge graphs: ``train --task kg-links`` and ``eval --task kg-links``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kdlsq_fx.cli_parts import say
from kdlsq_fx.errors import CheckpointError

TASKS = ("kg-triples", "kg-links", "kg-relations")
WITH_NEGATIVES = ("kg-triples", "kg-links")
FORMS = {"ptq": "min-max PTQ", "qat": "student (qat)", "int": "integer", "onnx": "ONNX"}  # the rows of job.preset_rows
RANKING = Path("runs") / "ranking"  # unfinished rankings of an `eval` without --out, in the current folder


def add_options(p: argparse.ArgumentParser) -> None:
    """Options of a task on a knowledge graph, for every command that reads one."""
    p.add_argument("--long-texts", action="store_true", help="entity2textlong in place of entity2text (graphs)")


def add_train_options(p: argparse.ArgumentParser) -> None:
    """Options of training on one."""
    p.add_argument("--negatives", type=int, help="false triples per true one (kg-triples: 1, kg-links: 5)")
    p.add_argument("--fresh-negatives", action="store_true", help="draw them anew in every epoch")
    text = "models measured beside fp32 (all; kg-links: qat and onnx, for NumPy ranks slowly)"
    p.add_argument("--forms", nargs="+", choices=tuple(FORMS), help=text)


def skipped(args: argparse.Namespace) -> tuple[str, ...]:
    """Names of the rows that are not measured."""
    wanted = args.forms or (("qat", "onnx") if args.task == "kg-links" else tuple(FORMS))
    return tuple(name for form, name in FORMS.items() if form not in wanted)


def load(args: argparse.Namespace, tokenizer: Any, **fields: Any) -> tuple[Any, Any, tuple[str, ...]]:
    """The data set of a graph's task that the options of a command name; what makes a row of its table; and the names
    of its figures (none: those of its metric). ``fields``: of kg_job.KgDataset."""
    from kdlsq_fx import kg_job

    names = ("max_length", "long_texts", "seed", "negatives", "split")
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    options["fresh"] = getattr(args, "fresh_negatives", False)
    if args.command == "train":
        fields["states"] = args.out / "ranking"
    if args.command == "eval":
        fields |= {"states": _states(args), "batch_size": args.batch_size}
    found = kg_job.load(args.data, tokenizer, args.task, **options, **fields)
    for note in kg_job.notes(found):
        say(note)
    return found, kg_job.measure, kg_job.figures(args.task)


def _states(args: argparse.Namespace) -> Path | None:
    """Where `eval` keeps an unfinished ranking: beside ``--out``, else in ``RANKING``; None, which is said, where that
    cannot be written to."""
    from kdlsq_fx.files import check_folder

    if args.task != "kg-links":
        return None
    if args.out:
        return Path(args.out).with_name(args.out.name + ".ranks")
    try:
        check_folder(RANKING)
    except CheckpointError as e:
        say(f"{e.what}: a ranking that is stopped will be lost (--out FILE keeps it beside FILE)")
        return None
    return RANKING
