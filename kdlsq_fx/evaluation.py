"""Run anything that maps token ids to logits over a whole split: torch modules, integer models, ONNX files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kdlsq_fx.data import Encoded, Task
from kdlsq_fx.errors import CheckpointError, InputError
from kdlsq_fx.metrics import check_width

OTHER_MODEL = "evaluate a model on the task it was trained for"
SPAN = ("start_logits", "end_logits")
TYPES = "token_type_ids"


def evaluate(
    model: Any, data: Encoded, *, batch_size: int = 64, title: str = "eval", task: Task | None = None
) -> np.ndarray:
    """Logits of every row, in the file's order: float32 [rows, outputs].

    ``model``: a torch module (run in eval mode without gradients, its mode restored), the path of an ONNX file, or
    any callable that takes the batch as keywords and returns logits or an output with ``.logits``. With ``task`` the
    first batch shows a model of another task: InputError.
    """
    out: np.ndarray | None = None
    for rows, logits in outputs(model, data, batch_size=batch_size, title=title):
        if logits.ndim != 2:
            raise InputError(f"the model's output has shape {list(logits.shape)}, not one row a text", do=OTHER_MODEL)
        if out is None:
            if task is not None:
                check_width(task, logits)
            out = np.zeros((len(data), logits.shape[-1]), dtype=np.float32)
        out[rows] = logits
    if out is None:
        raise InputError("no rows to evaluate", do="give a split with at least one row")
    return out


def evaluate_tokens(model: Any, data: Encoded, *, batch_size: int = 64, title: str = "eval") -> np.ndarray:
    """Logits of every token of every row, without padding: float32 [tokens, outputs], ragged as ``data`` is.

    ``model``: as :func:`evaluate` takes it. A model that marks spans gives two a token, start and end. InputError for
    one whose logits are not one row a token.
    """
    out: np.ndarray | None = None
    for rows, logits in outputs(model, data, batch_size=batch_size, title=title):
        if logits.ndim != 3:
            raise InputError(f"the model's output has shape {list(logits.shape)}, not one row a token", do=OTHER_MODEL)
        if out is None:
            out = np.zeros((data.starts[-1], logits.shape[-1]), dtype=np.float32)
        for row, own in zip(rows, logits):
            out[data.starts[row] : data.starts[row + 1]] = own[: data.lengths[row]]
    if out is None:
        raise InputError("no rows to evaluate", do="give a split with at least one row")
    return out


def outputs(model: Any, data: Encoded, *, batch_size: int, title: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers and logits of every batch, sorted by length, under a progress bar."""
    run, quiet = runner(model), not sys.stderr.isatty()
    with tqdm(total=len(data), desc=title, disable=quiet, unit="row", dynamic_ncols=True) as bar:
        for rows in data.sorted_batches(batch_size):
            yield rows, run(data.batch(rows, labels=False))
            bar.update(len(rows))


Run = Callable[[dict[str, torch.Tensor]], np.ndarray]


def runner(model: Any) -> Run:
    """One function from a batch to its logits: float32 [rows, outputs]; of a model that marks spans [rows, length, 2],
    its start and end logits side by side."""
    if isinstance(model, str | Path):
        return onnx_runner(Path(model))
    if isinstance(model, torch.nn.Module):
        return lambda batch: _module(model, batch)
    if callable(model):
        return lambda batch: _logits(model(**batch))
    raise InputError(
        f"a {type(model).__name__} cannot be run", do="give a torch module, an integer model or a .onnx file"
    )


def _module(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> np.ndarray:
    was, tensor = model.training, next(iter([*model.parameters(), *model.buffers()]), None)
    device = "cpu" if tensor is None else tensor.device
    model.eval()
    try:
        with torch.no_grad():
            return _logits(model(**{k: v.to(device) for k, v in batch.items()}))
    finally:
        model.train(was)


def _logits(output: Any) -> np.ndarray:
    fields = output if isinstance(output, dict) else {}
    if all(name in fields for name in SPAN):
        return np.stack([_array(fields[name]) for name in SPAN], axis=-1)
    value = getattr(output, "logits", output)
    if isinstance(value, tuple | list):
        value = value[0]
    if isinstance(value, dict):
        value = value.get("logits", next(iter(value.values())))
    return _array(value)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, dtype=np.float32)


def onnx_runner(path: Path, *, threads: int = 0) -> Run:
    """ONNX Runtime on the CPU; arrays are passed by the file's input names, token types that a batch lacks as zeros.
    ``threads`` 0: as many as torch uses."""
    import onnxruntime as ort

    if not path.is_file():
        raise CheckpointError("no such ONNX file", where=str(path), do="write it with `kdlsq-fx export`")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime raises its own kinds
        raise CheckpointError(f"ONNX Runtime cannot load it ({e})", where=str(path), do="export it again") from e
    names = [i.name for i in session.get_inputs()]
    given = [o.name for o in session.get_outputs()]
    wanted = list(SPAN) if set(SPAN) <= set(given) else given[:1]

    def run(batch: dict[str, torch.Tensor]) -> np.ndarray:
        if TYPES in names and TYPES not in batch and "input_ids" in batch:
            batch = {**batch, TYPES: torch.zeros_like(batch["input_ids"])}
        missing = [n for n in names if n not in batch]
        if missing:
            raise InputError(
                f"the ONNX file wants {', '.join(missing)}", where=str(path), do="tokenize with its tokenizer"
            )
        try:
            found = session.run(wanted, {n: batch[n].numpy() for n in names})
        except Exception as e:  # onnxruntime raises its own kinds
            do = "tokenize with the model's tokenizer, no longer than its positions (--max-length)"
            raise InputError(f"ONNX Runtime refuses a batch ({str(e).splitlines()[0]})", where=str(path), do=do) from e
        return _logits(dict(zip(wanted, found)))

    return run
