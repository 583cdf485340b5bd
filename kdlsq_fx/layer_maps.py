"""Which layer of a teacher a layer of the student learns from.

Layer 0 is what enters the first block, layer ``l`` what leaves the ``l``-th (Hugging Face's ``hidden_states[l]``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .errors import ConfigError

LayerMap = str | Mapping[int, int]
NAMES = "'uniform', 'top', 'skip', 'hsk:L' (L: the highest layer of the teacher to learn from)"


def layer_pairs(layer_map: LayerMap, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) for each layer of the student that learns, lowest first.

    ``student, teacher`` are the numbers of blocks. With l = 0..student:

    * ``"uniform"``: round(l * teacher / student), half to even; first learns from first, last from last;
    * ``"hsk:L"``: g(l, L) = round(l * L / student), half to even (Liu et al. 2021 and its release, t_top12, 10 and 8);
    * ``"skip"``: l * (teacher // student), every k-th layer from below (the "skip" of Sun et al. 2019, PKD);
    * ``"top"``: l + teacher - student, the top layers (the "last" of PKD); layer 0 learns from layer 0;
    * a dict {student layer: teacher layer}: that one, and only the layers it names.

    ConfigError for a map that names a layer one of the sides does not have.
    """
    pairs = _named(layer_map, student, teacher) if isinstance(layer_map, str) else _given(layer_map)
    for side, count, layers in (
        ("student", student, [a for a, _ in pairs]),
        ("teacher", teacher, [b for _, b in pairs]),
    ):
        wrong = [n for n in layers if not 0 <= n <= count]
        if wrong:
            what = f"layer map {layer_map!r} names layer {wrong[-1]} of the {side}, which has layers 0 to {count}"
            raise ConfigError(what, do=f"use {NAMES}")
    return pairs


def check_name(name: str) -> None:
    """ConfigError where no layer map is called so."""
    if name not in ("uniform", "top", "skip") and not re.fullmatch(r"hsk:\d+", name):
        raise ConfigError(f"there is no layer map {name!r}", do=f"use {NAMES}")


def _named(name: str, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    check_name(name)
    layers = range(student + 1)
    if name.startswith("hsk:"):
        return tuple((n, round(n * int(name[4:]) / student)) for n in layers)
    if name == "uniform":
        return tuple((n, round(n * teacher / student)) for n in layers)
    if teacher < student:
        what = f"the layer map {name!r} needs a teacher at least as deep: {student} layers cannot learn from {teacher}"
        raise ConfigError(what, do="use 'uniform'")
    if name == "skip":
        return tuple((n, n * (teacher // student)) for n in layers)
    return tuple((n, n + teacher - student if n else 0) for n in layers)


def _given(pairs: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
    if not isinstance(pairs, Mapping) or not pairs:
        raise ConfigError(f"{pairs!r} is no layer map", do=f"use {NAMES}, or a dict")
    wrong = [v for pair in pairs.items() for v in pair if type(v) is not int]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} in the layer map is no layer", do="use whole numbers: {1: 2, 2: 4}")
    return tuple(sorted(pairs.items()))
