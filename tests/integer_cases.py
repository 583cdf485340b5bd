"""Random operands of every integer primitive, with what is known of them: intervals, or the values of constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdlsq_fx.ops.int_gelu import gelu_constants
from kdlsq_fx.ops.int_mean import mean_constants
from kdlsq_fx.ops.int_norm import norm_constants
from kdlsq_fx.ops.int_softmax import exp_table, prob_divider, score_grid
from kdlsq_fx.range_analysis import of_constant
from kdlsq_fx.ranges import Interval, dot_bound, magnitude

Rng = np.random.Generator
GRID = (0, -128, 127)


@dataclass(frozen=True)
class Operand:
    """A tensor of a case: what is known of it, and integers that it holds."""

    known: Interval
    held: Any


def constant(values: Any) -> Operand:
    return Operand(of_constant(torch.as_tensor(values)), np.asarray(values))  # type: ignore[arg-type]


def drawn(rng: Rng, low: int, high: int, *shape: int) -> Operand:
    """Half of the integers are at an end of the interval."""
    held = rng.integers(low, high, shape, endpoint=True)
    held = np.where(rng.random(shape) < 0.5, np.where(rng.random(shape) < 0.5, low, high), held)
    return Operand(Interval(low, high, shape), held)


def ends(rng: Rng, bits: int) -> tuple[int, int]:
    low, high = sorted(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 2).tolist())
    return low, high


def every(args: Any, pick: Callable[[Operand], Any]) -> Any:
    if isinstance(args, list):
        return [every(a, pick) for a in args]
    return pick(args) if isinstance(args, Operand) else args


def linear_case(rng: Rng) -> list[Any]:
    low, high = ends(rng, int(rng.integers(2, 23)))
    w, bias = constant(rng.integers(-128, 128, (5, 7))), constant(rng.integers(-(2**28), 2**28, 5))
    zero = int(rng.integers(low, high + 1))
    b = bias if rng.random() < 0.7 else None
    bound = dot_bound(w.held, magnitude(low, high, zero), None if b is None else b.held)
    return [drawn(rng, low, high, 4, 7), w, b, zero, bound]


def conv_case(rng: Rng) -> list[Any]:
    low, high = ends(rng, 9)
    w, bias = constant(rng.integers(-128, 128, (4, 3, 3))), constant(rng.integers(-(2**20), 2**20, 4))
    stride, side, dilation = (int(rng.integers(1, 3)), int(rng.integers(0, 3)), int(rng.integers(1, 3)))
    bound = dot_bound(w.held, magnitude(low, high, 3), bias.held)
    return [drawn(rng, low, high, 2, 6, 9), w, bias, [stride], [side], [dilation], 2, 3, bound]


def matmul_case(rng: Rng) -> list[Any]:
    (a, b), (za, zb) = (ends(rng, 9), ends(rng, 9)), rng.integers(-9, 9, 2).tolist()
    return [drawn(rng, *a, 2, 3, 6), drawn(rng, *b, 2, 6, 4), za, zb, magnitude(*a, za) or 1, magnitude(*b, zb) or 1]


def mul_case(rng: Rng) -> list[Any]:
    (a, b), (za, zb) = (ends(rng, 16), ends(rng, 16)), rng.integers(-9, 9, 2).tolist()
    return [drawn(rng, *a, 2, 3, 6), drawn(rng, *b, 3, 1), za, zb]


def embedding_case(rng: Rng) -> list[Any]:
    return [constant(rng.integers(-99, 50, (11, 4))), drawn(rng, 0, 10, 2, 5)]


def lookup_case(rng: Rng) -> list[Any]:
    first, (low, high) = -128, ends(rng, 8)
    return [drawn(rng, low, high, 30), constant(rng.integers(-128, 128, 256)), first]


def requantize_case(rng: Rng) -> list[Any]:
    factors, shifts = rng.integers(0, 2**31, 6), rng.integers(1, 63, 6)
    acc = drawn(rng, *ends(rng, 32), 4, 6)
    if rng.random() < 0.5:
        return [acc, constant(factors), constant(shifts), *GRID]
    return [acc, int(factors[0]), int(shifts[0]), *GRID]


def add_case(rng: Rng) -> list[Any]:
    terms = [drawn(rng, *ends(rng, int(rng.integers(2, 33))), 2, 3, 6) for _ in range(3)]
    rows = drawn(rng, 0, 2**20, 2, 3, 1)
    factors = [int(rng.integers(0, 2**28)), constant(rng.integers(0, 2**28, 6)), rows]
    return [terms, factors, rng.integers(-9, 9, 3).tolist(), int(rng.integers(1, 62)), 5, -(2**21), 2**21 - 1]


def softmax_case(rng: Rng) -> list[Any]:
    table = constant(exp_table()) if rng.random() < 0.5 else None
    keep = drawn(rng, 0, 1, 2, 1, 9)
    keep = Operand(keep.known, keep.held.astype(bool))
    grid = score_grid(float(2.0 ** rng.integers(-40, 5)), table=table is not None)
    divider = prob_divider(float(2.0 ** -rng.uniform(1, 16)))
    return [drawn(rng, *ends(rng, 32), 2, 3, 9), keep if rng.random() < 0.7 else None, table, *grid, divider, 3, 0, 255]


def norm_case(rng: Rng) -> list[Any]:
    n, (low, high) = int(rng.integers(1, 20)), ends(rng, int(rng.integers(2, 23)))
    gamma, beta = rng.normal(0, 3, n), rng.normal(0, 3, n)
    c = norm_constants(gamma, beta, n, 1e-4, float(2.0 ** -rng.integers(1, 15)), 1e-12, low, high)
    return [drawn(rng, low, high, 5, n), constant(c.gain), constant(c.offset), c.fraction, c.eps, c.shift, *GRID]


def gelu_case(rng: Rng) -> list[Any]:
    ints = gelu_constants(float(2.0 ** rng.integers(-20, 1)), float(2.0 ** rng.integers(-8, 1)))
    return [drawn(rng, *ends(rng, 22), 200), int(rng.integers(-9, 9)), *ints, *GRID]


def mean_case(rng: Rng) -> list[Any]:
    (low, high), zero = ends(rng, 22), int(rng.integers(-9, 9))
    ints = mean_constants(1.0, float(2.0 ** rng.integers(-6, 6)), 7, magnitude(low, high, zero))
    keep = drawn(rng, 0, 1, 3, 7)
    return [drawn(rng, low, high, 3, 7, 4), Operand(keep.known, keep.held.astype(bool)), zero, *ints, *GRID]


CASES: dict[str, Callable[[Rng], list[Any]]] = {
    "int_linear": linear_case,
    "int_conv1d": conv_case,
    "int_matmul": matmul_case,
    "int_mul": mul_case,
    "int_embedding": embedding_case,
    "lookup": lookup_case,
    "requantize": requantize_case,
    "int_add": add_case,
    "int_softmax": softmax_case,
    "int_layer_norm": norm_case,
    "int_gelu": gelu_case,
    "int_mean": mean_case,
}
