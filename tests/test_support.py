"""docs/support.md says what is true today: the families it calls integer only convert, the others do not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from calibrated import calibrated
from families import FAMILIES

from kdlsq_fx.api import convert
from kdlsq_fx.errors import LoweringError

torch.set_num_threads(1)
DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "support.md").read_text(encoding="utf-8")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_support", DOCS / "make_support.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAID = script().integer_only_families(PAGE)


def test_the_page_has_a_row_for_every_family() -> None:
    for family in FAMILIES:
        assert f"\n| {family} |" in PAGE
    assert SAID  # the rows were read


@pytest.mark.parametrize("family", FAMILIES)
def test_integer_only_is_said_of_the_families_that_convert(family: str) -> None:
    qat = calibrated("W8E8A8-int", family)  # one capture, shared with the other tests of its family
    if family in SAID:
        assert convert(qat).gm.meta["integer_only"]
        return
    with pytest.raises(LoweringError, match="stay in floats"):
        convert(qat)
