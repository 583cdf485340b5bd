"""The verbs. Each reads as the list of passes it runs, in order, with a reason a line."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .capture import Captured, capture
from .errors import CalibrationError, ConfigError
from .files import read_info
from .graph import output_args
from .lsq import Lsq
from .model import QuantModel, wrap
from .passes.choose_integer_forms import choose_integer_forms
from .passes.demand_integers import demand_integers
from .passes.drop_dropout import drop_dropout
from .passes.freeze import freeze
from .passes.insert_quantizers import insert_quantizers
from .passes.leave_out_blocks import leave_out_blocks
from .passes.lower import lower
from .pipeline import Pass, Trace, run_passes
from .qconfig import QConfig, Rule, resolve
from .saving import load_qat, versions
from .summary import float_bytes

QConfigLike = str | Path | QConfig | Rule | Sequence[Rule]


def prepare_qat(
    model: nn.Module | torch.export.ExportedProgram,
    qconfig: QConfigLike,
    *,
    example: Any = None,
    passes: Iterable[Pass] = (),
    stop_after: str | None = None,
    fuel: int | None = None,
    trace: Trace | None = None,
) -> QuantModel:
    """float -> qat: a trainable copy of ``model`` with a quantizer at every ruled value; ``model`` is not changed.

    Args:
        model: a Hugging Face encoder; any ``nn.Module`` with ``example``; a GraphModule or ExportedProgram.
        qconfig: a preset such as ``"W4E4A8"``, a path to a JSON file, a QConfig, or rules (first match wins).
        example: arguments to capture a module that does not describe its own inputs (dict or tuple).
        passes: your own passes (docs/writing_a_pass.md); each runs at the end of its stage.
        stop_after: name of the pass after which to stop; ``fuel``: insert only the first n quantizers.
        trace: a Trace that collects timing (and text diffs) per pass.

    Returns:
        A module with the model's own signature and output, on its device. Weight scales are initialised, activation
        scales are not: call ``calibrate`` next.

    Raises:
        CaptureError, ConfigError: see there. CalibrationError: a weight is NaN or infinite.
    """
    config = resolve(qconfig)
    if fuel is not None and (type(fuel) is not int or fuel < 0):
        raise ConfigError(f"fuel={fuel!r} is no number of quantizers", do="use 0 or more, or None for all")
    captured = capture(model, example)
    _check_finite(captured.gm)
    captured.gm.meta.update(qconfig=config, fuel=fuel)
    run_passes(
        captured.gm,
        [
            *([leave_out_blocks] if config.left_out else []),  # a member of a family may be shallower
            choose_integer_forms,  # integer placement: softmax and GELU as the integers will compute them
            insert_quantizers,  # values a rule names get their quantizer, biases and LayerNorms their grid
        ],
        user=passes,
        stop_after=stop_after,
        trace=trace,
    )
    qat = wrap(captured, model if isinstance(model, nn.Module) else None, config)
    return qat.train(model.training if isinstance(model, nn.Module) else False)


def freeze_qat(
    qat: QuantModel, *, passes: Iterable[Pass] = (), stop_after: str | None = None, trace: Trace | None = None
) -> QuantModel:
    """qat -> qdq: the same model in eval mode with constants for quantizers; outputs are equal bit for bit."""
    return _derive(qat, [drop_dropout, freeze], passes, stop_after, trace)


def convert(
    qat: QuantModel,
    *,
    backend: str = "reference",
    allow_islands: bool | None = None,
    passes: Iterable[Pass] = (),
    stop_after: str | None = None,
    trace: Trace | None = None,
) -> Any:
    """qat -> int: integer matrix products, requantization and look-ups; float islands are listed with their reason.

    ``backend``: ``"reference"`` executes the graph in NumPy, ``"torch"`` as the GraphModule it is, ``"native"`` on int8
    kernels (docs/decisions/0015-native.md). All take the model's own arguments and return its own output; they agree
    bit for bit in all that is integer.
    ``allow_islands``: may ops stay float? None: with the kdlsq placement, which leaves much in float, yes; with the
    integer placement no, and LoweringError lists them.
    Raises CalibrationError before calibration, LoweringError (site and bound) where an accumulator could overflow;
    that none can is proved from the codes of the weights (kdlsq_fx/range_analysis.py).
    """
    from .backends import executor

    pipeline: list[Pass] = [
        drop_dropout,  # inference only from here on
        freeze,  # quantizers become quantize/dequantize with constants
        lower,  # dequantize -> op -> quantize collapses into integer primitives
    ]
    if not (_leaves_floats(qat) if allow_islands is None else allow_islands):
        pipeline.append(demand_integers)  # the integer placement promises integers only
    return executor(_derive(qat, pipeline, passes, stop_after, trace), backend)


def export_onnx(qat: QuantModel, path: str | Path, *, target: str = "ort-cpu", passes: Iterable[Pass] = ()) -> Any:
    """Write the trained graph as ONNX for a runtime; returns what the exporter reports (kernels, sizes).

    ``target``: ``"ort-cpu"``, ``"openvino"``, ``"tensorrt"`` and ``"spec"`` write QDQ as that runtime wants it
    (docs/targets.md): the quantizers that were trained, at their trained scales; nothing is added or dropped. Where
    the runtime is at hand its kernels are counted, and a warning names what would not run in int8. ``"integer"``
    lowers as ``convert`` does and writes integer operators only, equal to the reference backend bit for bit; it needs
    an ``-int`` preset. It takes a converted model, too.
    ``print`` of what is returned shows sizes, what runs in int8, and what does not and why.
    Raises CalibrationError before calibration, CheckpointError where ``path`` cannot be written, LoweringError where an
    integer file would hold floats, and where TensorRT has no type for a quantizer's codes.
    """
    from .backends.onnx import export
    from .backends.onnx_checks import checked
    from .backends.onnx_integer import TARGET, export_integer

    passes = tuple(passes)
    if target == TARGET:
        ready = isinstance(qat, QuantModel) and qat.stage == "int"
        model = qat if ready else _derive(qat, [drop_dropout, freeze, lower], passes, stop_after=None, trace=None)
    else:
        ready = isinstance(qat, QuantModel) and qat.stage in ("qdq", "float")
        model = qat if ready else freeze_qat(qat, passes=passes)
    if ready and passes:
        what = f"a model of stage {model.stage} is written as it is, pass {passes[0].__name__} would not run"
        raise ConfigError(what, do="give the qat model, or hand the passes to the verb that made this one")
    write: Any = export_integer if target == TARGET else functools.partial(export, target=target)
    metadata = {"qconfig": json.dumps(model.qconfig.to_dict()), "model_class": model.model_class, "stage": model.stage}
    report = write(
        model.gm,
        path,
        input_names=model.input_names,
        output_names=model.output_names or tuple(f"output_{i}" for i in range(len(output_args(model.gm.graph)))),
        metadata={**metadata, **versions()},
    )
    return checked(report, model.gm, model.gm.meta.get("float_bytes", 0)) if model.stage == "qdq" else report


def from_pretrained(
    path: str | Path, *, model: nn.Module | None = None, passes: Iterable[Pass] = (), backend: str = "reference"
) -> Any:
    """Load a folder: ``qat/`` gives a trainable QuantModel, ``int/`` a model that runs on ``backend``.

    ``model`` as it was given to ``prepare_qat``, for models that are not Hugging Face's; ``passes`` likewise, where
    there were some (a qat folder names them and holds no code; an int folder needs none).
    Raises CheckpointError for folders that are absent, damaged, of a later format, or of another graph, ConfigError for
    arguments that the folder has no use for.
    """
    folder, given = Path(path), tuple(passes)
    if read_info(folder).get("stage") == "int":
        from .backends import load_executor

        if model is not None or given:
            do = "leave them away, or load the qat folder it was made from"
            raise ConfigError("an int folder needs no model= and no passes=", where=str(folder), do=do)
        return load_executor(folder, backend)
    if backend != "reference":
        do = "leave backend= away, or load what convert made of it"
        raise ConfigError("a backend is chosen for an int folder only", where=str(folder), do=do)
    return load_qat(folder, prepare_qat, model, given)


def _leaves_floats(qat: Any) -> bool:
    return not isinstance(qat, QuantModel) or qat.qconfig.placement != "integer"


def _derive(
    qat: QuantModel, pipeline: list[Pass], user: Iterable[Pass], stop_after: str | None, trace: Trace | None
) -> QuantModel:
    if not isinstance(qat, QuantModel) or qat.stage != "qat":
        if isinstance(qat, QuantModel) and qat.stage == "int":
            raise ConfigError("the model is converted already", do="run it, or give the qat model it was made from")
        found = f"a {qat.stage} model" if isinstance(qat, QuantModel) else f"a {type(qat).__name__}"
        inside = isinstance(getattr(qat, "student", None), QuantModel)  # a Distiller
        do = "pass its student: kd.student" if inside else "call prepare_qat and calibrate first"
        raise ConfigError(f"this needs a qat model, got {found}", do=do)
    unready = [name for name, m in qat.gm.named_modules() if isinstance(m, Lsq) and not bool(m.ready)]
    if unready:
        raise CalibrationError(
            f"{len(unready)} quantizers have no scale yet",
            where=unready[0],
            do="calibrate first: calibrate(qat, batches)",
        )
    _check_finite(qat.gm)
    gm = copy_graph(qat.gm).cpu()  # what is derived is for the CPU, wherever it was trained
    gm.meta["float_bytes"] = float_bytes(gm)
    run_passes(gm, pipeline, user=user, stop_after=stop_after, trace=trace)
    captured = Captured(gm, qat.input_names, qat.output_names, qat.output_type, qat.example)
    derived = wrap(captured, None, qat.qconfig)
    derived.config, derived.model_class, derived.signature = qat.config, qat.model_class, qat.signature
    derived._limits = qat._limits
    return derived.eval()


def copy_graph(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A deep copy in eval mode that keeps every node's metadata."""
    own = copy.deepcopy(gm)
    own.meta = dict(gm.meta)
    for old, new in zip(gm.graph.nodes, own.graph.nodes):
        new.meta = dict(old.meta)
    return own.eval()


def _check_finite(gm: torch.fx.GraphModule) -> None:
    for name, p in gm.named_parameters():
        if bool(torch.isfinite(p.sum())):  # quick, and only a hint: a sum of finite numbers may overflow
            continue
        if not bool(torch.isfinite(p).all()):
            do = "repair the checkpoint, or go back to one from before the training diverged"
            raise CalibrationError("a weight is NaN or infinite", where=name, do=do)
