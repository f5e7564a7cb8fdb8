"""What every benchmark shares: water boxes, the machine's description, result files."""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule

RESULTS = Path(__file__).parent / "results"


def water_box(n_molecules: int, seed: int = 0) -> Atoms:
    """Water at 0.1 atoms/A^3: randomly turned molecules on a cubic lattice with gaps, then pushed apart where they touch."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(n_molecules ** (1 / 3)))
    length = (n_molecules * 3 / 0.1) ** (1 / 3)
    sites = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    centres = (sites[rng.permutation(len(sites))[:n_molecules]] + 0.5) * length / side
    box = Atoms(cell=[length] * 3, pbc=True)
    for centre in centres:
        best = None
        for _ in range(20):  # of some orientations, the one farthest from what is there
            water = molecule("H2O")
            water.euler_rotate(*rng.uniform(0, 360, 3))
            water.translate(centre - water.positions.mean(0))
            gap = np.inf
            if len(box):
                d = water.positions[:, None] - box.positions[None]
                gap = np.linalg.norm(d - length * np.round(d / length), axis=-1).min()
            if best is None or gap > best[0]:
                best = (gap, water)
        box += best[1]
    return box


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(*packages: str) -> dict:
    """Machine, versions, commit and date: the evidence that goes with every number."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "commit": commit,
        **{name: version(name) for name in packages},
    }


def write_results(name: str, results: dict) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path
