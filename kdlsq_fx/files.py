"""Writing and reading checkpoint files: atomic writes, safetensors with an alias table, JSON with a format version."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .errors import CheckpointError, ConfigError
from .packing import pack
from .run_int import ProgramError, unpack

FORMAT = 1
INFO = "kdlsq.json"
SETTINGS = "settings.json"
RUN = "run.json"
WEIGHTS = "model.safetensors"
CONSTANTS = "constants.safetensors"  # of an int folder: by the name above transformers would load it as a float model
# how the names of a tokenizer's files begin
TOKENIZER_FILES = ("tokenizer", "vocab", "special_tokens", "added_tokens", "merges", "spm", "spiece", "sentencepiece")


def make_folder(path: str | Path) -> Path:
    """The folder, made if need be; CheckpointError where it cannot be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise CheckpointError(f"cannot write to {folder}: {err.strerror or err}", do="choose another folder") from None
    return folder


def check_folder(path: Path) -> None:
    """CheckpointError where :func:`make_folder` would give one; leaves nothing behind. To ask before long work."""
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as err:
        raise CheckpointError(f"cannot write to {path}: {err.strerror or err}", do="choose another folder") from None


def check_file(path: Path) -> None:
    """CheckpointError where :func:`write_atomic` would give one; leaves nothing behind. To ask before long work."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"cannot write {path}: it is no plain file", do="give the name of a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as err:
        do = f"choose another folder, or make {path.parent} first"
        raise CheckpointError(f"cannot write {path}: {err.strerror or err}", do=do) from None


def write_atomic(path: Path, write: Callable[[str], Any]) -> None:
    """``write(temporary name)``, then rename over ``path``: the old file stays whole until the new one is.

    CheckpointError where that cannot be done, or where something other than a file (a folder, a device) stands there.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"cannot write {path}: it is no plain file", do="give the name of a file")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as err:
        raise CheckpointError(f"cannot write {path}: {err.strerror or err}", do="choose another folder") from None
    try:
        write(name)
        _let_umask_decide(Path(name))
        os.replace(name, path)
    except (OSError, SafetensorError) as err:
        raise _unwritten(path, err) from err
    finally:
        if os.path.exists(name):
            os.unlink(name)


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """``write(temporary folder)``, then rename to ``folder``, which is there whole or not at all. What stood there
    before is replaced."""
    make_folder(folder.parent)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(made)
        for path in (made, *made.rglob("*")):
            _let_umask_decide(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
    except (OSError, SafetensorError) as err:
        raise _unwritten(folder, err) from err
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _let_umask_decide(path: Path) -> None:
    """Temporary files and folders are made for their owner alone; what is kept is readable as any other."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _unwritten(path: Path, err: Exception) -> CheckpointError:
    """safetensors has an error of its own for a disk that is full, among others."""
    what = f"cannot write {path}: {getattr(err, 'strerror', None) or err}"
    return CheckpointError(what, do="free space or choose a folder")


def write_text(path: Path, text: str) -> None:
    """A UTF-8 file, whole or not at all."""
    write_atomic(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def model_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder but the tokenizer's, which are the same for all models."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files if not p.name.startswith(TOKENIZER_FILES))


def checksum(path: Path) -> str:
    """SHA-256 of a file; CheckpointError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise CheckpointError(f"{path} cannot be read: {err.strerror or err}", do="copy it again") from None


def not_finite(names: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> str:
    """The first of these names whose tensor holds NaN or infinity; "" where none does."""
    return next((name for name in names if not bool(torch.isfinite(tensors[name]).all())), "")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path: Path, *, newest: int = FORMAT) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError when it is absent, broken, or of a later format version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", do="give a folder written by save_pretrained") from None
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} cannot be read: {err}", do="copy the folder again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no object", do="copy the folder again")
    version = data.get("format", 0)
    if not isinstance(version, int) or version > newest:
        raise CheckpointError(
            f"{path} has format {version}, this version of kdlsq_fx reads up to {newest}", do="upgrade kdlsq_fx"
        )
    return data


def stage_of(folder: Path) -> str:
    """``qat`` or ``int`` of a folder of ours, ``""`` of any other."""
    return str(read_json(folder / INFO).get("stage", "")) if (folder / INFO).is_file() else ""


def check_stage(folder: Path, stage: str) -> None:
    """CheckpointError where a model of another kind stands that one of this stage would overwrite: of another stage, or
    a float model."""
    found = stage_of(folder) or ("float" if _holds_floats(folder / WEIGHTS) else stage)
    if found != stage:
        what = f"{'an' if found == 'int' else 'a'} {found} model stands in {folder}"
        raise CheckpointError(what, do=f"name another folder for the {stage} model, or remove what is there")


def check_no_model(folder: Path) -> None:
    """CheckpointError for a folder that holds a model or a run: what is no part of either has no place in it."""
    found = next(
        (name for name in (INFO, "config.json", WEIGHTS, CONSTANTS, SETTINGS, RUN) if (folder / name).is_file()), ""
    )
    if found:
        kind = "run" if found in (SETTINGS, RUN) else "model"
        raise CheckpointError(f"a {kind} stands in {folder} ({found})", do="name another folder")


