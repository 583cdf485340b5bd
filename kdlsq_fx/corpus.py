"""English text that every machine with Python has: the docstring paragraphs of the standard library.

Python versions differ in a few hundred paragraphs, so a run records what it read (count, bytes, SHA-256) instead of
expecting one fixed text.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kdlsq_fx.errors import InputError

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
SHORTEST, LONGEST = 30, 1000  # characters; shorter ones are labels, longer ones are option lists and grammars
WORDS = 5
LETTERS = 0.7  # least share of letters and blanks: below it a paragraph is code or a table
HELD_OUT = 8  # one paragraph in so many, chosen by its own hash, so a new paragraph moves no other one
FEWEST = 500


@dataclass(frozen=True)
class Corpus:
    """Paragraphs without repeats, in the order of files and lines. ``train`` and ``held_out`` share none."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    sha256: str
    files: int

    def describe(self) -> dict[str, Any]:
        """Counts and hash, as JSON values: what identifies the text a run has seen."""
        texts = (*self.train, *self.held_out)
        return {
            "paragraphs": len(texts),
            "bytes": sum(len(t.encode()) for t in texts),
            "train": len(self.train),
            "held_out": len(self.held_out),
            "sha256": self.sha256,
            "files": self.files,
            "python": ".".join(map(str, sys.version_info[:3])),
        }


def load_corpus(root: str | Path | None = None, *, fewest: int = FEWEST) -> Corpus:
    """All docstring paragraphs of the ``.py`` files under ``root`` (default: the running Python's standard library,
    without its tests). InputError when there are fewer than ``fewest`` paragraphs."""
    folder = Path(root) if root is not None else Path(sysconfig.get_path("stdlib"))
    files = sources(folder)
    texts: dict[str, None] = {}
    for path in tqdm(files, desc="read docstrings", disable=not sys.stderr.isatty(), unit="file", dynamic_ncols=True):
        texts.update(dict.fromkeys(paragraphs(path)))
    if len(texts) < fewest:
        raise InputError(
            f"only {len(texts)} docstring paragraphs in {len(files)} files",
            where=str(folder),
            do="use a Python whose standard library is installed as .py files (not zipped or stripped)",
        )
    held = tuple(t for t in texts if is_held_out(t))
    train = tuple(t for t in texts if not is_held_out(t))
    digest = hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()
    return Corpus(train, held, digest, len(files))


def sources(folder: Path) -> list[Path]:
    """The Python files below a folder, sorted, without tests and installed packages."""
    return [p for p in sorted(folder.rglob("*.py")) if not SKIPPED.intersection(p.relative_to(folder).parts)]


def paragraphs(path: Path) -> Iterator[str]:
    """English paragraphs of a file's docstrings, blanks collapsed; nothing for a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files are not ours to report
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                text = " ".join(block.split())
                if is_prose(text):
                    yield text


def is_prose(text: str) -> bool:
    """Whether a paragraph is a sentence or more of English, as opposed to an example, a signature or a table."""
    if not SHORTEST <= len(text) <= LONGEST or ">>>" in text or not text.isprintable():
        return False
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters >= LETTERS * len(text) and len(re.findall(r"[A-Za-z]{2,}", text)) >= WORDS


def is_held_out(text: str) -> bool:
    """One in ``HELD_OUT``, by the SHA-256 of the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT == 0
