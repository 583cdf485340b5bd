"""Error of every integer approximation against float64; writes docs/integer_errors.md and docs/integer_errors.png.

    python benchmarks/integer_errors.py            ten seconds

Integers and float64 only, seeds fixed: the figures do not depend on the machine. Curves are sampled densely or
enumerated, random rows are seeded, and the worst row of softmax is searched for; each section says which.
"""

from __future__ import annotations

import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf
from torch.nn import functional as F

from kdlsq_fx.ops.int_gelu import gelu_constants, numpy_int_gelu
from kdlsq_fx.ops.int_norm import norm_constants, numpy_bits, numpy_int_layer_norm
from kdlsq_fx.ops.int_softmax import exp_table, numpy_i_exp, numpy_int_softmax, prob_divider, score_grid
from kdlsq_fx.ops.qdq import dequantize, quantize

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

DOCS = Path(__file__).resolve().parents[1] / "docs"
Array = NDArray[Any]
FORMS = ("table", "polynomial")
FINE = 2**22  # codes of a result whose last rounding does not show


def paragraph(text: str) -> list[str]:
    return ["", *textwrap.wrap(text, 118)]


def gelu(x: Array) -> Array:
    return x / 2 * (1 + erf(x / math.sqrt(2)))


def polynomial_gelu(x: Array) -> Array:
    """I-BERT's formula in reals."""
    t = np.minimum(np.abs(x) / math.sqrt(2), 1.769)
    return x / 2 * (1 + np.sign(x) * (1 - 0.2888 * (t - 1.769) ** 2))


def integer_gelu(bits: int, top: float, out_step: float) -> tuple[Array, Array]:
    """All codes of a symmetric grid that ends at ``top``: what they stand for, and the integer op's result."""
    last = 2 ** (bits - 1) - 1
    codes, scale = np.arange(-last, last + 1, dtype=np.int32), top / last
    out = numpy_int_gelu(codes, 0, *gelu_constants(scale, out_step), 0, -(2**31), 2**31 - 1)
    return codes * scale, out * out_step


def rms_and_max(error: Array) -> tuple[float, float]:
    return float(np.sqrt(np.mean(np.square(error)))), float(np.abs(error).max())


def section_gelu() -> list[str]:
    x = np.linspace(-4, 4, 2**16 + 1)
    rows = [("formula in float64", x, polynomial_gelu(x))]
    rows += [(f"integers, {bits}-bit codes", *integer_gelu(bits, 4.0, 2.0**-20)) for bits in (8, 16)]
    lines = ["| GELU on [-4, 4] | RMS error | largest error |", "|---|---|---|", "| I-BERT's paper | 0.0082 | 0.018 |"]
    for name, at, found in rows:
        rms, worst = rms_and_max(found - gelu(at))
        lines.append(f"| {name} | {rms:.5f} | {worst:.5f} |")
    at, found = integer_gelu(16, 16.0, 2.0**-20)
    error, added = found - gelu(at), np.abs(found - polynomial_gelu(at))
    where = at[np.abs(error).argmax()]
    return lines + paragraph(
        f"Over all 16-bit codes of [-16, 16] the largest error is {np.abs(error).max():.5f}, at x = "
        f"{where:.2f}; the integers are nowhere more than {added.max():.5f} from the formula. A code of few "
        "bits takes the exact table instead, unless a rule asks for the polynomial."
    )


def exponentials(form: str) -> tuple[Array, Array]:
    """Every step d of the op: the score it stands for, and its exponential in units of one."""
    if form == "table":
        table = exp_table().numpy()
        return np.arange(len(table)) / -(2.0**10), table / 2.0**15
    d = np.arange(2**18)
    return d / -(2.0**14), numpy_i_exp(d) / 2.0**15


def section_exp() -> list[str]:
    p = np.linspace(-math.log(2), 0, 2**16 + 1)
    paper, code = 0.3585 * (p + 1.353) ** 2 + 0.344, 0.35815147 * p**2 + 0.96963238 * p + 1
    lines = ["| exp | (-ln 2, 0] | [-16, 0], every step |", "|---|---|---|", "| I-BERT's paper | 0.0019 | – |"]
    for name, value in (("coefficients of the paper's text, float64", paper), ("of its code, float64", code)):
        lines.append(f"| {name} | {np.abs(value - np.exp(p)).max():.6f} | – |")
    for form in ("polynomial", "table"):
        at, found = exponentials(form)
        error = np.abs(found - np.exp(at))
        lines.append(f"| integers, {form} | {error[at > -math.log(2)].max():.6f} | {error.max():.6f} |")
    return lines + paragraph(
        "The paper's figure is that of its code's coefficients, not of those in its text. The table's error "
        "is its rounding to 2**-15; rounding scores to steps of 2**-10 adds at most 2**-11 of the value."
    )


