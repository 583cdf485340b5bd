"""Builds and loads the native kernels (backends/kernels): C++ without torch, compiled once for this CPU, then cached.

The file is loaded with ctypes after torch, so both use one OpenMP pool and ``torch.set_num_threads`` counts for both.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import make_folder, write_atomic

SOURCES = Path(__file__).parent / "kernels"
MAIN = "kernels.cpp"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("g++", "clang++", "c++")
NEEDED = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni")
CACHE = "KDLSQ_FX_CACHE"
VERSION = 1
SECONDS = 300


class Unavailable(Exception):
    """The kernels cannot run here; the text says why and what would help."""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, built if need be (some seconds, once a machine). Raises Unavailable."""
    _demand_cpu()
    compiler = _compiler()
    text = b"".join(path.name.encode() + path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file())
    key = hashlib.sha256(repr((VERSION, text, FLAGS, _version(compiler), _cpu())).encode()).hexdigest()[:24]
    folder = _folder()
    file = folder / f"native-{key}.so"
    if not file.exists():
        _build(compiler, file)
    try:
        found = ctypes.CDLL(str(file))
    except OSError as err:
        raise Unavailable(f"{file} cannot be loaded: {err}; delete it") from None
    for name in ("linear", "attention", "product", "norm", "softmax", "int_softmax", "sum", "int_norm"):
        getattr(found, f"kdlsq_{name}").restype = None
    return found


def available() -> str:
    """ "" where the kernels run, else why they do not."""
    try:
        library()
    except Unavailable as why:
        return str(why)
    return ""


def _demand_cpu() -> None:
    has = torch.cpu.get_capabilities()
    missing = [name for name in NEEDED if not has.get(name)]
    if missing:
        raise Unavailable(f"this CPU lacks {', '.join(missing)}")
    if platform.system() != "Linux":
        raise Unavailable(f"the kernels are built on Linux only, not on {platform.system()}")


def _compiler() -> str:
    wanted = os.environ.get("CXX", "")
    names = (wanted,) if wanted else COMPILERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise Unavailable(f"no C++ compiler was found ({', '.join(names)}); install g++, or set CXX")
    return found


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise Unavailable(f"{command[0]} failed: {err}") from None
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _cpu() -> str:
    """What ``-march=native`` may depend on."""
    return repr(sorted(torch.cpu.get_capabilities().items()))


def _folder() -> Path:
    """A folder of the user's own: code is loaded from it."""
    named = os.environ.get(CACHE)
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdlsq_fx"
    try:
        folder = make_folder(base)
    except (CheckpointError, RuntimeError) as err:
        raise Unavailable(f"the built kernels have no place: {err}; set {CACHE} to a folder of yours") from None
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise Unavailable(f"others may write to {folder}; set {CACHE} to a folder that only you can write to")
    return folder


def _build(compiler: str, file: Path) -> None:
    """Compile into a file of another name, then rename: two processes that build at once do no harm."""
    source = str(SOURCES / MAIN)

    def write(name: str) -> Any:
        _run([compiler, *FLAGS, source, "-o", name])

    try:
        write_atomic(file, write)
    except CheckpointError as err:
        raise Unavailable(str(err)) from None
