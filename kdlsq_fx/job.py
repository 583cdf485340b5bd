"""The whole job on a labelled data set, step by step; each step leaves a folder behind and is skipped when it is there.

out/fp32/            the fine-tuned model (Hugging Face folder)
out/<preset>/qat/    the student
out/<preset>/int/    the integer program
out/<preset>/model.onnx

Training takes any number of processes (processes.py), which all call the same steps; the first one alone writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlsq_fx import data as kd_data
from kdlsq_fx import metrics, processes
from kdlsq_fx.errors import ConfigError, InputError
from kdlsq_fx.evaluation import evaluate
from kdlsq_fx.files import INFO, write_folder
from kdlsq_fx.lsq import Lsq
from kdlsq_fx.opening import load_task_model
from kdlsq_fx.qconfig import QConfig, QSpec
from kdlsq_fx.train import Fit, Source, fit

CALIBRATION_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is trained: see :func:`kdlsq_fx.train.fit`. ``micro_batches`` is no part of what a run is."""

    epochs: float = 3
    lr: float = 5e-5
    batch_size: int = 32
    seed: int = 42
    warmup: float = 0.0
    clip: float = 0.0
    precision: str = "fp32"
    micro_batches: int = 0

    def identity(self) -> dict[str, Any]:
        """What a run that goes on has to have in common with the one before."""
        return {k: v for k, v in vars(self).items() if k != "micro_batches"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is made: its training, the learning rates of its scales (None: the quantizer's default), whether
    there is a teacher, and whether gold labels join the loss. ``distil``: keywords of ``distill``. ``cache``: a folder
    of targets that takes the teacher's place. ``begin_with`` names a preset whose student it starts from: weights and
    their scales; activations are calibrated anew."""

    settings: Settings = Settings(epochs=1)
    scales: dict[str, float] | None = None
    distil: dict[str, Any] | None = None
    teacher: bool = True
    cache: str = ""
    gold: bool = False
    dropout: float | None = None
    begin_with: str = ""


def start_model(
    source: str, dataset: kd_data.Dataset, tokenizer: Any, *, out: Path, settings: Settings
) -> torch.nn.Module:
    """Where students start from: ``source`` fine-tuned on the data set, or with 0 epochs the classifier as it is."""
    if not settings.epochs:
        return load_task_model(source, dataset.task, seed=settings.seed).eval()
    return fine_tune(source, dataset, tokenizer, out=out, settings=settings)


def fine_tune(
    source: str, dataset: kd_data.Dataset, tokenizer: Any, *, out: Path, settings: Settings
) -> torch.nn.Module:
    """The fp32 model of the task: loaded from ``out/fp32`` where it is finished, else trained and saved there."""
    folder = out / "fp32"
    if (folder / "model.safetensors").is_file():
        return load_task_model(str(folder), dataset.task, seed=settings.seed).eval()
    model = load_task_model(source, dataset.task, seed=settings.seed).to(dataset.device)
    fit(model, dataset.train, out_dir=out / "fp32-run", title=f"fp32 {dataset.task.name}", **vars(settings))
    model.eval().cpu()
    if processes.first():
        parts: list[Any] = [tokenizer, model]
        write_folder(folder, lambda made: [part.save_pretrained(made) for part in parts])
        drop_state(out / "fp32-run")
    processes.wait()
    return model


def student(
    start: torch.nn.Module,
    teacher: torch.nn.Module,
    dataset: kd_data.Dataset,
    tokenizer: Any,
    preset: str,
    *,
    out: Path,
    recipe: Recipe,
    qconfig: QConfig | None = None,
) -> tuple[Any, Fit | None]:
    """The trained qat module of a preset, starting from ``start``; loaded from ``out/<preset>/qat`` when it is there
    (then the second value is None). With ``qconfig`` ``preset`` is only its name."""
    from kdlsq_fx.api import from_pretrained
    from kdlsq_fx.calibration import param_groups
    from kdlsq_fx.kd_cache import Cache

    folder = out / preset / "qat"
    if (folder / INFO).is_file():
        return from_pretrained(folder), None
    settings = recipe.settings
    qat = calibrated(start, dataset, qconfig or preset, settings, begin_with=trained(out, recipe.begin_with))
    if recipe.dropout is not None:
        for module in qat.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = recipe.dropout
    source: Source = dataset.train
    if recipe.cache:
        source = Cache.open(recipe.cache).source(dataset.train, tokenizer)
    loop = learner(qat, teacher, recipe)
    loop.to(dataset.device)
    groups = param_groups(loop, lr=settings.lr, **(recipe.scales or {}))
    title = f"{preset} {dataset.task.name}"
    done = fit(loop, source, out_dir=out / preset / "run", groups=groups, title=title, **vars(settings))
    loop.cpu()
    qat.eval()
    if processes.first():
        qat.save_pretrained(folder, tokenizer)
        drop_state(out / preset / "run")
    processes.wait()
    return qat, done


def learner(qat: Any, teacher: torch.nn.Module | None, recipe: Recipe) -> Any:
    """What is trained: the qat module with the recipe's loss around it, or itself where labels alone count. Not read
    with a cache: ``teacher``."""
    from kdlsq_fx.distillation import distill

    if not recipe.teacher and not recipe.cache:
        return qat
    weights = ({"gold": 1.0} if recipe.gold else {}) | (recipe.distil or {})
    return distill(qat, cache=recipe.cache, **weights) if recipe.cache else distill(qat, teacher, **weights)


def with_texts(
    dataset: kd_data.Dataset,
    sources: Sequence[str | Path],
    tokenizer: Any,
    recipe: Recipe,
    *,
    limit: int | None = None,
) -> kd_data.Dataset:
    """The data set with more texts in train, which only the teacher labels: files or folders (data.load_texts), of
    each at most ``limit`` rows. No labels are used then: ConfigError for a recipe with gold labels or no teacher."""
    if not recipe.teacher or recipe.gold or recipe.cache:
        do = "train with a running teacher and without the labels' own loss"
        raise ConfigError("texts without labels can only be learned from a teacher", where="more texts", do=do)
    train = dataset.train
    if not isinstance(train, kd_data.Encoded):
        raise ConfigError(f"{dataset.task.name} takes no more texts", do="leave them away")
    for source in sources:
        train = train.joined(kd_data.load_texts(source, dataset.task, tokenizer, limit=limit))
    return replace(dataset, train=train)


def trained(out: Path, preset: str) -> Any:
    """The finished student of a preset in ``out``, or None for no preset."""
    from kdlsq_fx.api import from_pretrained

    return from_pretrained(out / preset / "qat") if preset else None


def calibrated(
    start: torch.nn.Module,
    dataset: kd_data.Dataset,
    preset: str | QConfig,
    settings: Settings,
    *,
    begin_with: Any = None,
) -> Any:
    """``start`` with quantizers whose scales come from a few random batches of train, on the data set's device; with a
    ``-minmax`` preset this is already the PTQ baseline. ``begin_with``: another student of the same model, whose
    weights it takes."""
    from kdlsq_fx.api import prepare_qat
    from kdlsq_fx.calibration import calibrate

    qat = prepare_qat(start, preset)
    if begin_with is not None:
        _take_weights(qat, begin_with)
    qat.to(dataset.device)
    batches = dataset.train.sample(CALIBRATION_BATCHES, batch_size=settings.batch_size, seed=settings.seed)
    calibrate(qat, batches)
    return qat.eval()


def _take_weights(qat: Any, other: Any) -> None:
    """Weights and the scales of common sites from another student, of quantizers with the same range; InputError where
    the two are not the same model."""
    own, given = dict(qat.gm.named_parameters()), other.gm.state_dict()
    weights = [name for name in own if "_lsq." not in name]
    missing = [name for name in weights if name not in given or given[name].shape != own[name].shape]
    if missing:
        what = f"the student to begin with lacks {len(missing)} of {len(weights)} weights, {missing[0]} for one"
        raise InputError(what, where="begin_with", do="begin with a student of the same model")
    for name, module in qat.gm.named_modules():
        if isinstance(module, Lsq) and not module.fits(given, f"{name}."):
            given = {k: v for k, v in given.items() if not k.startswith(f"{name}.")}
    qat.gm.load_state_dict(given, strict=False)  # other quantizers keep theirs


def minmax(qconfig: QConfig) -> QConfig:
    """The baseline of a user's own rules: the same bits, axes and placement, ranges from minima and maxima."""

    def plain(spec: QSpec | None) -> QSpec | None:
        return None if spec is None else replace(spec, quantizer="minmax", init="")

    rules = (replace(r, weight=plain(r.weight), act=plain(r.act), wide=plain(r.wide)) for r in qconfig.rules)
    return replace(qconfig, rules=tuple(rules))


def integer(qat: Any, *, out: Path, preset: str, tokenizer: Any = None) -> Any:
    """The integer model on the reference backend; loaded from ``out/<preset>/int`` when it is there. The tokenizer is
    saved beside it."""
    from kdlsq_fx.api import convert, from_pretrained

    folder = out / preset / "int"
    if (folder / INFO).is_file():
        return from_pretrained(folder)
    model = convert(qat)
    model.save_pretrained(folder, tokenizer)
    return model


def onnx_file(qat: Any, *, out: Path, preset: str, target: str = "ort-cpu") -> Path:
    """``out/<preset>/model.onnx``, written when it is not there."""
    from kdlsq_fx.api import export_onnx

    path = out / preset / "model.onnx"
    if not path.is_file():
        export_onnx(qat, path, target=target)
    return path


@contextmanager
def on_device(model: Any, device: str) -> Iterator[None]:
    """A float or qat module on the device, and back on the CPU afterwards. Integer models and ONNX files stay there."""
    moved = isinstance(model, torch.nn.Module) and getattr(model, "backend", None) is None
    if moved:
        model.to(device)
    try:
        yield
    finally:
        if moved:
            model.cpu()


@dataclass(frozen=True)
class Row:
    """One line of the table: a model on all of dev. ``scores`` in points (metrics.score); ``size`` in bytes, of the
    weights; ``seconds`` for the whole split; ``predictions``: classes, scores, ranks or texts, by the task."""

    model: str
    preset: str
    scores: dict[str, float]
    size: int
    seconds: float
    predictions: list[Any]
    labels: list[Any]


def measure(
    name: str, preset: str, model: Any, dataset: kd_data.Dataset, *, size: int = 0, batch_size: int = 64
) -> Row:
    """Run a model over all of dev and score it."""
    labels = dataset.dev.labels if dataset.dev.labels is not None else np.zeros(0)
    began = time.monotonic()
    with on_device(model, dataset.device):
        logits = evaluate(model, dataset.dev, batch_size=batch_size, title=f"eval {name}", task=dataset.task)
    seconds = time.monotonic() - began
    guess = metrics.predictions(dataset.task, logits)
    return Row(name, preset, metrics.score(dataset.task, guess, labels), size, seconds, guess.tolist(), labels.tolist())


Measure = Callable[..., Row]


def agreement(task: kd_data.Task, a: Row, b: Row) -> float:
    """Share of rows on which two models predict the same, 0 to 1. Scores (STS-B) are the same when they differ by at
    most 0.05, one hundredth of GLUE's 0 to 5 scale."""
    x, y = np.asarray(a.predictions), np.asarray(b.predictions)
    return float((np.abs(x - y) <= 0.05).mean() if task.regression else (x == y).mean())


def weight_bytes(path: Path) -> int:
    """Bytes of a file, or of the safetensors in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.glob("*.safetensors"))


def preset_rows(
    start: torch.nn.Module,
    teacher: torch.nn.Module,
    dataset: kd_data.Dataset,
    tokenizer: Any,
    preset: str,
    *,
    out: Path,
    recipe: Recipe,
    target: str = "ort-cpu",
    skip: Container[str] = (),
    qconfig: QConfig | None = None,
    measure: Measure = measure,
) -> Iterator[Row]:
    """Min-max PTQ, the student, its integer form and its ONNX file, each measured as soon as it is there. Rows named
    in ``skip`` are not measured again (a student is still loaded where a later row needs it). ``qconfig``: rules of
    the user's own; ``preset`` is then their name. ``measure``: what makes a row, where it is not accuracy."""
    if "min-max PTQ" not in skip:
        ptq = (preset if qconfig else preset.partition("-")[0]) + "-minmax"
        made = calibrated(start, dataset, minmax(qconfig) if qconfig else ptq, recipe.settings)
        yield measure("min-max PTQ", ptq, made, dataset)
    qat, _ = student(start, teacher, dataset, tokenizer, preset, out=out, recipe=recipe, qconfig=qconfig)
    if "student (qat)" not in skip:
        yield measure("student (qat)", preset, qat, dataset, size=weight_bytes(out / preset / "qat"))
    if "integer" not in skip:
        program = integer(qat, out=out, preset=preset, tokenizer=tokenizer)
        yield measure("integer", preset, program, dataset, size=weight_bytes(out / preset / "int"))
    if "ONNX" not in skip:
        path = onnx_file(qat, out=out, preset=preset, target=target)
        yield measure("ONNX", preset, path, dataset, size=weight_bytes(path))


def figures(task: kd_data.Task) -> tuple[str, ...]:
    """Names of the figures that a task's metric gives."""
    return (*metrics.HEADLINES[task.metric], "headline")


def table(task: kd_data.Task, rows: list[Row], names: tuple[str, ...] = ()) -> str:
    """Markdown, one line a model; figures in points with their standard errors; the share of rows predicted as the
    student of the same preset predicts them. ``names``: the figures (those of the task's metric)."""
    names = names or figures(task)
    lines = [
        f"| model | preset | {' | '.join(names)} | same as student | MB | s |",
        "|---" * (5 + len(names)) + "|",
    ]
    for row in rows:
        base = next((r for r in rows if r.model == "student (qat)" and r.preset == row.preset), None)
        same = f"{100 * agreement(task, row, base):.2f} %" if base is not None else ""
        cells = [f"{row.scores[n]:.1f} ± {row.scores[n + '_se']:.1f}" for n in names]
        size = f"{row.size / 1e6:.1f}" if row.size else ""
        lines.append(f"| {row.model} | {row.preset} | {' | '.join(cells)} | {same} | {size} | {row.seconds:.1f} |")
    return "\n".join(lines)


def rows_json(dataset: kd_data.Dataset, rows: list[Row]) -> str:
    """The table's figures and predictions as JSON text."""
    return json.dumps({"task": asdict(dataset.task), "dev_rows": len(dataset.dev), "rows": [asdict(r) for r in rows]})


def drop_state(run: Path) -> None:
    """The weights of a finished run stand in its model folder; its log and counters stay."""
    for path in run.glob("state-*.safetensors"):
        path.unlink()
