"""What works on which family, tried on tiny random models; writes docs/support.md.

    python docs/make_support.py [family ...]           some minutes; with names it prints only their rows

Every cell is the result of a run, none is written by hand. tests/test_support.py keeps the list of integer-only
families true.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from calibrated import calibrated  # noqa: E402  (the tiny models of the tests)
from families import FAMILIES, batch, for_model, tiny  # noqa: E402

from kdlsq_fx.api import convert, prepare_qat  # noqa: E402
from kdlsq_fx.backends.onnx_integer import OnnxIntegerCodes  # noqa: E402
from kdlsq_fx.calibration import calibrate  # noqa: E402
from kdlsq_fx.capture import capture  # noqa: E402
from kdlsq_fx.comparison import compare  # noqa: E402
from kdlsq_fx.errors import KdlsqError  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
LENGTHS = (1, 7, 20)
REASONS = 3
LAYER = r"\.\d+\."
HEAD = f"""# What works on which family

Written by `python docs/make_support.py`, which tries every cell on a tiny random model with a head for sentences
(batches of 4 texts, {", ".join(map(str, LENGTHS))} tokens, half of them padded). Do not edit.

* float capture: the captured graph gives the logits of the eager model, bit for bit.
* qat: `prepare_qat(model, "W8E8A8")`, `calibrate`, and a backward pass that gives every parameter a finite gradient.
  No step is taken here; `tests/test_other_layers.py` trains ConvBERT, SqueezeBERT and the LV-BERT of `examples/`.
* kdlsq int: `convert` of that model; fed the same codes, every site is at most one code from training.
* integer only: `convert` of a `W8E8A8-int` model, which refuses floats between the ids and the results; same check.
* integer ONNX: the file of `export_onnx(..., target="integer")` gives the codes of every site and the results of the
  reference, bit for bit.

| family | float capture | qat | kdlsq int | integer only | integer ONNX |
|---|---|---|---|---|---|
"""


def given(family: str) -> list[dict[str, torch.Tensor]]:
    model = tiny(family)
    return [for_model(model, batch(rows=4, length=n, seed=n)) for n in LENGTHS]


def captures(family: str) -> bool:
    model = tiny(family).eval()
    model.set_attn_implementation("eager")
    gm = capture(model, None).gm.eval()
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    pairs = [(model(**one).logits, gm(*(_input(one, n) for n in names))[0]) for one in given(family)]
    return all(torch.equal(eager, captured) for eager, captured in pairs)


def _input(one: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return one.get(name, torch.zeros_like(one["input_ids"]))


def has_gradients(family: str) -> bool:
    model: nn.Module = tiny(family)
    qat = prepare_qat(model, "W8E8A8").train()
    calibrate(qat, given(family))
    sum(qat(**one).logits.square().sum() for one in given(family)).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in qat.parameters() if p.requires_grad]
    return all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)


def agrees(family: str, preset: str) -> bool:
    qat = calibrated(preset, family)
    seen = compare(qat, convert(qat), given(family))
    return not seen.unmatched and seen.max_steps <= 1


def equals_onnx(family: str) -> bool:
    model = convert(calibrated("W8E8A8-int", family))
    seen = compare(model, OnnxIntegerCodes(model, threads=1), given(family))
    sites = not seen.unmatched and all(s.end_off == 0 for s in seen.sites.values())
    return sites and all(o.max_abs == 0 for o in seen.outputs.values())


def islands(family: str) -> list[str]:
    """``op: reason`` of what stays float with the integer placement, each once whatever the layer, in graph order."""
    model = convert(calibrated("W8E8A8-int", family), allow_islands=True)
    found = (f"`{i.op}`: {re.sub(LAYER, '.*.', i.reason)}" for i in model.gm.meta["islands"])
    return list(dict.fromkeys(found))


def tried(run: Callable[..., bool], *args: Any) -> str:
    """``yes``; ``no`` where it is wrong or refused. Any other error is one of this script, and ends it."""
    try:
        return "yes" if run(*args) else "no"
    except KdlsqError as err:
        print(f"  {' '.join(map(str, args))}: {type(err).__name__}: {str(err).splitlines()[0]}", file=sys.stderr)
        return "no"


def row(family: str) -> list[str]:
    """The cells of a family."""
    only = tried(agrees, family, "W8E8A8-int")
    onnx = tried(equals_onnx, family) if only == "yes" else "no"
    return [family, tried(captures, family), tried(has_gradients, family), tried(agrees, family, "W8E8A8"), only, onnx]


def integer_only_families(page: str) -> list[str]:
    """The families that a page says are integer only."""
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if re.match(r"\| [a-z]", line)
    ]
    return [cells[0] for cells in rows if cells[0] in FAMILIES and cells[4] == "yes"]


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines, reasons = [], []
    for family in names or FAMILIES:
        cells = row(family)
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        if cells[4] != "yes":
            found = islands(family)
            more = f"; and {len(found) - REASONS} more reasons" if len(found) > REASONS else ""
            reasons.append(f"* {family}: {'; '.join(found[:REASONS])}{more}")
    if names:
        print("\n".join(reasons))
        return
    why = ["", "## What stays float with the integer placement, and why", "", *(reasons or ["Nothing."])]
    PAGE.write_text("\n".join([HEAD.rstrip("\n"), *lines, *why]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