def int_probabilities(x: Array, scale: float, form: str) -> tuple[Array, Array]:
    """Of rows of int32 scores: probabilities before the last rounding (nearly), and codes of 1/255."""
    table = exp_table().numpy() if form == "table" else None
    grid = score_grid(scale, table=form == "table")
    fine = numpy_int_softmax(x, None, table, *grid, prob_divider(1 / FINE), 0, 0, FINE)
    return fine / FINE, numpy_int_softmax(x, None, table, *grid, prob_divider(1 / 255), 0, 0, 255)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_line(name: str, x: Array, scale: float) -> str:
    real, cells = softmax(x * scale), []
    for form in FORMS:
        p, codes = int_probabilities(x.astype(np.int32), scale, form)
        rounded = np.abs(codes - np.rint(real * 255))
        cells += [f"{np.abs(p - real).max() * 255:.3f}", f"{100 * np.mean(rounded > 0):.2f} %, {int(rounded.max())}"]
    return f"| {name} | {' | '.join(cells)} |"


def plateaus(n: int, scale: float) -> Array:
    """One key on top and ``n - 1`` all ``distance`` below it: every distance down to 13, in steps of 1/256."""
    distances = np.arange(0, 13 * 256 + 1) / 256
    rows = np.repeat(np.rint(-distances / scale)[:, None], n, axis=1)
    rows[:, 0] = 0
    return rows


def section_softmax() -> list[str]:
    rng, scale = np.random.default_rng(0), 2.0**-12 * 1.1
    lines = [
        "| rows | table: error before rounding | codes that differ, by | polynomial: error | codes that differ, by |",
        "|---|---|---|---|---|",
    ]
    for n in (16, 128, 512):
        for sd in (1.0, 4.0, 16.0):
            x = np.rint(rng.normal(0, sd, (2000, n)) / scale)
            lines.append(softmax_line(f"random, sd {sd:g}, {n} keys", x, scale))
    for n in (16, 128, 512):
        lines.append(softmax_line(f"one key above {n - 1} equal ones, worst distance", plateaus(n, scale), scale))
    return lines + paragraph(
        "Worst found is a long row whose keys nearly all lie about 10 below the largest: each exponential is then "
        "one or two units of 2**-15, rounded to the nearest by the table and down by the polynomial, and all "
        "are wrong in the same direction. The sum is off by up to half a unit a key (a whole one), which the "
        "key on top pays. Random rows stay below half a code with the table, below one with the polynomial."
    )


