"""What the commands of the command line share: options, progress, and finding what belongs to a model.

Loads neither torch nor transformers: ``--help`` has to be quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdlsq_fx.errors import CheckpointError, ConfigError

DATA_HELP = (
    "folder in GLUE's layout (train.tsv, dev.tsv; columns sentence[, sentence2], label|score), or a datasets name"
)


def command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.set_defaults(run=run)
    return made


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of ``least`` or more, for argparse."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    number.__name__ = "whole number"  # argparse shows it: "invalid whole number value"
    return number


def add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="cpu", help="cpu, cuda or auto: where float and qat models run")


def device_of(name: str) -> str:
    """``auto`` is cuda where there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        what = str(e).splitlines()[0]
        raise ConfigError(f"cannot be used ({what})", where=f"--device {name}", do="use auto or cpu") from e
    return name


def find_tokenizer(model: Path) -> Path:
    """The folder of the model's tokenizer: its own, or one beside it as `train` lays them out."""
    if not model.exists():
        raise CheckpointError("no such folder or file", where=str(model), do="give what `kdlsq-fx train` wrote")
    home = model if model.is_dir() else model.parent
    for folder in (home, home / "qat", home.parent / "qat", home.parent / "fp32", home.parent.parent / "fp32"):
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file():
            return folder
    raise CheckpointError("no tokenizer near the model", where=str(model), do="name its folder with --tokenizer")


def say(text: str) -> None:
    """Progress for people goes to stderr, from the first of several processes; results go to stdout."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
