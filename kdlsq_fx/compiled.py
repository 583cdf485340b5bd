"""C++ sources as a library of this machine: built once with its own compiler, kept in the user's cache.

The libraries use OpenMP. torch is loaded before them, so both share one pool of threads.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import CheckpointError
from .files import make_folder, write_atomic

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off")
COMPILERS = ("g++", "clang++", "c++")
CACHE = "KDLSQ_CACHE"
SECONDS = 300


class Unavailable(Exception):
    """Kernels that cannot be had here; the text says why."""


def compiled(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """The library of ``sources``: the first is compiled, the others are what it includes. Built where it is not yet.

    It lies in ``$KDLSQ_CACHE`` (default ``~/.cache/kdlsq_fx``) under a name that hangs on the sources, the flags, the
    compiler and the processor. Unavailable where there is no compiler, it fails, or others may write to the cache.
    """
    cxx = compiler()
    command = [cxx, *FLAGS, *flags]
    texts = [f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sources]
    said = _run([cxx, "--version"])
    key = hashlib.sha256("\0".join([*texts, *command, said, _processor(), platform.machine()]).encode()).hexdigest()
    path = _cache() / f"{name}_{key[:20]}.so"
    if path.exists():
        return path
    try:
        write_atomic(path, lambda made: _run([*command, str(sources[0]), "-o", made]))
    except CheckpointError as err:
        raise Unavailable(str(err)) from None
    return path


def compiler() -> str:
    """The C++ compiler: ``$CXX``, or the first of the usual ones. Unavailable where there is none."""
    named = os.environ.get("CXX", "")
    found = shutil.which(named) if named else next((p for c in COMPILERS if (p := shutil.which(c))), None)
    if not found:
        raise Unavailable(f"no C++ compiler ({named or ', '.join(COMPILERS)}) is on the PATH")
    return found


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise Unavailable(f"{command[0]} failed: {err}") from None
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip()[-400:]}")
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: a library built on one processor must not be loaded on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor()


def _cache() -> Path:
    """A folder that only the user writes to: code is loaded from it."""
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdlsq_fx"
        named = Path(os.environ.get(CACHE) or default)
        named.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = make_folder(named)
    except (OSError, CheckpointError, RuntimeError) as err:
        raise Unavailable(f"the cache cannot be written: {err}") from None
    status = folder.stat()
    if status.st_mode & 0o022 or status.st_uid != os.getuid():
        raise Unavailable(f"others may write to {folder}: set {CACHE} to a folder of your own")
    return folder
