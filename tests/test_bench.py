"""``mlff bench``: its water, its numbers, and that one failure does not hide the rest."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.neighborlist import neighbor_list
from reference import random_model

from mlff import bench, cli
from mlff.core import MLFFError, device_count
from mlff.export import build_payload
from mlff.painn import save_checkpoint

FAST = 0.002  # seconds for each measurement


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint and the payload made of it."""
    folder, model = tmp_path_factory.mktemp("bench"), random_model(16, 2)
    save_checkpoint(model, folder / "random.safetensors")
    (folder / "model.mlff").write_bytes(build_payload(model))
    return folder / "random.safetensors", folder / "model.mlff"


@pytest.mark.parametrize("n", [1, 2, 64, 72, 300])
def test_water_box(n):
    box = bench.water_box(n)
    assert len(box) == 3 * n and box.symbols.count("O") == n and len(box) / box.get_volume() == pytest.approx(bench.DENSITY)
    i, j, d = neighbor_list("ijd", box, 2.0)
    bonds = (i < j) & (i // 3 == j // 3) & (d < 1.1)
    assert np.count_nonzero(bonds) == 2 * n and d[bonds] == pytest.approx(0.969, abs=1e-3)  # turned, not bent
    assert (d[i // 3 != j // 3] > 1.3).all()
    assert np.array_equal(box.positions, bench.water_box(n).positions)
    assert not np.allclose(box.positions, bench.water_box(n, seed=1).positions)


def test_large_boxes_take_no_time():
    assert len(bench.water_box(32445)) == 97335


@pytest.mark.parametrize("n", [1, 10, 100, 192])
def test_structure(n):
    atoms = bench.structure(n, [1, 6, 8])
    assert len(atoms) == n and atoms.pbc.all() == (n > bench.LARGEST_OPEN)
    assert set(bench.structure(n, [6, 7]).numbers) <= {6, 7}


def test_bench(files, tmp_path):
    checkpoint, model = files
    results = bench.bench(model, tmp_path, device="cpu", sizes=[10, 102], peers=str(checkpoint), seconds=FAST)
    assert json.loads((tmp_path / "bench.json").read_text()) == results
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert results["config"]["features"] == 16 and {"cpu", "date", "mlff", "torch"} <= set(results["environment"])
    rows = results["rows"]
    labels = ["core, search excluded", "core, search included"] * 2 + ["PyTorch eager"] * 2
    assert [bench.label(row) for row in rows] == labels
    assert [row["atoms"] for row in rows] == [10, 10, 102, 102, 10, 102]
    assert [row["boundaries"] for row in rows] == ["open"] * 2 + ["periodic"] * 2 + ["open", "periodic"]
    for row in rows:
        assert 0 < row["us_p10"] <= row["us_per_step"] <= row["us_p90"] and row["calls"] >= bench.FEWEST
        assert row["atom_steps_per_s"] == pytest.approx(1e6 * row["atoms"] / row["us_per_step"])
    assert all(row["bytes_per_atom"] > 0 for row in rows[:4])
    assert all(row["force_difference"] < 1e-3 for row in rows[4:])  # float32 both


def test_search_is_excluded_or_included(files, monkeypatch):
    """The moves are what the lists with their skin of 1 A are made for."""
    seen = []

    class Recorder:
        bytes = 1

        def __init__(self, *_):
            pass

        def set_atoms(self, numbers):
            pass

        def compute(self, positions, cell, pbc):
            seen.append(positions)

    monkeypatch.setattr(bench, "System", Recorder)
    atoms = bench.structure(102, [1, 8])
    for search in (False, True):
        seen.clear()
        bench._in_core(None, "cpu", atoms, search, FAST)
        first = [np.linalg.norm(x - seen[0], axis=1).max() for x in seen[1:]]
        if search:
            assert min(np.linalg.norm(b - a, axis=1).max() for a, b in zip(seen, seen[1:])) > 1.0
        else:
            assert 0 < min(first) and max(first) < 0.5


def test_failures_are_rows(files, tmp_path, monkeypatch, capsys):
    in_core = bench._in_core

    def fails(model, device, atoms, search, seconds):
        if len(atoms) == 21:
            raise RuntimeError("CUDA out of memory.\nTried to allocate" if search else "no luck")
        return in_core(model, device, atoms, search, seconds)

    monkeypatch.setattr(bench, "_in_core", fails)
    rows = bench.bench(files[1], tmp_path, device="cpu", sizes=[10, 21, 50], seconds=FAST)["rows"]
    assert [row.get("failed") for row in rows] == [None, None, "no luck", "out of memory", None, None]
    assert "21 atoms, core, search excluded failed: no luck" in capsys.readouterr().out


def test_command(files, tmp_path, capsys):
    arguments = ["bench", str(files[1]), "--output", str(tmp_path / "out"), "--device", "cpu", "--seconds", str(FAST)]
    assert cli.main([*arguments, "--sizes", "10,21"]) == 0
    out = capsys.readouterr().out
    assert "core, search excluded" in out and "atom-" in out
    assert [row["atoms"] for row in json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]] == [10, 10, 21, 21]


def test_default_sizes(files, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "structure", lambda n, known: asked.append(n) or bench.water_box(1))
    bench.bench(files[1], tmp_path, device="cpu", large=True, seconds=FAST)
    assert asked == [*bench.CPU_SIZES, bench.LARGE]


def test_other_weights(files, tmp_path):
    with pytest.raises(ValueError, match="does not hold the weights of"):
        bench.bench(files[1], tmp_path, device="cpu", sizes=[10], peers="ethanol-water", seconds=FAST)


@pytest.mark.parametrize("text", ["", "ten", "0,10", "-3"])
def test_bad_sizes(files, text, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", str(files[1]), f"--sizes={text}"])
    assert error.value.code == 2 and "is no list of numbers above zero" in capsys.readouterr().err


@pytest.mark.skipif(device_count("cuda") > 0, reason="there is a GPU")
def test_no_gpu(files, tmp_path):
    with pytest.raises(MLFFError):
        bench.bench(files[1], tmp_path / "out", device="cuda:0", sizes=[10])
    assert not (tmp_path / "out").exists()


def test_kinds_of_peers():
    assert list(bench.Peers.kinds("cpu", 21)) == [("eager", False)]
    both = [("eager", False), ("eager", True), ("CUDA graph", False), ("CUDA graph", True)]
    assert list(bench.Peers.kinds("cuda:0", 10)) == both
    assert list(bench.Peers.kinds("cuda:0", 21)) == [*both, ("compiled", False), ("compiled", True)]
    assert list(bench.Peers.kinds("cuda:0", 97336)) == both[:2]


def test_script(tmp_path, monkeypatch, capsys):
    """benchmarks/gpu.py from end to end, on the CPU."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import common
    import gpu

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--sizes", "10", "--seconds", str(FAST)])
    gpu.main()
    models = json.loads((tmp_path / "gpu.json").read_text())["models"]
    assert list(models) == ["ethanol-water", "random-64x2"]
    assert all(len(m["rows"]) == 3 and "error" not in m for m in models.values())
    assert "random-64x2: µs per step" in capsys.readouterr().out


@pytest.mark.gpu
def test_bench_on_a_gpu(tmp_path):
    from mlff import compile

    model = random_model(32, 2)
    save_checkpoint(model, tmp_path / "random.safetensors")
    (tmp_path / "model.mlff").write_bytes(build_payload(model, architectures=compile.ARCHITECTURES))
    peers = str(tmp_path / "random.safetensors")
    rows = bench.bench(tmp_path / "model.mlff", tmp_path, device="cuda", sizes=[10, 192], peers=peers, seconds=0.05)["rows"]
    assert [row for row in rows if "failed" in row] == []
    assert {bench.label(row) for row in rows} >= {"operator, search included", "operator, CUDA graph, search included", "PyTorch CUDA graph"}
    assert all(row["force_difference"] < 1e-3 for row in rows if "force_difference" in row and not row["tf32"])
