"""Structures of several trajectories and a teacher that is always there, for the tests of labels and training."""

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from structures import ethanol, water_box, water_dimer

from mlff.train.teachers import Teacher, load_teacher


def lennard_jones() -> Teacher:
    return load_teacher("ase.calculators.lj:LennardJones", sigma=1.0, epsilon=0.01, rc=4.0)


def sampled() -> list:
    """24 small frames of 12 trajectories, and a box."""
    rng, frames = np.random.default_rng(0), []
    for k in range(24):
        atoms = (ethanol() if k % 2 else water_dimer()).copy()
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        atoms.info = {"kind": "ethanol" if k % 2 else "water", "trajectory": f"run-{k // 2}"}
        frames.append(atoms)
    box = water_box(2)
    box.info = {"kind": "box", "trajectory": "box"}
    return [*frames, box]


def with_labels(atoms: Atoms, **labels) -> Atoms:
    atoms = atoms.copy()
    atoms.info["trajectory"] = "a"
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms
