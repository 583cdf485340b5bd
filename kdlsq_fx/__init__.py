"""A quantization compiler for BERT-family models: LSQ training with distillation, integer execution, ONNX QDQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "prepare_qat": "api",
    "freeze_qat": "api",
    "convert": "api",
    "export_onnx": "api",
    "from_pretrained": "api",
    "calibrate": "calibration",
    "param_groups": "calibration",
    "scale_report": "calibration",
    "compare": "comparison",
    "distill": "distillation",
    "Cache": "kd_cache",
    "build_cache": "kd_cache_build",
    "Compression": "compression",
    "Loss": "kd_named",
    "Tap": "taps",
    "TapPlan": "tap_plan",
    "plan_taps": "planning",
    "match_graphs": "matching",
    "graph_pass": "pipeline",
    "Trace": "pipeline",
    "StudentCallback": "trainer",
    "QSpec": "qconfig",
    "Rule": "qconfig",
    "QConfig": "qconfig",
    "preset": "qconfig",
    "KdlsqError": "errors",
}
__all__ = [
    "Cache",
    "Compression",
    "KdlsqError",
    "Loss",
    "QConfig",
    "QSpec",
    "Rule",
    "StudentCallback",
    "Tap",
    "TapPlan",
    "Trace",
    "build_cache",
    "calibrate",
    "compare",
    "convert",
    "distill",
    "export_onnx",
    "freeze_qat",
    "from_pretrained",
    "graph_pass",
    "match_graphs",
    "param_groups",
    "plan_taps",
    "prepare_qat",
    "preset",
    "scale_report",
]

if TYPE_CHECKING:
    from .api import convert, export_onnx, freeze_qat, from_pretrained, prepare_qat
    from .calibration import calibrate, param_groups, scale_report
    from .comparison import compare
    from .compression import Compression
    from .distillation import distill
    from .errors import KdlsqError
    from .kd_cache import Cache
    from .kd_cache_build import build_cache
    from .kd_named import Loss
    from .matching import match_graphs
    from .pipeline import Trace, graph_pass
    from .planning import plan_taps
    from .qconfig import QConfig, QSpec, Rule, preset
    from .tap_plan import TapPlan
    from .taps import Tap
    from .trainer import StudentCallback


def __getattr__(name: str) -> Any:
    """Load a public name on first use: ``import kdlsq_fx`` alone is quick and needs no transformers or onnx."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
