"""What leaves the IR: executions and file formats, imported as ``kdlsq_fx.backends``."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model import QuantModel
    from .int_model import IntModel

if __name__ != "kdlsq_fx.backends":
    raise ImportError("import this package as kdlsq_fx.backends; a second copy would split the op table")


def executor(model: "QuantModel", backend: str) -> "IntModel":
    """An int-stage model on ``backend``; see int_model.py."""
    from .int_model import executor as make

    return make(model, backend)


def load_executor(folder: Path, backend: str) -> "IntModel":
    """The model of an int folder on ``backend``; see int_model.py."""
    from .int_model import load_executor as load

    return load(folder, backend)
