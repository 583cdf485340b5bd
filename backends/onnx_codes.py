"""The codes inside an ONNX file, site by site, for ``kdlsq_fx.compare``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from ..errors import ConfigError
from .onnx import export
from .onnx_emitter import Cut
from .onnx_runtime import OnnxModel

Array = NDArray[Any]
Hook = Callable[[str, Any], Any]


class OnnxCodes:
    """A qdq model as ONNX with its codes in sight: ``compare(qdq, OnnxCodes(qdq), batch)``.

    It is exported twice: with its codes as outputs, and cut at its codes. The cut file shows what each site makes of
    given codes: every piece between quantizers gets the codes of another execution.

    ``optimize``: ORT_ENABLE_ALL, so that the int8 kernels are what is measured.
    Raises ConfigError for a model that is not in stage qdq (``freeze_qat`` makes one).
    """

    def __init__(self, qdq: Any, *, target: str = "ort-cpu", optimize: bool = True, threads: int = 0) -> None:
        gm = qdq if isinstance(qdq, fx.GraphModule) else qdq.gm
        if gm.meta.get("stage") != "qdq":
            raise ConfigError(f"a {gm.meta.get('stage')} model shows no codes", do="pass freeze_qat(qat)")
        self._split = None if gm is qdq else qdq.split
        names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
        with tempfile.TemporaryDirectory() as folder:
            shown, cut = f"{folder}/shown.onnx", f"{folder}/cut.onnx"
            export(gm, shown, target=target, input_names=names, shown=True)
            self.cuts = export(gm, cut, target=target, input_names=names, cut=True).cuts
            self.shown = OnnxModel(shown, optimize=optimize, threads=threads)
            self.cut = OnnxModel(cut, optimize=optimize, threads=threads)
        self.results = [n for n in self.shown.output_names if n not in {c.output for c in self.cuts}]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(c.site for c in self.cuts)

    def free(self, batch: Mapping[str, Any]) -> tuple[list[Array], dict[str, Array]]:
        """(outputs, codes by site) end to end."""
        found = self.shown(self._arrays(batch))
        return [found[n] for n in self.results], self._codes(found)

    def forced(self, batch: Mapping[str, Any], codes: Mapping[str, Array]) -> tuple[list[Array], dict[str, Array]]:
        """(outputs, codes by site) where every site gets ``codes`` of the others."""
        given = {c.input: _stored(c, codes[c.site]) for c in self.cuts}
        found = self.cut({**self._arrays(batch), **given})
        return [found[n] for n in self.results], self._codes(found)

    def run(self, batch: Mapping[str, Any], hook: Hook) -> list[Array]:
        """The form that ``compare`` calls: ``hook(site, codes)`` returns the codes to go on with.

        A hook that returns other codes than it got is asked twice: for the codes to go on with, then with what the
        sites make of those.
        """
        outputs, codes = self.free(batch)
        wanted = {site: hook(site, found) for site, found in codes.items()}
        if all(wanted[s] is codes[s] for s in codes):
            return outputs
        outputs, codes = self.forced(batch, {s: np.asarray(w) for s, w in wanted.items()})
        for site, found in codes.items():
            hook(site, found)
        return outputs

    def _arrays(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        given = batch if self._split is None else self._split(**batch)[1]
        return {k: v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in given.items()}

    def _codes(self, found: Mapping[str, Array]) -> dict[str, Array]:
        return {c.site: np.rint(found[c.output]).astype(np.int64) - c.offset for c in self.cuts}


def _stored(cut: Cut, codes: Array) -> Array:
    """Codes as the file holds them."""
    return (codes.astype(np.int64) + cut.offset).astype(cut.dtype)
