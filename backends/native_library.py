"""Loads the native kernels (backends/kernels), built for this CPU where they are not yet."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from ..compiled import Unavailable, compiled

SOURCES = Path(__file__).parent / "kernels"
MAIN = SOURCES / "kernels.cpp"
NEEDED = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni")


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels; some seconds where they must be built, once a machine. Raises Unavailable."""
    has = torch.cpu.get_capabilities()
    missing = [name for name in NEEDED if not has.get(name)]
    if missing:
        raise Unavailable(f"this CPU lacks {', '.join(missing)}")
    path = compiled("native", [MAIN, *sorted(SOURCES.glob("*.h"))])
    try:
        return ctypes.CDLL(str(path))
    except OSError as err:
        raise Unavailable(f"{path} cannot be loaded ({err}): delete it") from None


@functools.cache
def available() -> str:
    """Nothing where the kernels run, else why they do not."""
    try:
        library()
    except Unavailable as why:
        return str(why)
    return ""
