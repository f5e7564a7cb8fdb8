"""Starting structures for the sampling: boxes, gas-phase molecules, clusters, and pairs at all distances.

Every frame carries info["kind"] and info["trajectory"]: frames of one trajectory stay on one side of the split
into training and validation data.
"""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.data import chemical_symbols
from scipy.spatial.transform import Rotation

WATER, ETHANOL = molecule("H2O"), molecule("CH3CH2OH")
MASS = {"water": 18.015, "ethanol": 46.069}  # g/mol
# Torsions of ethanol: atom order of ASE's g2 molecule is C C O H(O) H H H H H.
HYDROXYL, METHYL = (0, 1, 2, 3), (2, 1, 0, 6)


def turned(atoms: Atoms, rng: np.random.Generator) -> np.ndarray:
    """Positions about the centre of mass, in a random orientation."""
    return Rotation.random(random_state=int(rng.integers(2**31))).apply(atoms.positions - atoms.get_center_of_mass())


def ethanol(rng: np.random.Generator) -> Atoms:
    """Ethanol with random torsions of the hydroxyl and the methyl group, bonds and angles slightly off."""
    atoms = ETHANOL.copy()
    atoms.set_dihedral(*HYDROXYL, rng.uniform(0, 360), indices=[3])
    methyl = [i for i in range(len(atoms)) if atoms.symbols[i] == "H" and atoms.get_distance(0, i) < 1.3]
    atoms.rotate_dihedral(2, 1, 0, methyl[0], rng.uniform(0, 120), indices=methyl)
    atoms.positions += rng.normal(0, 0.02, (len(atoms), 3))
    return atoms


def water(rng: np.random.Generator) -> Atoms:
    atoms = WATER.copy()
    atoms.positions += rng.normal(0, 0.02, (3, 3))
    return atoms


def box(n_water: int, n_ethanol: int, density: float, rng: np.random.Generator) -> Atoms:
    """A cubic box of randomly turned molecules on the sites of a lattice. `density` in g/cm^3.

    Ethanol takes the place of several waters: molecules are placed largest first, each at the free one of many
    random points that is farthest from what is there already.
    """
    mass = n_water * MASS["water"] + n_ethanol * MASS["ethanol"]
    length = (mass / (0.602214 * density)) ** (1 / 3)
    placed = np.zeros((0, 3))
    numbers: list[int] = []
    for name in ["ethanol"] * n_ethanol + ["water"] * n_water:
        best, best_gap = None, -1.0
        for _ in range(60 if name == "water" else 30):
            one = ethanol(rng) if name == "ethanol" else water(rng)
            trial = turned(one, rng) + rng.uniform(0, length, 3)
            if len(placed) == 0:
                best = trial
                break
            delta = placed[None] - trial[:, None]
            gap = np.linalg.norm(delta - length * np.round(delta / length), axis=2).min()
            if gap > best_gap:
                best, best_gap = trial, gap
        placed = np.concatenate([placed, best])
        numbers += list(one.numbers)
    return Atoms(numbers, placed, cell=[length] * 3, pbc=True)


def cluster(n_water: int, n_ethanol: int, rng: np.random.Generator) -> Atoms:
    """Molecules close together in vacuum."""
    atoms = box(n_water, n_ethanol, 0.5, rng)
    atoms.pbc = False
    atoms.cell = None
    return atoms


def pair(first: Atoms, second: Atoms, gap: float, rng: np.random.Generator) -> Atoms:
    """Two molecules in random orientations whose closest atoms are `gap` Angstrom apart."""
    a, b = turned(first, rng), turned(second, rng)
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    near, far = 0.0, gap + 12.0
    for _ in range(40):  # bisection: the gap grows with the distance once the molecules are apart
        middle = 0.5 * (near + far)
        distance = np.linalg.norm(a[:, None] - (b + middle * direction)[None], axis=2).min()
        near, far = (middle, far) if distance < gap else (near, middle)
    return Atoms(np.concatenate([first.numbers, second.numbers]), np.concatenate([a, b + far * direction]))


