"""The NumPy execution: no torch kernel in it, and bit for bit what torch computes on the same integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from calibrated import CONFIGS, calibrated, converted
from families import batch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from kdlsq_fx.backends.reference import ReferenceModel
from kdlsq_fx.comparison import compare
from kdlsq_fx.errors import ConfigError, InputError
from kdlsq_fx.op import op_of

DATA = batch(rows=6, length=11, seed=5)
ROUNDED_FROM_INTEGERS = ("requantize", "int_add", "lookup")


def as_numpy(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(as_numpy(v) for v in value) if type(value) in (list, tuple) else [as_numpy(v) for v in value]
    if isinstance(value, torch.dtype):
        return np.dtype(str(value).removeprefix("torch."))
    return value.numpy() if isinstance(value, torch.Tensor) else value


class BothMeanings(fx.Interpreter):
    """Runs a graph in torch and checks the NumPy meaning of every op that yields integers on the same arguments."""

    checked = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        op = next(o for n in [self.current] if (o := op_of(n)) is not None)
        if isinstance(result, torch.Tensor) and not result.is_floating_point():
            other = op.numpy(*(as_numpy(a) for a in args), **{k: as_numpy(v) for k, v in kwargs.items()})  # type: ignore[misc]
            np.testing.assert_array_equal(result.numpy(), other, err_msg=op.name)
            self.checked += 1
        return result

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        return super().run_node(n)


@pytest.mark.parametrize("config", ["W8E8A8", "W4E4A4-lsq+-int", "W2-channels-int"])
def test_every_integer_op_is_equal_bit_for_bit(config: str) -> None:
    model = converted(config)
    run = BothMeanings(model.gm)
    with torch.no_grad():
        run.run(*(DATA[n] for n in model.input_names))
    assert run.checked > 40


@pytest.mark.parametrize("config", CONFIGS)
def test_reference_equals_torch(config: str) -> None:
    seen = compare(converted(config, "torch"), converted(config, "reference"), DATA, exact=False)
    kinds = {n.meta["site"]: op_of(n).name for n in converted(config).gm.graph.nodes if op_of(n)}  # type: ignore[union-attr]
    exact = [s for s in seen.sites.values() if kinds[s.site] in ROUNDED_FROM_INTEGERS]
    assert exact and all(s.off == 0 for s in exact)
    assert seen.max_steps <= 1  # behind a float island a near-tie may fall either way
    assert seen.outputs[0].max_abs <= 1e-4 * seen.outputs[0].largest


class NoTorch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"torch ran {func}")


def test_no_torch_op_runs() -> None:
    model = converted("W8E8A8-int", "reference")
    inputs = {k: v.numpy() for k, v in DATA.items()}
    with NoTorch():
        (logits,) = model.reference.run(inputs)
    assert isinstance(logits, np.ndarray) and logits.dtype == np.float32
    assert torch.equal(torch.from_numpy(logits), model(**DATA).logits)


def test_arguments_by_name_and_in_order() -> None:
    gm = converted("W8E8A8").gm
    model = ReferenceModel(gm)
    assert model.inputs == ("input_ids", "attention_mask", "token_type_ids")
    by_name, in_order = model(**DATA), model(*DATA.values())
    np.testing.assert_array_equal(by_name[0], in_order[0])
    with pytest.raises(InputError, match="token_type_ids"):
        model(DATA["input_ids"], DATA["attention_mask"])
    with pytest.raises(InputError, match="labels"):
        model(**DATA, labels=1)


def test_dead_values_are_freed_and_weights_cast_once() -> None:
    model = ReferenceModel(converted("W8E8A8").gm)
    freed = [name for step in model.steps for name in step.frees]
    assert len(freed) == len(set(freed)) and len(freed) >= len(model.steps)
    linear = next(s for s in model.steps if s.op == "int_linear")
    assert linear.args[1].dtype in (np.float32, np.float64)


def test_ids_outside_the_table_are_refused() -> None:
    model = converted("W8E8A8", "reference")
    data = {**DATA, "input_ids": DATA["input_ids"].clone()}
    data["input_ids"][0, 0] = 99
    with pytest.raises(InputError, match="99"):
        model(**data)
    with pytest.raises(InputError, match="99 rows"):
        model.reference.run(data)


def test_compare_sees_a_changed_scale_and_names_what_it_cannot_match() -> None:
    qat, model = calibrated("W8E8A8"), converted("W8E8A8", "reference")
    import copy

    other = copy.deepcopy(converted("W8E8A8").gm)
    for old, new in zip(converted("W8E8A8").gm.graph.nodes, other.graph.nodes):
        new.meta = dict(old.meta)
    node = next(n for n in other.graph.nodes if n.op == "call_function" and op_of(n).name == "requantize")  # type: ignore[union-attr]
    node.args = (node.args[0], node.args[1] // 2, *node.args[2:])
    other.recompile()
    seen = compare(model, other, DATA)
    changed = seen.sites[node.meta["site"]]
    assert changed.max_steps > 5 and changed.share > 0.5
    assert sum(s.off > 0 for s in seen.sites.values()) == 1  # forced: nothing travels
    assert sum(s.end_off > 0 for s in seen.sites.values()) > 1
    assert node.meta["site"] in str(seen) and "end to end" in str(seen)
    assert "rounds in one only" in str(compare(qat, converted("W8E8A8-int"), DATA))
    with pytest.raises(ConfigError, match="cannot compare"):
        compare(qat, 3, DATA)
