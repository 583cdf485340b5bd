"""examples/lv_bert_search.py: the supernet, what its table and budget say, and the whole script on tiny data."""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_glue
import torch

import kdlsq_fx as kq
from kdlsq_fx.errors import ConfigError
from kdlsq_fx.family import Member
from kdlsq_fx.family_search import best

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import lv_bert_search  # noqa: E402
from lv_bert import LVBertConfig, example_inputs  # noqa: E402
from lv_bert_search import SuperNet  # noqa: E402

torch.set_num_threads(1)
SIZES = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "positions": 64}


@pytest.fixture
def net() -> SuperNet:
    torch.manual_seed(0)
    return SuperNet(LVBertConfig(order="000", **SIZES)).eval()  # type: ignore[arg-type]


def test_a_member_is_the_supernet_at_its_order_and_costs_what_its_integers_hold(net: SuperNet) -> None:
    inputs = example_inputs(net.config)
    for order in ("000", "210", "012"):
        model, net.order = net.member(order).eval(), order
        assert torch.equal(net(**inputs)["logits"], model(**inputs)["logits"])
    qat = kq.prepare_qat(model, "W8E8A8-int", example=inputs)
    kq.calibrate(qat, [inputs], progress=False)
    tensors = kq.convert(qat).state_dict()
    weights = sum(v.nbytes for k, v in tensors.items() if k.endswith(("weight_codes", "linear_bias", "conv1d_bias")))
    norms = sum(v.numel() for k, v in tensors.items() if k.endswith(("q_gain", "q_offset")))
    assert net.tables(np.zeros((3, 3))).cost("bytes", Member((0, 1, 2))) == weights + 4 * norms


def test_the_table_finds_what_each_kind_adds_and_the_budget_binds(
    net: SuperNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    adds = np.array([[-2.0, 1.0, 1.0], [0.5, -1.0, 0.5], [0.1, 0.2, -0.3]])
    lossy = lambda net, data, order: 3 + sum(row[int(kind)] for row, kind in zip(adds, order))  # noqa: E731
    monkeypatch.setattr(lv_bert_search, "loss_of", lossy)
    table = lv_bert_search.table_of(net, None, np.random.default_rng(0), 40)  # type: ignore[arg-type]
    np.testing.assert_allclose(table, adds, atol=1e-9)

    tables = net.tables(table)
    assert best(tables, {})[0].bits == (0, 1, 2)
    cost = tables.cost("bytes", Member((0, 1, 2)))
    (tight,) = best(tables, {"bytes": cost - 1})
    assert tables.cost("bytes", tight) < cost and tight.bits == (0, 2, 2)
    with pytest.raises(ConfigError, match="below the smallest model"):
        best(tables, {"bytes": 1e3})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """SST-2's layout with sentences of good and bad words, and a tokenizer of those."""
    folder = tiny_glue.write_sst(tmp_path / "sst2", train=320, dev=64)
    plain = folder / "train.tsv"
    (folder / "train.tsv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "vocab").mkdir()
    tiny_glue.tokenizer().backend_tokenizer.save(str(tmp_path / "vocab" / "bert-base-uncased-tokenizer.json"))
    return tmp_path


def test_a_budget_that_no_order_keeps_is_told_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lv_bert_search.main(["no folder", "--depth=2", "--hidden=64", "--mib=0.01"])
    least = float(
        re.findall(r"--mib 0.01: the smallest of these orders takes ([\d.]+) MiB", capsys.readouterr().err)[0]
    )
    with pytest.raises(SystemExit):
        lv_bert_search.main(["nowhere", "--depth=2", "--hidden=64", f"--mib={least}"])
    assert "nowhere has no sst2/train.tsv.gz" in capsys.readouterr().err


def test_the_script_searches_trains_and_converts(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"depth": 2, "steps": 40, "orders": 6, "tried": 2, "hidden": 64}
    lv_bert_search.main([str(data), *(f"--{k}={v}" for k, v in options.items())])
    out = capsys.readouterr().out
    tried = dict(re.findall(r"  ([012]{2}): held-out loss ([\d.]+)", out))
    rows = {k: float(v) for k, v in re.findall(r"^[012]{2} (.+): dev loss ([\d.]+)", out, re.MULTILINE)}
    winner = re.findall(r"^([012]{2}) float:", out, re.MULTILINE)
    assert len(tried) == 2 and winner == [min(tried, key=lambda order: float(tried[order]))]
    q = "W8E8A8-int"
    assert list(rows) == ["float", f"{q}, calibrated", "float, trained on", f"{q}, trained on", f"{q}, integers"]
    assert rows["float"] < 0.5 and rows[f"{q}, integers"] == pytest.approx(rows[f"{q}, trained on"], abs=1e-3)