def stretched(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """One bond of a molecule stretched or compressed by up to 60 % and 20 %; what hangs on it moves along."""
    result = atoms.copy()
    distances = result.get_all_distances()
    heavy = [(i, j) for i in range(len(result)) for j in range(len(result)) if i < j and distances[i, j] < 1.65]
    bonds = [(i, j) for i, j in heavy if not (result.numbers[i] == result.numbers[j] == 1)]
    i, j = bonds[rng.integers(len(bonds))]
    graph = {k: [b if a == k else a for a, b in bonds if k in (a, b)] for k in range(len(result))}
    side, todo = {j}, [j]
    while todo:
        for k in graph[todo.pop()]:
            if k not in side and k != i:
                side.add(k)
                todo.append(k)
    axis = result.positions[j] - result.positions[i]
    result.positions[list(side)] += axis * rng.uniform(-0.2, 0.6)
    return result


def strained(atoms: Atoms, amount: float, rng: np.random.Generator) -> Atoms:
    """The whole box, molecules included, under a random strain (shear included): shows the student all six stresses."""
    strain = rng.normal(0, amount, (3, 3))
    result = atoms.copy()
    result.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (strain + strain.T)), scale_atoms=True)
    return result


def scans(rng: np.random.Generator, n: int) -> list[Atoms]:
    """Structures made by geometry alone, n of each sort: pairs at all distances, stretched bonds, torsions."""
    frames = []

    def add(kind: str, index: int, atoms: Atoms) -> None:
        atoms.info.update(kind=kind, trajectory=f"{kind}-{index}")
        frames.append(atoms)

    makers = {"water": water, "ethanol": ethanol}
    for names in (("water", "water"), ("water", "ethanol"), ("ethanol", "ethanol")):
        for k in range(n):
            # half of the pairs are close contacts (1.1 to 2.4 A), the others reach beyond the student's cutoff
            gap = rng.uniform(1.1, 2.4) if k % 2 else rng.uniform(2.0, 6.5)
            add("pair-" + "-".join(names), k, pair(makers[names[0]](rng), makers[names[1]](rng), gap, rng))
    for k in range(n):
        add("stretch-ethanol", k, stretched(ethanol(rng), rng))
        add("torsion-ethanol", k, ethanol(rng))
        if k % 2:
            add("stretch-water", k, stretched(water(rng), rng))
            bent = WATER.copy()
            bent.positions += rng.normal(0, 0.08, (3, 3))
            add("distort-water", k, bent)
    return frames


def trajectories(rng: np.random.Generator, copies: int = 1) -> list[tuple[Atoms, float]]:
    """Starting points of molecular dynamics and their temperatures in K."""
    starts = []

    def add(kind: str, atoms: Atoms, temperature: float) -> None:
        atoms.info.update(kind=kind, trajectory=f"{kind}-{len(starts)}")
        starts.append((atoms, temperature))

    for _ in range(copies):
        for density in (0.90, 0.95, 1.0, 1.05, 1.10):
            for temperature in (260.0, 330.0, 450.0):
                add("water64", box(64, 0, density * rng.uniform(0.98, 1.02), rng), temperature * rng.uniform(0.95, 1.1))
        for k in range(10):
            add("ethanol1-water", box(40 + 2 * k, 1, rng.uniform(0.88, 1.08), rng), rng.uniform(270, 450))
        for k in range(5):
            add("mixture", box(32 - 3 * k, 3 + k, rng.uniform(0.80, 1.0), rng), rng.uniform(270, 420))
        for k in range(5):
            add("ethanol-liquid", box(0, 9 + k, rng.uniform(0.70, 0.86), rng), rng.uniform(260, 400))
        for k in range(20):
            add("ethanol-gas", ethanol(rng), 300.0 + 500.0 * k / 19)
        for k in range(6):
            add("water-gas", water(rng), 300.0 + 700.0 * k / 5)
        for k in range(30):
            n_ethanol = int(rng.integers(0, 3))
            n_water = int(rng.integers(max(0, 2 - n_ethanol), 7))
            add("cluster", cluster(n_water, n_ethanol, rng), rng.uniform(150, 450))
    return starts


def describe(frames: list[Atoms]) -> dict[str, int]:
    """Number of frames of each kind."""
    kinds = [atoms.info["kind"] for atoms in frames]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def formula(atoms: Atoms) -> str:
    counts = np.bincount(atoms.numbers)
    return "".join(f"{chemical_symbols[z]}{n}" for z, n in enumerate(counts) if n)
