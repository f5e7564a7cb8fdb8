"""Relaxes a molecule of ethanol, then runs it at constant energy; writes ethanol.extxyz, which OVITO and VMD open."""

import argparse

import numpy as np
from ase import units
from ase.build import molecule
from ase.io import write
from ase.md.velocitydistribution import Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from mlff.ase import MLFFCalculator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="model.pt")
parser.add_argument("--steps", type=int, default=2000, help="of 0.5 fs")
parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
args = parser.parse_args()

atoms = molecule("CH3CH2OH")
atoms.calc = MLFFCalculator(args.model, args.device, threads=1)  # more gain nothing for nine atoms

BFGS(atoms).run(fmax=0.01, steps=200)
print(f"bonds: C-C {atoms.get_distance(0, 1):.3f}, C-O {atoms.get_distance(1, 2):.3f}, O-H {atoms.get_distance(2, 3):.3f} Angstrom")

deviation = np.sqrt(units.kB * 300 / atoms.get_masses())[:, None]  # Maxwell and Boltzmann, 300 K
atoms.set_velocities(np.random.default_rng(0).normal(size=(len(atoms), 3)) * deviation)
Stationary(atoms)
ZeroRotation(atoms)
md = VelocityVerlet(atoms, 0.5 * units.fs)
block, totals = max(1, args.steps // 10), []


def report():
    totals.append(atoms.get_total_energy())
    time, temperature = md.get_time() / (1000 * units.fs), atoms.get_temperature()
    print(f"{time:7.3f} ps  {temperature:6.1f} K  potential {atoms.get_potential_energy():.6f}  total {totals[-1]:.6f} eV", flush=True)
    write("ethanol.extxyz", atoms, append=md.nsteps > 0)


md.attach(report, interval=block)
md.run(args.steps)
print(f"the total energy varies by {1000 * np.std(totals):.2f} meV (standard deviation)")
