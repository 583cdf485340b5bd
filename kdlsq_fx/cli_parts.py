"""What the commands of the command line share: options, progress, and finding what belongs to a model.

Loads neither torch nor transformers: ``--help`` has to be quick.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdlsq_fx.errors import CheckpointError, ConfigError

DATA_HELP = (
    "folder in GLUE's layout (train.tsv, dev.tsv; columns sentence[, sentence2], label|score), or a datasets name"
)

# those of backends/onnx_dialects.py, which takes long to import
TARGETS = ("ort-cpu", "openvino", "tensorrt", "spec", "integer")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown, where there are some."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


def command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, formatter_class=Help)
    made.set_defaults(run=run)
    return made


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
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


def add_fp32(p: argparse.ArgumentParser) -> None:
    """Options of the fine-tuning that comes before a student."""
    text = "epochs of the fp32 fine-tuning (default: 3, or 0 where the model has the task's head already)"
    p.add_argument("--fp32-epochs", type=not_negative, help=text)
    p.add_argument("--fp32-lr", type=positive, default=5e-5, help="learning rate of the fp32 fine-tuning")


def fp32_epochs(args: argparse.Namespace, source: str, task: Any) -> float:
    """The epochs that were asked for; without a word a model with the task's head stays as it is, which is said."""
    from kdlsq_fx.opening import fits_task

    ready = fits_task(source, task)
    if args.fp32_epochs is None and ready:
        say(f"{source} has the head of {task.name}: taken as it is (--fp32-epochs N fine-tunes it first)")
        return 0.0
    if args.fp32_epochs == 0 and not ready:
        do = "leave it away, or give a model that was fine-tuned"
        raise ConfigError(f"{source} has no head of {task.name} yet", where="--fp32-epochs 0", do=do)
    return 3.0 if args.fp32_epochs is None else float(args.fp32_epochs)


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Ctrl-C or SIGTERM in a job whose steps are kept in ``out`` says that it goes on from there."""
    main = threading.current_thread() is threading.main_thread()  # outside it Python allows no handlers
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except KeyboardInterrupt as e:  # train.Interrupted says itself what was saved
        what = str(e) or f"stopped; what is done is kept in {out}, run the same command again to go on"
        raise KeyboardInterrupt(what) from None
    finally:
        if before is not None:  # None: a handler that Python did not set
            signal.signal(signal.SIGTERM, before)


def find_tokenizer(model: Path) -> Path:
    """Where the tokenizer is: in the model's folder, in one beside it as `train` lays them out, or under a hub name."""
    if not model.exists() and model.suffix == ".onnx":
        raise CheckpointError("no such file", where=str(model), do="give what `kdlsq-fx train` wrote")
    if not model.exists():
        return model
    home = model if model.is_dir() else model.parent
    for folder in (home, home / "qat", home.parent / "qat", home.parent / "fp32", home.parent.parent / "fp32"):
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file():
            return folder
    raise CheckpointError("no tokenizer near the model", where=str(model), do="name its folder with --tokenizer")


def say(text: str) -> None:
    """Progress for people goes to stderr, from the first of several processes; results go to stdout."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
