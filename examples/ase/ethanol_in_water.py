"""Builds a molecule of ethanol in 60 of water, relaxes it and brings it to 300 K; the result is the structure of `mlff demo`."""

import argparse

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary
from ase.optimize import FIRE
from scipy.spatial.transform import Rotation

from mlff.ase import MLFFCalculator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="model.pt")
parser.add_argument("--steps", type=int, default=10000, help="of 0.5 fs")
parser.add_argument("--output", default="ethanol-in-water.extxyz")
args = parser.parse_args()

LENGTH = 12.36  # Angstrom: 0.99 g/cm^3
rng = np.random.default_rng(2026)
sites = (np.array(list(np.ndindex(4, 4, 4))) + 0.5) * LENGTH / 4
centre = sites[[21, 22, 25, 26]].mean(axis=0)  # ethanol takes the place of four molecules of water
atoms = Atoms(cell=[LENGTH] * 3, pbc=True)
for number, (name, site) in enumerate([("CH3CH2OH", centre), *(("H2O", x) for k, x in enumerate(sites) if k not in (21, 22, 25, 26))]):
    one = molecule(name)
    rotation = Rotation.random(random_state=int(rng.integers(2**31)))
    one.positions = rotation.apply(one.positions - one.get_center_of_mass()) + site
    one.set_array("molecule", np.full(len(one), number))
    atoms += one

atoms.calc = MLFFCalculator(args.model)
FIRE(atoms, logfile=None).run(fmax=0.5, steps=300)
deviation = np.sqrt(units.kB * 300 / atoms.get_masses())[:, None]  # Maxwell and Boltzmann, 300 K
atoms.set_velocities(rng.normal(size=(len(atoms), 3)) * deviation)
md = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.02 / units.fs, fixcm=False, rng=rng)


def report():
    print(f"{md.get_time() / (1000 * units.fs):6.2f} ps  {atoms.get_temperature():6.1f} K  {atoms.get_potential_energy():.4f} eV", flush=True)


md.attach(report, interval=max(1, args.steps // 10))
md.run(args.steps)
Stationary(atoms)
atoms.calc = None
write(args.output, atoms, columns=["symbols", "positions", "momenta", "molecule"])
