"""The OpenMM examples run, for a few steps."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
FOLDER = Path(__file__).parents[2] / "examples" / "openmm"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from mlff.export import export

    return export("ethanol-water", tmp_path_factory.mktemp("examples") / "model.pt", architectures=())


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_example(script, model_path, tmp_path):
    run = subprocess.run(
        [sys.executable, str(FOLDER / script), str(model_path), "--steps", "20"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "nan" not in run.stdout.lower()
