"""What a student learns from: options of ``train`` and ``cache``, and what of them cannot be, said before any work.

Loads neither torch nor transformers: ``--help`` has to be quick.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kdlsq_fx import cli_data
from kdlsq_fx.cli_parts import positive, say
from kdlsq_fx.errors import ConfigError

LOSSES = ("kdlsq", "kdlsq-release", "ternarybert", "ternarybert-release", "hsk", "hsk-release")  # kd_named loads torch
TOKENS = ("left", "right", "cls", "attention", "attention-no-sep")
FEATURES = ("magnitude", "magnitude-batch", "random", "uniform")
CHOSEN = {"tokens": "attention-no-sep", "features": "magnitude", "mask": "teacher"}
SPAN = 100.0
OPTIONS = ("loss", "compress", *CHOSEN, "span", "layer_map", "plan")


def add_loss(p: argparse.ArgumentParser, *, loss: str | None, compress: str | None) -> None:
    """``--loss``, what is kept of the teacher's hidden states, and which layer learns from which; None: kdlsq and
    whole, where nothing was given."""
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
    which = p.add_mutually_exclusive_group()
    text = "layer of the teacher for each of the student: uniform, top, skip, or hsk:L up to layer L (default: uniform)"
    which.add_argument("--layer-map", metavar="MAP", help=text)
    text = "a tap plan that was saved, and edited perhaps, in place of the one that is found (docs/distillation.md)"
    which.add_argument("--plan", type=Path, metavar="FILE", help=text)


def add_training(p: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    p.add_argument("--cache", type=Path, help="learn from a folder made by `kdlsq-fx cache`, without a teacher")
    add_loss(p, loss=None, compress=None)


def chosen_loss(args: argparse.Namespace, separator: int | None = None, *, padded: bool = False) -> dict[str, Any]:
    """The keywords of ``distill`` that the options ask for. ``separator``: id of [SEP]. ``padded``: the token tables
    of the two models differ in size. ConfigError for what cannot be read, and for a choice among what is kept whole."""
    chosen = {"loss": args.loss or "kdlsq"} | ({"span": args.span or SPAN} if args.task == cli_data.SQUAD else {})
    return chosen | _chosen_plan(args, padded=padded) | _chosen_compression(args, separator)


def _chosen_plan(args: argparse.Namespace, *, padded: bool) -> dict[str, Any]:
    from kdlsq_fx.layer_maps import NAMES, check_name
    from kdlsq_fx.tap_plan import TapPlan

    if args.plan:
        plan = TapPlan.load(args.plan)
        if plan.teacher_inputs == "own":
            what = "in this plan the teacher reads tokens of its own; the command line gives it the student's"
            do = "write teacher_inputs as shared where both have one tokenizer, else distil in Python: kq.distill"
            raise ConfigError(what, where=f"--plan {args.plan}", do=do)
        return {"plan": plan}
    try:
        check_name(args.layer_map or "uniform")
    except ConfigError as e:
        raise ConfigError(e.what, where="--layer-map", do=f"use {NAMES}, or --plan FILE for another") from None
    options = {"layer_map": args.layer_map} if args.layer_map else {}
    options |= {"same_tokenizer": True} if padded else {}  # the command line has one tokenizer for both
    return {"plan": options} if options else {}


def _chosen_compression(args: argparse.Namespace, separator: int | None) -> dict[str, Any]:
    from kdlsq_fx.compression import Compression

    given = {name: getattr(args, name) for name in CHOSEN if getattr(args, name)}
    if args.compress in (None, "whole"):
        for name in given:
            do = "leave it away, or say with --compress how much is kept, such as 1l_10t_0.1h"
            raise ConfigError("everything of the hidden states is kept", where=f"--{name}", do=do)
        return {}
    try:
        return {"compress": Compression.parse(args.compress, separator=separator, **given)}
    except ConfigError as e:
        raise e.at(f"--compress {args.compress}") from None


def check_training(args: argparse.Namespace) -> None:
    """ConfigError for options of ``train`` that cannot be or cannot go together, CheckpointError for a cache or a plan
    that is not there: said before any work."""
    from kdlsq_fx.kd_cache import Cache

    learning = [f"--{name.replace('_', '-')}" for name in OPTIONS if getattr(args, name)]
    if args.cache is not None:
        if args.no_teacher or args.teacher:
            do = "leave --no-teacher and --teacher away; --model names where the student starts"
            raise ConfigError("a cache takes the place of the teacher", where="--cache", do=do)
        if learning:
            do = f"leave {', '.join(learning)} away"
            raise ConfigError("a cache has its plan, loss and compression", where="--cache", do=do)
        Cache.open(args.cache)
    wants = ["--teacher"] * bool(args.teacher) + learning + ["--more"] * bool(args.more)
    if args.no_teacher and wants:
        do = f"leave {', '.join(wants)} away, or --no-teacher" + "; --model names the start" * bool(args.teacher)
        raise ConfigError(f"without a teacher there is nothing that {wants[0]} could mean", where="--no-teacher", do=do)
    chosen_loss(args)


def shared_tokenizer(student: str, teacher: str) -> Any:
    """The tokenizer of the student's folder or hub name, which is the teacher's too; of two folders one may have none.
    ConfigError where the two have different ones: the teacher would take the student's ids for other words."""
    from kdlsq_fx.files import TOKENIZER_FILES
    from kdlsq_fx.kd_cache import tokenizer_hash
    from kdlsq_fx.opening import load_tokenizer

    def has_one(source: str) -> bool:
        folder = Path(source)
        return not folder.is_dir() or any(p.name.startswith(TOKENIZER_FILES) for p in folder.iterdir())

    found = [load_tokenizer(name) for name in dict.fromkeys((student, teacher)) if has_one(name)]
    if len({tokenizer_hash(one) for one in found}) > 1:
        what = f"the student and the teacher have different tokenizers, those of {student} and {teacher}"
        do = "give a teacher that was trained with the student's tokenizer; one with another can teach in Python only"
        do += " (kdlsq_fx.data.Paired; docs/distillation.md, Another tokenizer)"
        raise ConfigError(what, where="--teacher", do=do)
    if len({str(getattr(getattr(one, "backend_tokenizer", None), "normalizer", "")) for one in found}) > 1:
        say(f"the tokenizers of {student} and {teacher} have one vocabulary and prepare texts differently (lower case,")
        say("accents): the teacher reads the student's ids")
    if not has_one(teacher) and found:
        say(f"{teacher} has no tokenizer: it is taken to read the student's ids")
    return found[0] if found else load_tokenizer(student)


def check_models(student: str, teacher: str, dataset: Any) -> bool:
    """Whether the token tables of the two differ in size (one is padded then). InputError for a row that does not fit
    one of them."""
    from kdlsq_fx.limits import check_fits
    from kdlsq_fx.opening import load_config

    configs = {teacher: load_config(teacher), student: load_config(student)}
    for name, config in configs.items():
        check_fits(config, dataset, name="the model" if name == student else f"the teacher {name}")
    return len({getattr(config, "vocab_size", 0) for config in configs.values()}) > 1


def rehearse(source: str, teacher: str, dataset: Any, qconfig: Any, recipe: Any) -> None:
    """Finds what the student will learn from its teacher on the models as they are, or holds it against the cache, and
    says the plan. ConfigError where the two cannot go together, before anything is trained."""
    import warnings

    from kdlsq_fx import job
    from kdlsq_fx.api import prepare_qat
    from kdlsq_fx.opening import load_task_model

    if not (recipe.teacher or recipe.cache):
        return
    start = load_task_model(source, dataset.task, seed=0).eval()
    above = start if teacher == source or recipe.cache else load_task_model(teacher, dataset.task, seed=0).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again when the student is trained
        say(job.learner(prepare_qat(start, qconfig), above, recipe).report())
