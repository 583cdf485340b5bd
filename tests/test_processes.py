"""Several processes under torchrun: the steps, curves and weights of one; resuming with another number; ends of all
kinds; the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_glue import write_model, write_sst

from kdlsq_fx import checkpoint, processes

torch.set_num_threads(1)
TESTS = Path(__file__).resolve().parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def torchrun(count: int, *args: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(
        [*TORCHRUN, str(count), *map(str, args)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def losses(folder: Path) -> np.ndarray:
    lines = (folder / "log.tsv").read_text().splitlines()[1:]
    assert [int(line.split("\t")[0]) for line in lines] == list(range(1, len(lines) + 1))  # one process writes
    return np.array([[float(f) for f in line.split("\t")[1:3]] for line in lines])


def close(a: Path, b: Path, name: str, limit: float, *, path: float = 0.0) -> None:
    """Each tensor within ``limit`` of its own largest entry. An offset that is held at 0 has no size of its own: where
    the sum of its gradient cancels, what is left is the rounding of terms of order 1, so it counts as ``path``, what a
    gradient of 1 would have moved it (learning rate x steps)."""
    one, two = load_file(a / name), load_file(b / name)
    assert one.keys() == two.keys()
    for key, value in one.items():
        least = max(path, 1e-3) if key.endswith("_lsq.offset") else 1e-3
        room = limit * max(float(value.double().abs().max()), least)
        assert float((value.double() - two[key].double()).abs().max()) <= room, key


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    folder, one, two = write_sst(tmp_path / "sst2", train=99), tmp_path / "one", tmp_path / "two"  # batches of 8 and 3
    for case in ranks.CASES:
        ranks.run(case, folder, one / case)
    ranks.run("W2E2A8", folder, one / "one-row", batch_size=1, steps=8)
    ranks.run("W2E2A8", folder, one / "same-sums", **ranks.SAME_SUMS)
    with pytest.raises(ranks.Cut):
        ranks.run("W2E2A8", folder, two / "begun-alone", stop_at=25)
    group = torchrun(2, TESTS / "ranks.py", "curves", folder, two)
    _, said = group.communicate(timeout=900)
    assert group.returncode == 0, said
    ranks.run("W2E2A8", folder, two / "begun-together")
    pairs = [(one / case, two / case) for case in (*ranks.CASES, "one-row")]
    pairs += [(one / "W2E2A8", two / name) for name in ("begun-alone", "begun-together")]
    pairs += [(one / "W4E4A8-lsq+", two / "in-four")]
    for a, b in pairs:
        np.testing.assert_allclose(losses(a), losses(b), rtol=0, atol=1e-6)
        close(a, b, "gradients.safetensors", 1e-12)
        close(a, b, "weights.safetensors", 1e-10)  # Adam divides by a scale's own gradient, however small
    same = [folder / "same-sums" for folder in (one, two)]
    np.testing.assert_array_equal(losses(same[0]), losses(same[1]), strict=True)
    assert len(losses(same[0])) == 50
    close(*same, "weights.safetensors", 0.0)
    assert "gm.classifier.weight" not in str(list(load_file(two / "W4E4A8-lsq+" / "gradients.safetensors")))


@pytest.mark.parametrize("to_launcher", [True, False])
def test_a_signal_to_one_stops_all_and_saves_once(tmp_path: Path, to_launcher: bool) -> None:
    group = torchrun(2, TESTS / "ranks.py", "slow", write_sst(tmp_path / "sst2"), tmp_path / "out")
    wait_for(tmp_path / "out" / "log.tsv")
    time.sleep(1)
    if to_launcher:
        group.send_signal(signal.SIGINT)  # which passes it on to each, as a terminal would have done already
    else:
        os.kill(int(children(group.pid)[-1]), signal.SIGTERM)
    out, said = group.communicate(timeout=120)
    run = checkpoint.read_run(tmp_path / "out")
    assert run is not None and not run["done"], said
    assert [p.name for p in (tmp_path / "out").glob("state-*")] == [f"state-{run['step']}.safetensors"]
    assert len(losses(tmp_path / "out")) == run["step"]
    assert out.count("saved in") == 2 or to_launcher  # torchrun may end a process before its last word
    assert 'ranks.py", line' not in said


def test_a_failure_in_one_ends_all(tmp_path: Path) -> None:
    group = torchrun(2, TESTS / "ranks.py", "fails", write_sst(tmp_path / "sst2"), tmp_path / "out")
    _, said = group.communicate(timeout=300)
    assert group.returncode == 1 and "a broken shard" in said
    run = checkpoint.read_run(tmp_path / "out")
    assert run is not None and run["step"] == 4


def test_an_infinite_gradient_in_one_process_is_an_error_in_all(tmp_path: Path) -> None:
    group = torchrun(2, TESTS / "ranks.py", "steep", write_sst(tmp_path / "sst2"), tmp_path)
    _, said = group.communicate(timeout=300)
    assert group.returncode == 0, said
    first, second = ((tmp_path / f"said-{rank}.txt").read_text() for rank in (0, 1))
    assert "norm of the gradients is nan" in first and "step 3" in first and first == second
    assert "nan" not in first.rpartition("[")[2]


def test_the_command_line_trains_in_two_processes(tmp_path: Path) -> None:
    folder, model, out = write_sst(tmp_path / "sst2"), write_model(tmp_path / "bert"), tmp_path / "out"
    argv = ["train", "--data", folder, "--model", model, "--out", out, "--epochs", "1", "--qconfig", "W8E8A8"]
    group = torchrun(2, "-m", "kdlsq_fx", *argv)
    table, said = group.communicate(timeout=600)
    assert group.returncode == 0, said
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "fp32", "min-max PTQ", "student (qat)", "integer", "ONNX"
    ]  # fmt: skip
    assert said.count("96 rows of train") == 1 and len(losses(out / "W8E8A8" / "run")) == 3
    alone = torchrun(2, "-m", "kdlsq_fx", "inspect", model)
    assert "inspect runs in one process" in alone.communicate(timeout=300)[1]


def test_the_trainer_and_accelerate_in_two_processes(tmp_path: Path) -> None:
    """Four rows in each of two processes are the eight of one: their padding differs, the gradient does not, but for
    the terms of the loss, which are float32's."""
    pytest.importorskip("accelerate")
    folder, one, two = write_sst(tmp_path / "sst2"), tmp_path / "one", tmp_path / "two"
    ranks.trainer(folder, one, rows=8)
    group = torchrun(2, TESTS / "ranks.py", "trainer", folder, two)
    _, said = group.communicate(timeout=300)
    assert group.returncode == 0, said
    close(one, two, "weights.safetensors", 1e-5, path=1e-2 * 4)
    close(one, two, "accelerate.safetensors", 1e-5)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 300
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)


def test_the_parts_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in range(12):
        for size in range(1, 6):
            monkeypatch.setattr(processes, "size", lambda size=size: size)
            taken: list[int] = []
            sizes: list[int] = []
            numbers: list[int] = []
            for rank in range(size):
                monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
                mine = processes.shares(rows, 2 * size)
                numbers += mine
                for share in mine.values():
                    sizes.append(len(range(rows)[share]))
                    taken += range(rows)[share]
            assert taken == list(range(rows)) and max(sizes) - min(sizes) <= 1 and numbers == list(range(2 * size))
