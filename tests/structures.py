"""The one factory of structures: every test takes its atoms from here. Elements H, C, O; everything is deterministic.

Distances are chosen for models with a cutoff of 5 Angstrom (reference.py), which decides what is "far" and "small".
"""

from typing import Callable, Dict, List

import numpy as np
from ase import Atoms
from ase.build import molecule
from scipy.spatial.transform import Rotation

WATER_BOX_LENGTH = 12.42  # Angstrom: 64 molecules at 0.9982 g/cm^3


def _turned(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """In a random orientation about the centre of mass, which becomes the origin."""
    turned = atoms.copy()
    turned.positions = Rotation.random(random_state=int(rng.integers(2**31))).apply(atoms.positions - atoms.get_center_of_mass())
    return turned


def _on_lattice(counts, cell, molecules: List[Atoms], seed: int) -> Atoms:
    """Randomly turned molecules on the sites of a lattice of counts[0] x counts[1] x counts[2] sites in a periodic cell."""
    rng = np.random.default_rng(seed)
    box = Atoms(cell=cell, pbc=True)
    for index, site in enumerate(np.ndindex(*counts)):
        one = _turned(molecules[index % len(molecules)], rng)
        one.positions += (np.array(site) + 0.5) / np.array(counts) @ box.cell.array
        box += one
    return box


def ethanol() -> Atoms:
    """One molecule with open boundaries, off its minimum so that no force vanishes."""
    atoms = molecule("CH3CH2OH")
    atoms.positions += np.random.default_rng(1).normal(0, 0.05, (len(atoms), 3))
    return atoms


def water_dimer() -> Atoms:
    atoms = _on_lattice((2, 1, 1), [5.8, 3, 3], [molecule("H2O")], seed=2)
    return Atoms(atoms.numbers, atoms.positions)


def water_box(n: int = 4) -> Atoms:
    """n^3 molecules (64 by default) at the density of the liquid."""
    return _on_lattice((n, n, n), np.eye(3) * WATER_BOX_LENGTH * n / 4, [molecule("H2O")], seed=3)


def triclinic() -> Atoms:
    """Water and methanol in a tilted cell, every height larger than 6 Angstrom."""
    cell = [[7.6, 0.0, 0.0], [2.4, 7.4, 0.0], [-1.7, 2.1, 7.9]]
    return _on_lattice((2, 2, 2), cell, [molecule("H2O"), molecule("CH3OH"), molecule("H2O")], seed=4)


def mixed_elements() -> Atoms:
    """Ethanol, carbon dioxide, methane and water in one open cluster."""
    names = ("CH3CH2OH", "CO2", "CH4", "H2O")
    atoms = _on_lattice((2, 2, 1), [11.0, 11.0, 6.0], [molecule(x) for x in names], seed=5)
    return Atoms(atoms.numbers, atoms.positions)


def isolated_atom() -> Atoms:
    """A water molecule and, beyond the cutoff of every other atom, one carbon atom without a neighbour."""
    return molecule("H2O") + Atoms("C", positions=[[30.0, 0.0, 0.0]])


def single_atom() -> Atoms:
    return Atoms("O", positions=[[0.3, -0.2, 0.1]])


def no_atoms() -> Atoms:
    return Atoms()


def far_fragments() -> Atoms:
    """Ethanol and a water dimer, 40 Angstrom apart: the energies add."""
    far = water_dimer()
    far.positions += [40.0, 0.0, 0.0]
    return ethanol() + far


def small_cell() -> Atoms:
    """One water molecule in a tilted cell smaller than the cutoff: neighbours are images, of the atom itself too."""
    return _on_lattice((1, 1, 1), [[3.1, 0.0, 0.0], [0.7, 3.0, 0.0], [-0.6, 0.5, 3.3]], [molecule("H2O")], seed=6)


def slab() -> Atoms:
    """Water, periodic in x and y only; the third cell vector means nothing."""
    atoms = _on_lattice((3, 3, 1), [9.3, 9.3, 3.1], [molecule("H2O")], seed=7)
    atoms.set_cell([9.3, 9.3, 20.0])
    atoms.pbc = [True, True, False]
    return atoms


def wire() -> Atoms:
    """Water, periodic in z only, without any other cell vector."""
    atoms = _on_lattice((1, 2, 2), [3.1, 6.2, 6.2], [molecule("H2O")], seed=8)
    atoms.set_cell([[0, 0, 0], [0, 0, 0], [0, 0, 6.2]])
    atoms.pbc = [False, False, True]
    return atoms


def on_faces() -> Atoms:
    """Atoms exactly on faces, edges and corners of the cell."""
    cell = np.diag([8.0, 8.0, 8.0])
    sites = np.array([[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0.5], [0.5, 0.5, 0], [0.25, 1.0, 1.0], [1.0, 0.25, 0.5], [0.5, 0.5, 0.5]])
    return Atoms("OHCOHCO", positions=sites @ cell, cell=cell, pbc=True)


def outside_cell() -> Atoms:
    """The triclinic cell with atoms moved by whole cell vectors, up to three cells away: the same physics."""
    atoms = triclinic()
    atoms.positions += np.random.default_rng(9).integers(-3, 4, (len(atoms), 3)) @ atoms.cell.array
    return atoms


def dense_cluster() -> Atoms:
    """120 atoms with open boundaries, most of them with far more than 32 neighbours."""
    rng = np.random.default_rng(10)
    sites = np.array(list(np.ndindex(5, 5, 5)))[:120]
    return Atoms([1, 6, 8] * 40, positions=sites * 2.0 + rng.normal(0, 0.05, (120, 3)))


def pressed() -> Atoms:
    """Ethanol at 0.85 of its size: its bonds lie where the network of a random model (reference.py) is being switched off."""
    atoms = ethanol()
    atoms.positions *= 0.85
    return atoms


STRUCTURES: Dict[str, Callable[[], Atoms]] = {
    f.__name__: f
    for f in (
        ethanol,
        water_dimer,
        water_box,
        triclinic,
        mixed_elements,
        isolated_atom,
        single_atom,
        far_fragments,
        small_cell,
        slab,
        wire,
        on_faces,
        outside_cell,
        dense_cluster,
        pressed,
    )
}
"""Every structure with at least one atom, by name."""


def structure(name: str) -> Atoms:
    return STRUCTURES[name]()
