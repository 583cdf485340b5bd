"""Codes of few levels as dense bytes; ``run_int.unpack`` reads them again. docs/integer_format.md has the layout."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .run_int import MOST_LEVELS

Array = NDArray[Any]


def pack(codes: Array) -> tuple[Array, dict[str, Any]] | None:
    """int8 or uint8 codes of any shape -> their bytes (uint8 ``[n]``) and what it takes to read them.

    None where bytes of their own are as small: more than 7 bits, no codes at all, or another dtype. What counts are the
    levels that the codes span, not the width they were trained at: three levels take 1.6 bits, all others whole bits.
    """
    if (found := _range_of(codes)) is None:
        return None
    first, levels = found
    steps = codes.reshape(-1).view(np.uint8) - np.uint8(first % 256)
    data = _ternary(steps) if levels == 3 else _bits(steps, (levels - 1).bit_length())
    return data, {"dtype": str(codes.dtype), "shape": list(codes.shape), "first": first, "levels": levels}


def packed_bytes(codes: Array) -> int:
    """Bytes of ``codes`` in a file, packed where :func:`pack` packs them."""
    if (found := _range_of(codes)) is None:
        return codes.nbytes
    _, levels = found
    return -(-codes.size // 5) if levels == 3 else -(-codes.size * (levels - 1).bit_length() // 8)


def _range_of(codes: Array) -> tuple[int, int] | None:
    """The least code and the number of levels, of codes that are to be packed."""
    if codes.dtype not in (np.int8, np.uint8) or not codes.size:
        return None
    first = int(codes.min())
    levels = max(int(codes.max()) - first + 1, 2)
    fits = levels <= MOST_LEVELS and first + levels - 1 <= np.iinfo(codes.dtype).max
    return (first, levels) if fits else None


def _ternary(steps: Array) -> Array:
    """``[n]`` of 0, 1, 2 -> ``[ceil(n / 5)]``: five digits in base 3, the first one lowest."""
    digits = np.pad(steps, (0, -len(steps) % 5)).reshape(-1, 5)
    data = digits[:, 4].copy()
    for place in (3, 2, 1, 0):
        data *= np.uint8(3)
        data += digits[:, place]
    return data


def _bits(steps: Array, width: int) -> Array:
    """``[n]`` of ``width``-bit numbers -> ``[ceil(n * width / 8)]``: a stream that starts at the lowest bit."""
    groups = np.pad(steps, (0, -len(steps) % 8)).reshape(-1, 8)
    words = np.zeros(len(groups), "<u8")
    for place in range(8):
        words |= groups[:, place].astype("<u8") << np.uint64(width * place)
    data = words.view(np.uint8).reshape(-1, 8)[:, :width]
    return data.flatten()[: -(-len(steps) * width // 8)]  # a copy: of one column reshape gives a strided view