def newton_steps(n: Array) -> list[int]:
    """How many of ``n`` are not at floor(sqrt(n)) after 0, 1, ... steps."""
    want = np.array([math.isqrt(v) for v in n.tolist()])
    x = np.int64(1) << ((numpy_bits(n) + 1) // 2)
    left = [int((x != want).sum())]
    while left[-1]:
        x = np.minimum(x, (x + n // np.maximum(x, 1)) // 2)
        left.append(int((x != want).sum()))
    return left


def section_sqrt() -> list[str]:
    k = np.arange(1, 2**16 + 1, dtype=np.int64)
    last_of_lengths = 2 ** np.arange(33, dtype=np.int64) - 1
    n = np.unique(np.concatenate([k * k - 1, last_of_lengths]))
    left = newton_steps(n)
    lines = ["| steps | " + " | ".join(str(i) for i in range(len(left))) + " |", "|---" * (len(left) + 1) + "|"]
    lines += ["| not there yet | " + " | ".join(f"{v:,}" for v in left) + " |"]
    return lines + paragraph(
        f"Of {len(n):,} numbers, {left[4]:,} still need a fifth step and none a sixth, which only finds that "
        "nothing changes; the paper, which counts that one too, says four are enough. The op always runs six. "
        "The numbers are each square less one and each bit length's last, and they decide for all n < 2**32: "
        "a step is monotone in n and in x, so between two squares, from one start, the largest n arrives "
        "last."
    )


def norm_line(name: str, x: Array, scale: float) -> str:
    n, step = x.shape[-1], 4 / 127
    y = x * scale
    centred = y - y.mean(-1, keepdims=True)
    real = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-12)
    found = []
    for out in (step / 2**16, step):
        c = norm_constants(None, None, n, scale, out, 1e-12, -(2**21), 2**21 - 1)
        ints = (c.fraction, c.eps, c.shift, 0, -(2**31), 2**31 - 1)
        found.append(numpy_int_layer_norm(x.astype(np.int32), c.gain.numpy(), c.offset.numpy(), *ints))
    inside = np.abs(real) < 4  # what an 8-bit grid that ends at 4 can hold
    fine = np.abs(found[0] / 2**16 - real / step)[inside].max(initial=0.0)
    differ = (np.abs(found[1] - np.rint(real / step)))[inside]
    return f"| {name} | {fine:.4f} | {100 * np.mean(differ > 0):.3f} % | {int(differ.max(initial=0))} |"


def section_norm() -> list[str]:
    rng = np.random.default_rng(0)
    lines = ["| rows of 768 | largest, before rounding | codes that differ | by at most |", "|---|---|---|---|"]
    for sd in (2.0, 50.0, 2.0**17):
        lines.append(norm_line(f"random, sd {sd:g} codes", np.rint(rng.normal(0, sd, (2000, 768))), 1e-5))
    outlier = np.rint(rng.normal(0, 2000, (2000, 768)))
    outlier[:, 5] = 2**21 - 1
    lines.append(norm_line("one channel at the end of 22 bits", outlier, 1e-5))
    single = np.zeros((2000, 768))
    single[np.arange(2000), np.arange(2000) % 768] = 1 + np.arange(2000) // 10
    lines.append(norm_line("all equal but one", single, 1e-5))
    return lines + paragraph(
        "What remains is the mean, rounded to steps of 2**-5 of a code here (the finest with which a row of "
        "768 codes of 22 bits fits): it shows in rows that spread over few codes of the grid they have. The "
        "root and its reciprocal are off by at most 2**-15 of the result, 0.004 of a code at the end of the "
        "grid."
    )


def table_line(name: str, function: Any, real: Any, bits: int) -> str:
    last = 2 ** (bits - 1) - 1
    codes = torch.arange(-last - 1, last + 1, dtype=torch.int32)
    scale, out = torch.tensor(6 / last), torch.tensor((6 if name == "gelu" else 1) / last)
    table = quantize(function(dequantize(codes, scale)), out, 0, -last - 1, last).double().numpy()
    ideal = np.rint(real(codes.double().numpy() * float(scale)) / float(out))
    differ = np.abs(table - np.clip(ideal, -last - 1, last))
    tenths = math.ceil(1000 * float(np.mean(differ > 0)))
    share = f"under {tenths / 10:.1f} %, by {int(differ.max())}" if tenths else "none"
    return f"| {name}, {bits} bits | {len(codes):,} | {share} |"


def section_tables() -> list[str]:
    lines = ["| table | entries | differ from float64's |", "|---|---|---|"]
    for name, function, real in (("gelu", F.gelu, gelu), ("tanh", torch.tanh, np.tanh)):
        lines += [table_line(name, function, real, bits) for bits in (8, 16)]
    return lines + paragraph(
        "A table holds what the float op itself gives, so it equals the quantized float graph on every code. "
        "An entry differs from float64's where float32 lands on the other side of a tie."
    )


def plot() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    x = np.linspace(-6, 6, 2**13 + 1)
    axes[0].plot(x, polynomial_gelu(x) - gelu(x), label="formula", lw=3, alpha=0.4)
    at, found = integer_gelu(16, 6.0, 2.0**-20)
    axes[0].plot(at, found - gelu(at), label="integers, 16-bit codes", lw=0.8)
    axes[0].set(title="i-GELU less GELU", xlabel="x")
    for form in ("polynomial", "table"):
        at, found = exponentials(form)
        near = at > -4
        axes[1].plot(at[near], (found - np.exp(at))[near], label=form, lw=0.8)
    axes[1].set(title="exponential less exp", xlabel="score below the largest")
    scale = 2.0**-12 * 1.1
    rows = plateaus(512, scale)
    for form in ("polynomial", "table"):
        p, _ = int_probabilities(rows.astype(np.int32), scale, form)
        axes[2].plot(np.arange(len(rows)) / 256, (p - softmax(rows * scale))[:, 0] * 255, label=form, lw=0.8)
    axes[2].set(title="softmax: one key above 511 equal ones", xlabel="distance", ylabel="its error, 1/255")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(DOCS / "integer_errors.png", dpi=90, metadata={"Software": None})


def report() -> str:
    parts = [
        "# How far the integers are from float64",
        "",
        "Written by `python benchmarks/integer_errors.py`. Curves are taken at every code, or at 65,537 points of an",
        "interval; random rows have fixed seeds. What the integers compute is in",
        "[integer_primitives.md](integer_primitives.md).",
        "",
        "![errors](integer_errors.png)",
    ]
    for title, section in (
        ("i-GELU", section_gelu),
        ("Exponentials", section_exp),
        ("Softmax, in codes of 1/255", section_softmax),
        ("Integer square root: Newton's steps", section_sqrt),
        ("LayerNorm, in 8-bit codes of a grid that ends at 4", section_norm),
        ("Tables", section_tables),
    ):
        parts += ["", f"## {title}", "", *section()]
    return "\n".join(parts) + "\n"


def main() -> int:
    (DOCS / "integer_errors.md").write_text(report(), encoding="utf-8")
    plot()
    return 0


if __name__ == "__main__":
    sys.exit(main())
