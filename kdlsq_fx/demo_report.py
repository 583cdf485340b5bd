"""What the demo shows: rows of its table, the checks between them, and the text of both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlsq_fx.data import Encoded
from kdlsq_fx.errors import ConfigError
from kdlsq_fx.qconfig import resolve
from kdlsq_fx.sentence import cosines, embed

if TYPE_CHECKING:
    from kdlsq_fx.backends.onnx_kernels import KernelReport

CLOSE = 0.99  # least mean cosine between two executions of one student


@dataclass(frozen=True)
class Row:
    """One model on all held-out texts. ``vectors`` float32 [texts, width]; ``cosine`` to fp32 (mean) and ``lowest``;
    ``overlap`` of the nearest ten, 0 to 1; ``bytes`` of ``file``; ``ms`` per text, one at a time (median)."""

    vectors: np.ndarray
    name: str = ""
    cosine: float = 0.0
    lowest: float = 0.0
    overlap: float = 0.0
    bytes: int = 0
    file: str = ""
    ms: float = 0.0

    def figures(self) -> dict[str, Any]:
        """All but the vectors, as JSON values."""
        return {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "vectors"}


@dataclass(frozen=True)
class Check:
    """One comparison of two executions: what was seen, what was asked for, and whether it holds."""

    what: str
    seen: str
    wanted: str
    holds: bool


def baseline_of(qconfig: str) -> str:
    """The min-max preset of the same bits and placement. ConfigError where ``qconfig`` is no preset."""
    match = re.match(r"W\d+E\d+A\d+", qconfig)
    if match is None:
        do = "give a preset: W4E4A8, W8E8A8, W2E2A8, W4E4A8-lsq, W8E8A8-int, ..."
        raise ConfigError(f"--qconfig {qconfig!r} is no preset", do=do)
    resolve(qconfig)
    return f"{match[0]}-minmax" + ("-int" if qconfig.endswith("-int") else "")


def check(qat: Any, out: Path, texts: Encoded, rows: list[Row]) -> list[Check]:
    """The student, its integer program on both backends and its ONNX file against each other.

    ``texts``: a few, compared site by site; the vectors of ``rows`` are of all held-out texts.
    """
    import kdlsq_fx as kq
    from kdlsq_fx.backends.onnx_runtime import kernel_report

    by_name = {r.name: r.vectors for r in rows}
    batch = texts.batch(range(len(texts)), labels=False)
    sites = kq.compare(qat, kq.from_pretrained(out / "int"), batch)
    torch_run = embed(kq.from_pretrained(out / "int", backend="torch"), texts, title="integer on torch")
    reloaded = embed(kq.from_pretrained(out / "qat"), texts, title="student from its folder")
    seen = f"{len(sites.sites)} sites, at most {sites.max_steps} apart on {sites.max_share:.4%} of a site's outputs"
    checks = [
        Check("integer and student, each site fed the same codes", seen, "1 apart on 0.1 %",
              sites.max_steps <= 1 and sites.max_share <= 1e-3 and not sites.unmatched),
        _close("integer and student, end to end", by_name["integer"], by_name["student (qat)"]),
        _close("ONNX and student, end to end", by_name["ONNX"], by_name["student (qat)"]),
        _close("ONNX and integer, end to end", by_name["ONNX"], by_name["integer"]),
        _close("integer in NumPy and in torch", torch_run, embed(kq.from_pretrained(out / "int"), texts)),
    ]  # fmt: skip
    off = float(np.abs(reloaded - embed(qat, texts)).max())
    checks.append(Check("student read back from its folder", f"largest difference {off:g}", "0", off == 0))
    products = kq.from_pretrained(out / "int").summary().products
    return [*checks, _int8(kernel_report(out / "model.onnx"), products)]


def _int8(kernels: KernelReport, products: int) -> Check:
    """``products``: the matrix products that the integer program computes on integers."""
    counted = f"{kernels.integer} of {kernels.integer + kernels.floating} matrix products"
    holds = kernels.integer >= products > 0 and not kernels.missed
    return Check("ONNX Runtime's kernels are int8", counted, f"the integer program's {products}", holds)


def _close(what: str, a: np.ndarray, b: np.ndarray) -> Check:
    values = cosines(a, b)
    seen = f"cosine {values.mean():.5f} on average, {values.min():.5f} at least"
    return Check(what, seen, f"{CLOSE} on average", float(values.mean()) >= CLOSE)


def text(results: dict[str, Any], *, timed: int) -> str:
    """The table, the checks and the searches as Markdown."""
    settings = results["settings"]
    corpus = settings["corpus"]
    lines = [
        f"# all-MiniLM-L6-v2 distilled into {settings['qconfig']}",
        "",
        f"{corpus['train']} docstring paragraphs of Python {corpus['python']} to learn from, without labels; "
        f"{corpus['held_out']} others to measure on (sha256 of all: {corpus['sha256'][:16]}).",
        f"{results['training']['steps']} steps of {settings['batch']} texts took "
        f"{results['training']['seconds']:.0f} s on {results['threads']} threads.",
        "",
        "| model | cosine to fp32 | top-10 overlap | MB on disk | ms per text | written to |",
        "|---|---|---|---|---|---|",
        *(_line(r) for r in results["rows"]),
        "",
        f"Cosine and overlap: means over all {corpus['held_out']} held-out paragraphs; each searches among the others.",
        f"Latency: median over {timed} of them, one text at a time (batch 1), tokenization not counted. The integer",
        "model runs on the reference backend (NumPy), which is there to be right. fp32, PTQ and student folders hold",
        "float weights; the integer folder and the ONNX file hold packed codes.",
        "",
        "| check | seen | wanted | holds |",
        "|---|---|---|---|",
        *(
            f"| {c['what']} | {c['seen']} | {c['wanted']} | {'yes' if c['holds'] else 'NO'} |"
            for c in results["checks"]
        ),
        "",
        *(line for found in results["searches"] for line in _answer(found)),
    ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    figures = f"{row['cosine']:.4f} | {row['overlap']:.3f} | {row['bytes'] / 1e6:.1f} | {row['ms']:.1f}"
    return f"| {row['name']} | {figures} | {row['file']}{'' if '.' in row['file'] else '/'} |"


def _answer(found: dict[str, Any]) -> list[str]:
    lines = [f"Search: {found['query']}", ""]
    for name in ("fp32", "integer"):
        for place, hit in enumerate(found[name], 1):
            words = hit["text"] if len(hit["text"]) <= 90 else hit["text"][:87] + "..."
            lines.append(f"    {name:8} {place}.  {hit['cosine']:.3f}  {words}")
    return [*lines, ""]
