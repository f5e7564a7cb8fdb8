"""Calculators with known answers, and jobs of mlff validate over them."""

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones

from mlff.validate import Settings
from mlff.validate.measurement import Job

QUICK = Settings(quick=True)


class Spring(Calculator):
    """Harmonic bonds between the first atom and every other, of constant k eV/Angstrom^2 and length r0."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, k=20.0, r0=1.0):
        super().__init__()
        self.k, self.r0 = k, r0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        bonds = self.atoms.positions[1:] - self.atoms.positions[0]
        r = np.linalg.norm(bonds, axis=1)[:, None]
        forces = -self.k * (r - self.r0) * bonds / r
        self.results = {"energy": float(self.k / 2 * ((r - self.r0) ** 2).sum()), "forces": np.vstack([-forces.sum(0), forces])}


class Broken(LennardJones):
    """Forces that are not a number."""

    def calculate(self, *arguments, **keywords):
        super().calculate(*arguments, **keywords)
        self.results["forces"] = self.results["forces"] * np.nan


def argon():
    return LennardJones(sigma=3.4, epsilon=0.0104, rc=13.6, ro=10.0, smooth=True)


def job(calculator, *species, **keywords):
    return Job(calculator, list(species), QUICK, **keywords)