def _holds_floats(path: Path) -> bool:
    """True of a safetensors file that neither we wrote nor a trainer that saved one of our models."""
    names, layout = _header(path)
    return bool(names) and not layout and not any("_lsq." in name for name in names)


def _saved_by_a_trainer(path: Path) -> str:
    """What of ours a safetensors file holds the plain ``state_dict`` of: ``qat``, ``kd`` (a distiller), "" for none."""
    tops = {"gm.": "qat", "student.gm.": "kd"}
    return next((tops[top] for name in _header(path)[0] for top in tops if name.startswith(top)), "")


def _header(path: Path) -> tuple[list[str], bool]:
    """(names of the tensors, did we write it) of a safetensors file; ([], False) of any other."""
    try:
        with safe_open(path, "np") as file:
            return list(file.keys()), "layout" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return [], False


def read_info(folder: Path) -> dict[str, Any]:
    """``kdlsq.json`` of a folder; CheckpointError, with what to give instead, where the folder is none of ours."""
    if (folder / INFO).is_file():
        return read_json(folder / INFO)
    weights = folder / WEIGHTS
    inside = [p for p in (folder / "qat", folder / "int", *sorted(folder.glob("*/qat"))) if (p / INFO).is_file()]
    if not folder.exists():
        what, do = "does not exist", "give a folder written by save_pretrained"
    elif not folder.is_dir():
        what, do = "is a file, not a folder", "give a folder written by save_pretrained"
    elif inside:
        what, do = "is no qat or int folder itself", f"give {' or '.join(map(str, inside))}"
    elif kind := _saved_by_a_trainer(folder / WEIGHTS):
        what = f"was written by the Hugging Face Trainer: weights of a {kind}, without what the model is"
        do = f"build the same {kind} again, {kind}.load_state_dict(safetensors.torch.load_file('{folder / WEIGHTS}')), "
        do += f"{kind}.save_pretrained('{folder / 'qat'}'); callbacks=[kq.StudentCallback()] writes such folders"
    elif (folder / CONSTANTS).exists():
        what, do = f"has lost its {INFO}", "copy the folder again, all of it"
    elif (folder / "config.json").is_file() and (_holds_floats(weights) or not weights.exists()):
        what, do = "holds a model without quantizers", "quantize it first: prepare_qat, or `kdlsq-fx train --model`"
    else:
        what, do = f"is no qat or int folder: it has no {INFO}", "give a folder written by save_pretrained, all of it"
    raise CheckpointError(f"{folder} {what}", do=do)


def belongs_to(folder: Path, options: Mapping[str, Any], name: str = SETTINGS) -> None:
    """Write down the options that a folder's contents are made with, or hold them against those written down before.

    ConfigError where they differ: results of other options would be taken for those of these.
    """
    mine = json.loads(json.dumps(options))  # tuples become lists, as they do in the file
    path = folder / name
    theirs = read_json(path) if path.is_file() else mine
    if changed := differences(theirs, {**dict.fromkeys(theirs), **mine}):
        do = "give the same options, or another folder with --out"
        raise ConfigError(f"the folder holds a run with another {', '.join(changed)}", where=str(folder), do=do)
    write_json(path, mine)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of ``here`` with another value ``there``, those inside objects dotted; with both values where short."""
    found = []
    for key, value in here.items():
        old, name = there.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            found += differences(old, {**dict.fromkeys(old), **value}, f"{name}.")
        elif old != value:
            values = f"{old!r} there, {value!r} here"
            found.append(f"{name} ({values})" if len(values) <= 60 else name)
    return found


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, packed: bool = False) -> None:
    """safetensors, each storage once; names that share one are kept in the header's alias table.

    ``packed``: codes of 7 bits and less are stored as dense bytes (docs/integer_format.md).
    """
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    rows: dict[str, Any] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if value.numel() else (name,)
        if key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        kept[name] = value.contiguous().clone() if not value.is_contiguous() else value
        if packed and (dense := pack(kept[name].cpu().numpy())) is not None:
            kept[name], rows[name] = torch.from_numpy(dense[0]), dense[1]
    layout = json.dumps({"aliases": aliases, "packed": rows})  # one entry: safetensors writes several in any order
    write_atomic(path, lambda tmp: save_file(kept, tmp, metadata={"layout": layout}))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, unpacked, aliases resolved; CheckpointError when it is absent, truncated or damaged."""
    from safetensors import safe_open

    if not path.exists():
        raise CheckpointError(f"{path} does not exist", do="give a folder written by save_pretrained")
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            layout = json.loads((file.metadata() or {}).get("layout", "{}"))
        for name, row in layout.get("packed", {}).items():
            tensors[name] = torch.from_numpy(unpack(tensors[name].numpy(), name, **row))
        for name, source in layout.get("aliases", {}).items():
            tensors[name] = tensors[source]
    except (SafetensorError, ProgramError, OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        what = repr(err) if isinstance(err, (KeyError, TypeError, AttributeError)) else str(err)
        do = "copy the file again; it is truncated or no safetensors of ours"
        raise CheckpointError(f"{path} is damaged: {what}", do=do) from None
    return tensors
