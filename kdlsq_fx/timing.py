"""Latency of models, each in a process of its own: padded batches, medians and spread, peak memory.

``python -m kdlsq_fx.timing JOB`` is such a process: JOB is JSON, the answer one line of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError, ConfigError
from .files import INFO, stage_of

Batch = Mapping[str, NDArray[np.int64]]
Run = Callable[[Batch], Any]
PAUSE = 0.15  # seconds between processes: ONNX Runtime's workers spin for a while after a run


@dataclass(frozen=True)
class Shape:
    """``rows`` texts of at most ``length`` tokens. Written ``8x128``."""

    rows: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ConfigError for anything but ROWSxLENGTH."""
        parts = text.split("x")
        if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
            raise ConfigError(f"{text!r} is no shape", do="write rows and tokens, such as 8x128")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}"


def padded(shape: Shape, *, vocab: int = 1000, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Ids, mask and types int64 [rows, length]; the first row is full, the others have half to all of the length."""
    random = np.random.default_rng(seed)
    lengths = random.integers((shape.length + 1) // 2, shape.length + 1, shape.rows)
    lengths[0] = shape.length
    mask = (np.arange(shape.length) < lengths[:, None]).astype(np.int64)
    ids = random.integers(min(5, vocab - 1), vocab, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def time_calls(run: Run, batch: Batch, *, seconds: float, least: int = 5) -> list[float]:
    """Milliseconds of each call, after two that are not counted; ``least`` calls, and as many as fit ``seconds``."""
    return [ms for (ms,) in time_in_turn([run], batch, seconds=seconds, least=least)]


def time_in_turn(runs: Sequence[Run], batch: Batch, *, seconds: float, least: int = 5) -> list[list[float]]:
    """Milliseconds of each call, a list for each round of one call of all ``runs``, after two rounds that are not
    counted; ``least`` rounds, and as many as fit ``seconds``."""
    rounds: list[list[float]] = []
    for _ in range(2):
        _round(runs, batch)
    start = time.perf_counter()
    while len(rounds) < least or time.perf_counter() - start < seconds:
        rounds.append(_round(runs, batch))
    return rounds


def _round(runs: Sequence[Run], batch: Batch) -> list[float]:
    times = []
    for run in runs:
        began = time.perf_counter()
        run(batch)
        times.append((time.perf_counter() - began) * 1e3)
    return times


def measure(load: Callable[[], Run], shapes: Sequence[Shape], *, vocab: int, seconds: float) -> dict[str, Any]:
    """``{"load_s", "peak_mb", "ms": {shape: [..]}}`` of the model that ``load`` opens, in this process. ``peak_mb``:
    how far memory rose above what stood before, torch and this package among it (some 220 MB)."""
    before, began = _peak_mb(), time.perf_counter()
    run = load()
    loaded = time.perf_counter() - began
    ms = {str(s): time_calls(run, padded(s, vocab=vocab), seconds=seconds) for s in shapes}
    return {"load_s": loaded, "peak_mb": _peak_mb() - before, "ms": ms}


def in_process(command: Sequence[str], job: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """Run ``command JOB`` and read the JSON of its last line. CheckpointError with its last words where it fails.

    What it prints goes to files: a process that it leaves behind (OpenVINO's telemetry) would keep a pipe open. With
    ``CI`` set that telemetry is not sent.
    """
    own = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CI": "true"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = subprocess.run(
            [*command, json.dumps(dict(job))], stdout=out, stderr=err, env=own, check=False
        ).returncode
        lines, said = (_lines(f) for f in (out, err))
    time.sleep(PAUSE)
    if code or not lines:
        raise CheckpointError(
            f"could not be measured: {said[-1] if said else 'no answer'}", where=str(job.get("model"))
        )
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _lines(file: Any) -> list[str]:
    file.seek(0)
    return str(file.read()).strip().splitlines()


def open_runner(path: str, *, threads: int, backend: str = "reference") -> Run:
    """What runs a .onnx file (by the runtime it was exported for), a qat or int folder, or a float model's folder."""
    file = Path(path)
    if file.suffix == ".onnx":
        return _onnx(file, threads)
    import torch

    torch.set_num_threads(threads)
    if (file / INFO).is_file():
        from .api import from_pretrained

        runs_on = backend if stage_of(file) == "int" else "reference"  # what bench measures need not all be int folders
        return torch_runner(from_pretrained(file, backend=runs_on).eval())
    from .opening import model_source, open_hub_model

    return torch_runner(open_hub_model(model_source(path)))


def torch_runner(model: Any) -> Run:
    """A module, fed the inputs that its forward takes."""
    import inspect

    import torch

    names = getattr(model, "input_names", None) or tuple(inspect.signature(model.forward).parameters)

    def run(batch: Batch) -> Any:
        with torch.inference_mode():
            return model(**{k: torch.from_numpy(v) for k, v in batch.items() if k in names})

    return run


def _onnx(file: Path, threads: int) -> Run:
    from .backends.onnx import metadata_of
    from .backends.onnx_runtime import OnnxModel

    if metadata_of(file).get("target") == "openvino":
        from .backends.openvino_runtime import OpenVinoModel

        return OpenVinoModel(file, threads=threads)
    return OnnxModel(file, threads=threads)


def _peak_mb() -> float:
    """Most memory that this process has held. Linux hands ``ru_maxrss`` of a parent on to its children, VmHWM not."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main(text: str) -> int:
    job = json.loads(text)
    shapes = [Shape.parse(s) for s in job["shapes"]]

    def load() -> Run:
        return open_runner(job["model"], threads=job["threads"], backend=job.get("backend", "reference"))

    print(json.dumps(measure(load, shapes, vocab=job["vocab"], seconds=job["seconds"])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
