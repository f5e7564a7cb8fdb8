"""Frames of liquid water for the suite water of `mlff validate`: dynamics of a model at 300 K and the experimental density.

    python water_frames.py model.pt ../../python/mlff/structures/water.extxyz

64 molecules from a lattice, 4 ps of equilibration, then a frame every 2 ps (a molecule turns in about 2 ps). Whatever model has moved
them, they are the same frames for every model and teacher that is compared.
"""

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import units
from ase.md.langevinbaoab import LangevinBAOAB
from ase.optimize import FIRE

from mlff.ase import MLFFCalculator
from mlff.validate.measurement import thermalize
from mlff.validate.water import TEMPERATURE, box

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--frames", type=int, default=6)
args = parser.parse_args()

atoms, rng = box(4, np.random.default_rng(0)), np.random.default_rng(1)
atoms.calc = MLFFCalculator(args.model, "cpu")
FIRE(atoms, logfile=None).run(fmax=1.0, steps=200)
thermalize(atoms, TEMPERATURE, rng)
md = LangevinBAOAB(atoms, 0.5 * units.fs, temperature_K=TEMPERATURE, T_tau=100 * units.fs, rng=rng)
md.run(8000)
frames = []
for _ in range(args.frames):
    md.run(4000)
    frame = atoms.copy()
    frame.calc = None
    frame.info = {"kind": "liquid"}
    frame.positions = frame.positions.round(3)
    frames.append(frame)
    print(f"{atoms.get_temperature():.0f} K", flush=True)
ase.io.write(args.output, frames)
