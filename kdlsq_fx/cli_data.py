"""Which data set the options of `train`, `cache` and `eval` name, and what makes a row of its table.

Loads neither torch nor transformers: ``--help`` has to be quick.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from kdlsq_fx import kg_cli
from kdlsq_fx.cli_parts import DATA_HELP, at_least, device_of, say
from kdlsq_fx.errors import ConfigError, InputError

SQUAD = "squad"

# the tasks that read an option; those not named here serve every task
READ_BY = {
    "--doc-stride": (SQUAD,),
    "--span": (SQUAD,),
    "--long-texts": kg_cli.TASKS,
    "--negatives": kg_cli.WITH_NEGATIVES,
    "--fresh-negatives": kg_cli.WITH_NEGATIVES,
}


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", required=True, help=DATA_HELP)
    text = "squad: --data is a folder with SQuAD 1.1's JSON files; kg-...: one in KG-BERT's layout; none: GLUE's layout"
    p.add_argument("--task", choices=(SQUAD, *kg_cli.TASKS), help=text)
    text = "tokens of a row (by task: 384 for squad, 64 for sst2 and cola, else 128)"
    p.add_argument("--max-length", type=at_least(4), help=text)
    text = "tokens from one window over a long context to the next (squad; default: 128)"
    p.add_argument("--doc-stride", type=at_least(1), help=text)
    kg_cli.add_options(p)


def load(args: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any, tuple[str, ...]]:
    """The data set, whose ``dev`` is the split to measure; what makes a row of its table (job.Measure); and the names
    of its figures (none: those of its metric). ConfigError for an option that the task does not read."""
    for option, tasks in READ_BY.items():
        if getattr(args, option[2:].replace("-", "_"), None) and args.task not in tasks:
            do = f"leave it away, or give --task {' or '.join(tasks)}"
            raise ConfigError(f"--task {args.task or '(none)'} does not read it", where=option, do=do)
    device = device_of(getattr(args, "device", "cpu"))
    if args.task in kg_cli.TASKS:
        return kg_cli.load(args, tokenizer, device=device)
    split = getattr(args, "split", "dev")
    if split == "test":
        raise InputError("only graphs (--task kg-...) have a test split here", where="--split", do="use dev or train")
    return (_squad if args.task == SQUAD else _rows)(args, tokenizer, split, device)


def _rows(args: argparse.Namespace, tokenizer: Any, split: str, device: str) -> tuple[Any, Any, tuple[str, ...]]:
    from dataclasses import replace

    from kdlsq_fx import data, job

    options = {"max_length": args.max_length, "training": args.command != "eval"}
    dataset = replace(data.load(args.data, tokenizer, **options), device=device)
    return replace(dataset, dev=getattr(dataset, split)), _sized(job.measure, args), ()


def _squad(args: argparse.Namespace, tokenizer: Any, split: str, device: str) -> tuple[Any, Any, tuple[str, ...]]:
    from kdlsq_fx import squad_job
    from kdlsq_fx.squad_metrics import FIGURES

    options = {"max_length": args.max_length, "training": args.command != "eval"}
    options |= {"doc_stride": args.doc_stride} if args.doc_stride else {}
    dataset = squad_job.load(args.data, tokenizer, split=split, device=device, **options)
    for note in squad_job.notes(dataset):
        say(note)
    return dataset, _sized(squad_job.measure, args), FIGURES


def _sized(measure: Any, args: argparse.Namespace) -> Any:
    """In `eval` ``--batch-size`` is that of measuring."""
    return partial(measure, batch_size=args.batch_size) if args.command == "eval" else measure


def forget(dataset: Any) -> None:
    """The result is told and written: what was kept to get there is no longer needed."""
    from kdlsq_fx.kg_progress import forget as remove

    for path in getattr(dataset, "finished", ()):
        remove(path)


def named(args: argparse.Namespace, dataset: Any, predictions: list[Any]) -> Any:
    """Predictions as a file has them: SQuAD's by the questions' ids, as its official evaluation reads them."""
    if args.task != SQUAD:
        return predictions
    return dict(zip((q.id for q in dataset.dev.squad.questions), predictions))
