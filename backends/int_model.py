"""Integer models as modules: the model's own arguments and outputs around an execution, and their folder."""

from __future__ import annotations

import importlib
import inspect
import json
from collections import OrderedDict
from pathlib import Path
from shutil import copyfile
from types import SimpleNamespace
from typing import Any

import torch

from .. import run_int
from ..capture import Captured
from ..errors import CheckpointError, ConfigError
from ..files import FORMAT, INFO, check_stage, checksum, make_folder, read_json, write_atomic, write_json
from ..model import QuantModel
from ..program import PROGRAM, load_program, save_program
from ..qconfig import QConfig
from ..range_analysis import Ranges, analyse_ranges
from ..report import columns
from ..saving import versions
from ..summary import Summary, summarize_int
from .native import NativeModel
from .reference import ReferenceModel

BACKENDS = ("reference", "torch", "native")
CONFIG = "config.json"
RUNNER = Path(run_int.__file__)


class Fields(OrderedDict[str, Any]):
    """Outputs by name, where the model's own output class is not installed."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class IntModel(QuantModel):
    """An integer graph, called like the model it was made from; inference only.

    ``backend``: ``"reference"`` runs NumPy, ``"torch"`` the GraphModule. Outputs are torch tensors either way.
    """

    def __init__(self, captured: Captured, qconfig: QConfig, backend: str) -> None:
        if backend not in BACKENDS:
            raise ConfigError(f"unknown backend {backend!r}", do=f"use one of {', '.join(BACKENDS)}")
        super().__init__(captured, None, qconfig)
        self.backend = backend
        self.reference = ReferenceModel(captured.gm) if backend == "reference" else None
        self.native = NativeModel(captured.gm) if backend == "native" else None

    @property
    def integer_only(self) -> bool:
        """True where no node but the ``dequantize`` of the results makes floats."""
        return bool(self.gm.meta.get("integer_only", False))

    def bounds(self) -> Ranges:
        """What every integer can be and how large accumulators and intermediates get; ``print`` shows a table."""
        return analyse_ranges(self.gm, longest=self._limits[1] or None)

    def summary(self) -> Summary:
        """Sizes before and after, what runs on integers, and what stays float and why; ``print`` shows a table."""
        return summarize_int(self.gm, int(self.gm.meta.get("float_bytes", 0)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels, inputs = self.split(*args, **kwargs)
        # an autocast around the caller would run the exact GEMMs in bfloat16
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.reference is not None:
                flat = tuple(torch.from_numpy(out) for out in self.reference.run(inputs))
            else:
                flat = (self.native or self.gm)(*(inputs[name] for name in self.input_names))
        return self.answer(self.pack(flat, labels), kwargs)

    def table(self) -> str:
        """The float islands as text."""
        return columns(("site", "op", "float, because"), [(i.site, i.op, i.reason) for i in self.islands])

    def save_pretrained(self, path: str | Path, tokenizer: Any = None, **_: Any) -> Path:
        """Write the program, its constants, its runner, the configuration and ``kdlsq.json`` (last) into a folder.

        ConfigError where ``stop_after`` kept it from becoming integers."""
        if self.stage != "int":
            do = "convert without stop_after; until then the qat model is what can be saved"
            raise ConfigError(f"the model is still at stage {self.stage}", do=do)
        check_stage(Path(path), "int")
        folder = make_folder(path)
        save_program(self.gm, folder, self.output_names)
        write_atomic(folder / RUNNER.name, lambda name: copyfile(RUNNER, name))
        if isinstance(self.config, SimpleNamespace):
            write_json(folder / CONFIG, vars(self.config))
        elif self.config is not None and hasattr(self.config, "save_pretrained"):
            self.config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        output = self.output_type
        info = {
            "format": FORMAT,
            "stage": "int",
            "model_class": self.model_class,
            "inputs": list(self.input_names),
            "outputs": list(self.output_names),
            "output_type": f"{output.__module__}.{output.__qualname__}" if output is not None else None,
            "parameters": [p.name for p in self.signature.parameters.values() if p.kind is not p.VAR_KEYWORD],
            "limits": list(self._limits),
            "versions": versions(),
            "qconfig": self.qconfig.to_dict(),
            "program": checksum(folder / PROGRAM),
        }
        write_json(folder / INFO, info)
        return folder


def executor(model: QuantModel, backend: str) -> IntModel:
    """An int-stage QuantModel as an IntModel on ``backend``."""
    captured = Captured(model.gm, model.input_names, model.output_names, model.output_type, model.example)
    own = IntModel(captured, model.qconfig, backend)
    own.config, own.model_class, own.signature = model.config, model.model_class, model.signature
    own._limits = model._limits
    return own.eval()


def load_executor(folder: Path, backend: str) -> IntModel:
    """An int folder as an IntModel. CheckpointError for files that are absent, damaged or of a later format."""
    info = read_json(folder / INFO)
    gm = load_program(folder)
    if info.get("program") != checksum(folder / PROGRAM):  # a save over another model that was stopped
        do = "save the model again; what stands there is half of one and half of another"
        raise CheckpointError(f"{INFO} belongs to another {PROGRAM}", where=str(folder), do=do)
    try:
        output = _output_type(info["output_type"])
        captured = Captured(gm, tuple(info["inputs"]), tuple(info["outputs"]), output, {})
        own = IntModel(captured, QConfig.from_dict(info["qconfig"]), backend)
        own.model_class, own.signature = str(info["model_class"]), _signature(info["parameters"])
        vocab, positions = info["limits"]
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        if isinstance(err, ConfigError):
            raise
        raise CheckpointError(f"{folder / INFO} is damaged: {err!r}", do="copy the folder again") from None
    own._limits = (int(vocab), int(positions))
    own.config = _config(folder / CONFIG)
    return own.eval()


def _signature(names: list[str]) -> inspect.Signature:
    kinds = inspect.Parameter
    params = [kinds(n, kinds.POSITIONAL_OR_KEYWORD, default=None) for n in names]
    return inspect.Signature([*params, kinds("kwargs", kinds.VAR_KEYWORD)])


def _output_type(name: str | None) -> Any:
    """The model's output class where transformers is installed; a dictionary with attributes where it is not."""
    if name is None:
        return None
    module, _, cls = name.rpartition(".")
    if module.split(".")[0] != "transformers":
        return Fields
    try:
        found = getattr(importlib.import_module(module), cls, Fields)
    except ImportError:
        return Fields
    return found if isinstance(found, type) and issubclass(found, OrderedDict) else Fields


def _config(path: Path) -> Any:
    """The model's configuration as plain attributes: enough for losses and padding, without transformers."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} cannot be read: {err}", do="copy the folder again") from None
    values.setdefault("num_labels", len(values.get("id2label") or {}) or 2)
    return SimpleNamespace(**values)
