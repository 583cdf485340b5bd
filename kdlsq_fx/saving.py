"""A qat model as a folder and back: weights and scales, qconfig, the model's config, versions, graph hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import CheckpointError, ConfigError
from .files import (
    FORMAT,
    INFO,
    WEIGHTS,
    check_stage,
    checksum,
    make_folder,
    not_finite,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from .graph import text
from .qconfig import QConfig

if TYPE_CHECKING:
    from .model import QuantModel

EXAMPLE = "example.safetensors"


def graph_hash(gm: torch.fx.GraphModule) -> str:
    """sha256 of the graph's text: equal hashes mean the same nodes, sites and arguments."""
    return hashlib.sha256(text(gm).encode()).hexdigest()


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "kdlsq-fx")}


def save_qat(qat: QuantModel, path: str | Path, tokenizer: Any = None) -> Path:
    """Write a qat folder: ``kdlsq.json`` (last), ``model.safetensors``, ``config.json``, tokenizer files.

    ConfigError for a model of another stage: a qdq model is made from a saved qat one in a moment. CheckpointError for
    a parameter that is NaN or infinite; what stood in the folder is left alone.
    """
    if qat.stage != "qat":
        do = "save the qat model, or what convert() gives"
        raise ConfigError(f"a {qat.stage} model cannot be saved: only qat and int folders can be loaded", do=do)
    own = dict(qat.gm.named_parameters())
    broken = not_finite(own, own)
    if broken:
        do = "go back to a checkpoint from before the training diverged"
        raise CheckpointError(f"nothing is saved in {path}: a parameter is NaN or infinite", where=broken, do=do)
    check_stage(Path(path), "qat")
    folder = make_folder(path)
    write_tensors(folder / WEIGHTS, qat.gm.state_dict())
    example = {k: v for k, v in qat.example.items() if isinstance(v, torch.Tensor)}
    if example:
        write_tensors(folder / EXAMPLE, example)
    if qat.config is not None and hasattr(qat.config, "save_pretrained"):
        qat.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    info = {
        "format": FORMAT,
        "stage": qat.stage,
        "model_class": qat.model_class,
        "inputs": list(qat.input_names),
        "versions": versions(),
        "graph": graph_hash(qat.gm),
        "weights": checksum(folder / WEIGHTS),
        "qconfig": qat.qconfig.to_dict(),
        "passes": qat.gm.meta.get("user_passes", []),
    }
    write_json(folder / INFO, info)
    return folder


def load_qat(folder: Path, prepare: Callable[..., QuantModel], model: nn.Module | None, passes: Any) -> QuantModel:
    """Rebuild the qat model of a folder: the same capture and passes, then the saved weights and scales.

    ``model`` serves what is not Hugging Face's (its weights do not matter). Raises CheckpointError when other passes
    are handed in than it was prepared with, when the graph that comes out is not the one that was saved, or the weights
    do not fit it.
    """
    info = _read_info(folder)
    _check_passes(folder, info.get("passes", []), [getattr(p, "__name__", str(p)) for p in passes])
    tensors = read_tensors(folder / WEIGHTS)
    saved = read_tensors(folder / EXAMPLE) if (folder / EXAMPLE).exists() else {}
    example = {k: saved[k] for k in info["inputs"] if k in saved} or None  # the order of the graph's inputs
    source = model if model is not None else _fresh_model(folder, info["model_class"])
    qat = prepare(source, QConfig.from_dict(info["qconfig"]), example=example, passes=passes)
    if graph_hash(qat.gm) != info["graph"]:
        made = ", ".join(f"{k} {v}" for k, v in info["versions"].items())
        raise CheckpointError(
            f"the graph captured here is not the one in {folder} (written with {made})",
            do="install those versions, or pass the same model= and passes= as when it was saved",
        )
    own = qat.gm.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit the graph", where=wrong[0], do="copy the folder again")
    broken = not_finite([name for name, _ in qat.gm.named_parameters()], tensors)
    if broken:
        do = "go back to a checkpoint from before the training diverged"
        raise CheckpointError(f"{folder / WEIGHTS} holds NaN or infinity", where=broken, do=do)
    if checksum(folder / WEIGHTS) != info["weights"]:
        do = "save the model again, or copy the whole folder"
        raise CheckpointError(f"{folder / WEIGHTS} is not the file that {INFO} was written for", do=do)
    try:
        qat.gm.load_state_dict(tensors)
    except RuntimeError as error:
        where, do = str(error).splitlines()[-1].strip(), "make the folder anew with this version of kdlsq_fx"
        raise CheckpointError(f"{folder / WEIGHTS} does not fit the graph", where=where, do=do) from error
    return qat.eval()


def _check_passes(folder: Path, saved: list[str], given: list[str]) -> None:
    """A folder names the passes of its author and does not hold them: they are code, and code is handed in."""
    if sorted(saved) == sorted(given):
        return
    got = f"{', '.join(given)} came with it" if given else "none came with it"
    what = f"{folder} was prepared with {', '.join(saved) or 'no passes of its author'}, and {got}"
    do = f"in Python: kq.from_pretrained({str(folder)!r}, passes=[{', '.join(saved)}]) with the same functions"
    if saved:
        do += "; the command line takes no passes: convert or export the model there, and go on with what that wrote"
    raise CheckpointError(what, do=do)


_INFO_TYPES = {
    "stage": str, "model_class": str, "inputs": list, "versions": dict, "graph": str, "weights": str,
    "qconfig": dict,
}  # fmt: skip


def _read_info(folder: Path) -> dict[str, Any]:
    """``kdlsq.json`` of a qat folder with every entry of the right type."""
    info = read_json(folder / INFO)
    wrong = [key for key, kind in _INFO_TYPES.items() if not isinstance(info.get(key), kind)]
    if wrong or info["stage"] != "qat":
        what = f"{folder / INFO} is damaged: {wrong[0] if wrong else 'stage'} is {info.get((wrong or ['stage'])[0])!r}"
        raise CheckpointError(what, do="copy the folder again")
    return info


def _fresh_model(folder: Path, model_class: str) -> nn.Module:
    import transformers

    cls = getattr(transformers, model_class, None)
    if cls is not None and not (folder / "config.json").exists():
        do = "copy the whole folder again; for a module of your own, from_pretrained(path, model=...)"
        raise CheckpointError(f"{folder} has no config.json", do=do)
    if cls is None:
        raise CheckpointError(
            f"{folder} holds a {model_class or 'model'} that is not Hugging Face's",
            do="pass the module: from_pretrained(path, model=...)",
        )
    try:
        return cls(transformers.AutoConfig.from_pretrained(folder))
    except (OSError, ValueError) as err:
        what = f"{folder / 'config.json'} cannot be read: {str(err).splitlines()[0]}"
        raise CheckpointError(what, do="copy the folder again") from None
