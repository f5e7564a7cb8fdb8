"""The ASE example runs, relaxes to a sensible molecule and conserves its energy."""

import re
import subprocess
import sys
from pathlib import Path

from ase.io import read

SCRIPT = Path(__file__).parents[2] / "examples" / "ase" / "ethanol.py"


def test_example(tmp_path):
    from mlff.export import export

    export("ethanol-water", tmp_path / "model.pt", architectures=())
    run = subprocess.run([sys.executable, str(SCRIPT), "--steps", "200"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    c_c, c_o, o_h = (float(x) for x in re.search(r"C-C ([\d.]+), C-O ([\d.]+), O-H ([\d.]+)", run.stdout).groups())
    assert 1.45 < c_c < 1.58 and 1.36 < c_o < 1.48 and 0.93 < o_h < 1.0
    assert float(re.search(r"varies by ([\d.]+) meV", run.stdout).group(1)) < 10.0
    assert len(read(tmp_path / "ethanol.extxyz", index=":")) == 11
