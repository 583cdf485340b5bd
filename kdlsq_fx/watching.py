"""What a person sees of a running training, and how they stop it: the progress bar, ``log.tsv``, Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from kdlsq_fx import processes
from kdlsq_fx.files import make_folder, write_text


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM after its state was saved; the text says where and how to go on."""


def progress(title: str, total: int, first: int) -> Any:
    """A progress bar of the first process; silent where stderr is no terminal."""
    quiet = not (processes.first() and sys.stderr.isatty())
    return tqdm(total=total, initial=first, desc=title, disable=quiet, unit="step", dynamic_ncols=True)


class Log:
    """``log.tsv``: step, loss, lr, seconds, and the parts of the loss as ``name=value``. Lines after the checkpoint
    that a run resumes from are dropped, so each step stands there once."""

    def __init__(self, path: Path, step: int) -> None:
        make_folder(path.parent)
        kept = path.read_text(encoding="utf-8").splitlines()[1 : step + 1] if step and path.exists() else []
        text = "\n".join(["step\tloss\tlr\tseconds\tparts", *kept]) + "\n"
        write_text(path, text)
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, loss: float, lr: float, seconds: float, parts: dict[str, float]) -> None:
        text = " ".join(f"{k}={v:.6g}" for k, v in parts.items())
        self.file.write(f"{step}\t{loss:.8g}\t{lr:.6g}\t{seconds:.2f}\t{text}\n")

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a wish that the loop grants between two steps; a second Ctrl-C stops at
    once. A launcher passes on the signal that its processes got already, so that several of them take any number as
    one. Outside the main thread Python allows no handlers, and nothing is changed."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and processes.size() == 1:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
