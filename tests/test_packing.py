"""Packed codes against Python's own integers and bit strings, and packed files that are not what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from kdlsq_fx.errors import CheckpointError
from kdlsq_fx.files import read_tensors, write_tensors
from kdlsq_fx.packing import pack
from kdlsq_fx.run_int import ProgramError, read_safetensors, unpack

SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=3)


def as_written(codes: list[int], first: int, levels: int) -> bytes:
    """The layout of docs/integer_format.md, from numbers and strings alone."""
    steps = [c - first for c in codes]
    if levels == 3:
        fives = [steps[at : at + 5] for at in range(0, len(steps), 5)]
        return bytes(sum(step * 3**place for place, step in enumerate(five)) for five in fives)
    width = next(w for w in range(1, 8) if 2**w >= levels)
    text = "".join(format(step, f"0{width}b")[::-1] for step in steps)  # the lowest bit first
    return bytes(int(text[at : at + 8][::-1], 2) for at in range(0, len(text), 8))


@given(st.integers(0, 2**32), SHAPES, st.integers(2, 128), st.booleans(), st.integers(0, 2**16))
def test_every_width_and_length(seed: int, shape: list[int], levels: int, signed: bool, where: int) -> None:
    dtype = np.int8 if signed else np.uint8
    lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max - levels + 1
    first = int(lowest + where % (highest - lowest + 1))
    codes = np.random.default_rng(seed).integers(first, first + levels, shape).astype(dtype)
    if codes.size > 1:
        codes.flat[0], codes.flat[-1] = first, first + levels - 1  # all levels are there
    made = pack(codes)
    if made is None:  # a lone highest value has no second level above it
        assert codes.size == 1 and codes.max() == np.iinfo(dtype).max
        return
    data, row = made
    assert data.flags.c_contiguous  # a file takes no other
    assert data.tobytes() == as_written(codes.reshape(-1).tolist(), row["first"], row["levels"])
    if codes.size > 1:
        assert (row["first"], row["levels"]) == (first, levels)
    np.testing.assert_array_equal(unpack(data, "here", **row), codes, strict=True)


@pytest.mark.parametrize("width", range(1, 8))
@pytest.mark.parametrize("count", [1, 7, 8 * 65536, 8 * 65536 + 3])  # on both sides of the blocks unpack works in
def test_long_streams(width: int, count: int) -> None:
    codes = np.random.default_rng(width).integers(0, 2**width, count).astype(np.uint8)
    codes[:1], codes[-1:] = 0, 2**width - 1
    made = pack(codes)
    assert made is not None
    data, row = made
    assert len(data) == -(-count * (row["levels"] - 1).bit_length() // 8)
    np.testing.assert_array_equal(unpack(data, "here", **row), codes, strict=True)


def test_ternary_codes_take_a_fifth_of_a_byte() -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (768, 769)).astype(np.int8)
    data, row = pack(codes) or pytest.fail("not packed")
    assert row == {"dtype": "int8", "shape": [768, 769], "first": -1, "levels": 3} and len(data) == -(-768 * 769 // 5)
    np.testing.assert_array_equal(unpack(data, "here", **row), codes, strict=True)


@pytest.mark.parametrize(
    "codes",
    [
        np.array([], np.int8),
        np.array([-128, 127], np.int8),
        np.array([0, 128], np.uint8),
        np.array([127], np.int8),
        np.array([1, 2], np.int32),
        np.array([True, False]),
    ],
)
def test_what_is_not_packed(codes: Any) -> None:
    assert pack(codes) is None


TERNARY: dict[str, Any] = {"dtype": "int8", "shape": [7], "first": -1, "levels": 3}
SEVEN: dict[str, Any] = {"dtype": "int8", "shape": [5], "first": -3, "levels": 7}  # 15 of 16 bits


@pytest.mark.parametrize(
    "data, row, message",
    [
        ([0, 243], TERNARY, "byte 1 is 243, five ternary codes reach 242"),
        ([0, 9], TERNARY, "bits behind its last code"),
        ([0], TERNARY, "7 codes of 3 levels take 2 bytes"),
        ([0, 0, 0], TERNARY, "7 codes of 3 levels take 2 bytes"),
        ([0b111, 0], SEVEN, "code 0 is 7 of 7 levels"),
        ([0, 0b10000000], SEVEN, "bits behind its last code"),
        ([0], SEVEN, "take 2 bytes"),
        ([0, 0], {**SEVEN, "first": -127, "levels": 129}, "129 levels from -127"),
        ([0, 0], {**SEVEN, "first": 125}, "7 levels from 125, which int8 cannot be"),
        ([0, 0], {**SEVEN, "first": -1, "dtype": "uint8"}, "which uint8 cannot be"),
        ([0, 0], {**SEVEN, "levels": 1}, "1 levels"),
        ([0, 0], {**SEVEN, "shape": [-5]}, "take -1 bytes"),
    ],
)
def test_packed_bytes_that_lie(data: list[int], row: dict[str, Any], message: str) -> None:
    with pytest.raises(ProgramError, match=f"here.*{message}"):
        unpack(np.array(data, np.uint8), "here", **row)


def test_the_examples_of_the_page() -> None:
    assert unpack(np.array([219, 8], np.uint8), "here", **TERNARY).tolist() == [-1, 0, -1, 1, 1, 1, 1]
    assert unpack(np.array([198, 76], np.uint8), "here", **SEVEN).tolist() == [3, -3, 0, 3, 1]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    rng = np.random.default_rng(5)
    tensors = {
        f"w{bits}": torch.from_numpy(rng.integers(0, 2**bits, (13, 11)).astype(np.uint8)) for bits in range(2, 9)
    }
    tensors["ternary"] = torch.from_numpy(rng.integers(-1, 2, (13, 11)).astype(np.int8))
    tensors["again"] = tensors["ternary"]
    tensors["turned"] = tensors["w3"].T
    tensors["bias"], tensors["scale"] = torch.arange(4, dtype=torch.int32), torch.rand(3)
    write_tensors(tmp_path / "t.safetensors", tensors, packed=True)
    return tmp_path / "t.safetensors", tensors


def test_files_hold_bytes_and_both_readers_give_codes(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = stored
    with safe_open(path, framework="np") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    assert sizes["ternary"] == 29 and "again" not in sizes and sizes["bias"] == 16 and sizes["scale"] == 12
    assert [sizes[f"w{bits}"] for bits in range(2, 9)] == [-(-143 * bits // 8) for bits in range(2, 9)]
    ours, numpy = read_tensors(path), read_safetensors(path.read_bytes(), "t")
    assert ours.keys() == numpy.keys() == tensors.keys()
    for name, want in tensors.items():
        assert ours[name].dtype == want.dtype and torch.equal(ours[name], want)
        np.testing.assert_array_equal(numpy[name], want.numpy(), strict=True)


def test_unpacked_files_are_plain_safetensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", {"w": torch.zeros(8, dtype=torch.int8)})
    with safe_open(tmp_path / "t", framework="np") as file:
        assert file.get_tensor("w").dtype == np.int8 and json.loads(file.metadata()["layout"])["packed"] == {}


@pytest.mark.parametrize(
    "row",
    [
        None,
        {"gone": {"dtype": "int8", "shape": [4], "first": 0, "levels": 4}},
        {"w": {"dtype": "int64", "shape": [4], "first": 0, "levels": 4}},
        {"w": {"dtype": "int8", "shape": [5], "first": 0, "levels": 4}},
        {"w": {"dtype": "int8", "shape": [4], "first": 0}},
        {"w": {"dtype": "int8", "shape": ["4"], "first": 0, "levels": 4}},
        {"w": {"dtype": "int8", "shape": [4], "first": 0.5, "levels": 4.0}},
        {"w": [4]},
    ],
)
def test_rows_that_lie_about_a_file(tmp_path: Path, row: Any) -> None:
    text = json.dumps(
        {
            "__metadata__": {"layout": json.dumps({"packed": row})},
            "w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        }
    ).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x1b")
    with pytest.raises(CheckpointError, match="t.safetensors is damaged"):
        read_tensors(path)
    with pytest.raises(ProgramError, match="it"):
        read_safetensors(path.read_bytes(), "it")
