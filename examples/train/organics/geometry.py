"""Structures out of conformers by geometry alone: torsions, stretched bonds, thermal displacements, dimers, clusters, contacts, and
atoms as close as the teacher's repulsion reaches: bare pairs, collisions, bonds pressed together.

Every frame carries info["kind"], ["molecule"], ["scaffold"] and ["trajectory"]. Whole scaffolds are held out. Dimers and
clusters are made of molecules of one side of that split, besides those of the family SMALL, which is always trained on, and
carry the scaffold of their first member that is not SMALL: no frame to train on holds a molecule of a held-out scaffold.

Bonds are read off a conformer: two atoms closer than 1.25 times the sum of their covalent radii.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Callable

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from scipy.spatial.transform import Rotation

from mlff.train import data
from mlff.train.dynamics import Batch

ELEMENTS = ("H", "C", "N", "O", "F", "P", "S", "Cl", "Br")
SMALL = "small"  # the family of molecules that are too small to have a scaffold
SPLIT = {"validation": 0.05, "held_out": 0.1, "seed": 1}  # as in organics.yaml
TRAINING, VALIDATION, HELD_OUT = range(3)
SCAN_KINDS = ("conformer", "thermal", "torsion", "stretch", "scaled", "dimer", "contact", "cluster")
PAIRS = list(combinations_with_replacement(ELEMENTS, 2))


def side(scaffold: str) -> int:
    """TRAINING, VALIDATION or HELD_OUT, as `mlff train organics.yaml` will decide."""
    return data.side(scaffold, **SPLIT)


def bonds(atoms: Atoms) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of bonded atoms of a relaxed molecule."""
    radii = covalent_radii[atoms.numbers]
    near = atoms.get_all_distances() < 1.25 * (radii[:, None] + radii)
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(near, 1)))]


def beyond(pairs: list[tuple[int, int]], i: int, j: int) -> list[int] | None:
    """Atoms on j's side of the bond i-j, j included; None where the bond is part of a ring."""
    neighbors: dict[int, list[int]] = {}
    for a, b in pairs:
        neighbors.setdefault(a, []).append(b)
        neighbors.setdefault(b, []).append(a)
    found, todo = {j}, [k for k in neighbors[j] if k != i]
    while todo:
        k = todo.pop()
        if k == i:
            return None
        if k not in found:
            found.add(k)
            todo += neighbors[k]
    return sorted(found)


def rotatable(pairs: list[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
    """Bonds i-j outside rings whose ends both have other neighbours, and the atoms that turn with j, the smaller half."""
    count = np.bincount(np.array(pairs, dtype=int).ravel()) if pairs else []
    result = []
    for i, j in pairs:
        moving = beyond(pairs, i, j)
        if moving is not None and count[i] > 1 and count[j] > 1:
            if 2 * len(moving) > len(count):
                i, j, moving = j, i, sorted(set(range(len(count))) - set(moving))
            result.append((i, j, moving))
    return result


def turned(atoms: Atoms, i: int, j: int, moving: list[int], angle: float) -> Atoms:
    """The atoms `moving` rotated by `angle` degrees about the axis from i to j."""
    result = atoms.copy()
    axis = atoms.positions[j] - atoms.positions[i]
    rotation = Rotation.from_rotvec(np.radians(angle) * axis / np.linalg.norm(axis))
    result.positions[moving] = atoms.positions[j] + rotation.apply(atoms.positions[moving] - atoms.positions[j])
    return result


def stretched(
    atoms: Atoms, pairs: list[tuple[int, int]], rng: np.random.Generator, limits: tuple[float, float] = (0.75, 1.6)
) -> Atoms:
    """One bond at `limits` times its length; what hangs on it moves along, of a bond in a ring its two ends alone."""
    result = atoms.copy()
    i, j = pairs[rng.integers(len(pairs))]
    change = (rng.uniform(*limits) - 1.0) * (atoms.positions[j] - atoms.positions[i])
    moving = beyond(pairs, i, j)
    if moving is None:
        result.positions[j] += 0.5 * change
        result.positions[i] -= 0.5 * change
    else:
        result.positions[moving] += change
    return result


def thermal(atoms: Atoms, pairs: list[tuple[int, int]], temperature: float, rng: np.random.Generator) -> Atoms:
    """A molecule as it might look at `temperature` K: displaced along the normal modes of springs between its atoms.

    Springs of 35 eV/Angstrom^2 along bonds, 5 between neighbours of one atom, 0.3 between all others within 6 Angstrom
    keep bonds and angles stiff and torsions soft.
    """
    n = len(atoms)
    vectors = atoms.positions[:, None] - atoms.positions
    lengths = np.linalg.norm(vectors, axis=2) + np.eye(n)
    bonded = np.zeros((n, n), dtype=bool)
    for i, j in pairs:
        bonded[i, j] = bonded[j, i] = True
    springs = np.where(bonded, 35.0, np.where(bonded @ bonded, 5.0, np.where(lengths < 6.0, 0.3, 0.0)))
    np.fill_diagonal(springs, 0.0)
    blocks = -springs[:, :, None, None] * (vectors[..., :, None] * vectors[..., None, :]) / lengths[:, :, None, None] ** 2
    blocks[np.arange(n), np.arange(n)] = -blocks.sum(1)
    values, modes = np.linalg.eigh(blocks.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n))
    # what is softer, translations and rotations among it, would leave the range of a linear displacement and stretch bonds
    stiff = values > 1.0
    amplitudes = np.sqrt(8.617333e-5 * temperature / values[stiff]) * rng.normal(size=stiff.sum())
    result = atoms.copy()
    result.positions += (modes[:, stiff] @ amplitudes).reshape(n, 3)
    return result


def tumbled(positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions in a random orientation about the origin."""
    return Rotation.random(random_state=int(rng.integers(2**31))).apply(positions)


def approach(moving: np.ndarray, still: np.ndarray, direction: np.ndarray, gaps: float | np.ndarray) -> float:
    """How far positions [M, 3] must move along a unit vector so that none is closer to one of `still` [S, 3] than `gaps` [M, S]."""
    # along this line every pair of atoms is closer than its gap within one interval: stop beyond the last of them
    apart = moving[:, None] - still
    along = apart @ direction
    inside = along**2 - (apart**2).sum(2) + gaps**2
    return float((-along + np.sqrt(inside.clip(0)))[inside > 0].max(initial=0.0))


def joined(members: list[Atoms], gap: float, rng: np.random.Generator) -> Atoms:
    """Molecules in random orientations; each comes from a random direction, up to `gap` Angstrom from what is there."""
    placed, numbers = np.zeros((0, 3)), []
    for atoms in members:
        one = tumbled(atoms.positions - atoms.positions.mean(0), rng)
        if len(placed):
            direction = rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            one = one + direction * approach(one, placed, direction, gap)
        placed = np.concatenate([placed, one])
        placed -= placed.mean(0)
        numbers += list(atoms.numbers)
    return Atoms(numbers, placed)


def closest(atoms: Atoms, pairs: list[tuple[int, int]]) -> float:
    """Smallest distance in Angstrom of two atoms that are neither bonded nor bonded to a third."""
    distances = atoms.get_all_distances()
    bonded = np.eye(len(atoms), dtype=bool)
    for i, j in pairs:
        bonded[i, j] = bonded[j, i] = True
    return float(distances[~(bonded @ bonded)].min(initial=np.inf))


def flown_apart(batch: Batch) -> Callable[[Batch], torch.Tensor]:
    """A function that says which systems [B] of a batch, sound now, are no longer what they were.

    That is one with a bond longer than 1.6 times the sum of its atoms' covalent radii (a teacher of closed shells knows
    nothing of what is left), or with an atom 6 Angstrom farther from the centre than any was at the start.
    """
    pairs, limits = [], []
    for frame, first in zip(batch.frames, batch.first.tolist()):
        for i, j in bonds(frame):
            pairs.append((first + i, first + j))
            limits.append(1.6 * (covalent_radii[frame.numbers[i]] + covalent_radii[frame.numbers[j]]))
    index = torch.tensor(pairs, dtype=torch.long, device=batch.device).reshape(-1, 2)
    limit = torch.tensor(limits, dtype=torch.float64, device=batch.device)

    def extent() -> torch.Tensor:
        centre = torch.zeros(batch.size, 3, dtype=torch.float64, device=batch.device).index_add(0, batch.system, batch.positions)
        radius = (batch.positions - (centre / batch.counts[:, None])[batch.system]).norm(dim=1)
        return torch.zeros(batch.size, dtype=torch.float64, device=batch.device).scatter_reduce(0, batch.system, radius, "amax")

    largest = extent() + 6.0

    def apart(batch: Batch) -> torch.Tensor:
        long = (batch.positions[index[:, 0]] - batch.positions[index[:, 1]]).norm(dim=1) > limit
        result = extent() > largest
        result[batch.system[index[long, 0]]] = True
        return result

    return apart


def weights(molecules: list[Atoms]) -> np.ndarray:
    """Chances [F] to take a molecule: of equal atoms for all sizes, and rare elements more often than tables have them."""
    held = np.array([[symbol in atoms.symbols for symbol in ELEMENTS] for atoms in molecules])
    rarity = 1.0 / np.sqrt(held.mean(0).clip(0.16))  # at most 2.5
    chance = (held * rarity).max(1) / np.array([max(len(atoms), 8) for atoms in molecules])
    return chance / chance.sum()


class Source:
    """Conformers to draw from, all of one side.

    Attributes:
        conformers, chance: what there is, and how likely it is drawn (weights).
        partners, small: for dimers and clusters, those of at most 24 atoms, and the molecules of the family SMALL.
        holders: of each element the indices of the partners, and of the small ones, that hold it.
    """

    def __init__(self, conformers: list[Atoms], wanted: int, rng: np.random.Generator):
        self.rng = rng
        self.conformers = [atoms for atoms in conformers if side(atoms.info["scaffold"]) == wanted]
        self.chance = weights(self.conformers)
        self.small = [atoms for atoms in conformers if atoms.info["scaffold"] == SMALL]
        self.partners = [atoms for atoms in self.conformers if len(atoms) <= 24]
        self.partner_chance = weights(self.partners)
        pools = (self.partners, self.small)
        self.holders = {
            symbol: [np.array([k for k, atoms in enumerate(pool) if symbol in atoms.symbols], int) for pool in pools]
            for symbol in ELEMENTS
        }

    def one(self) -> Atoms:
        return self.conformers[self.rng.choice(len(self.conformers), p=self.chance)]

    def group(self, count: int) -> list[Atoms]:
        """Molecules for a cluster, the first of this side; each other is SMALL with a chance of 0.4."""
        chosen = [self.partners[k] for k in self.rng.choice(len(self.partners), count, p=self.partner_chance)]
        small = [self.small[k] for k in self.rng.integers(len(self.small), size=count)]
        return [chosen[0], *(s if self.rng.uniform() < 0.4 else c for c, s in zip(chosen[1:], small[1:]))]

    def with_elements(self, first: str, second: str) -> list[Atoms]:
        """Two molecules that hold these elements, the first of this side; the other is SMALL with a chance of 0.4."""
        molecules = []
        for number, symbol in enumerate((first, second)):
            of_side, small = self.holders[symbol]
            if number and len(small) and self.rng.uniform() < 0.4:
                molecules.append(self.small[self.rng.choice(small)])
            else:
                chance = self.partner_chance[of_side]
                molecules.append(self.partners[self.rng.choice(of_side, p=chance / chance.sum())])
        return molecules


def named(atoms: Atoms, kind: str, members: list[Atoms], number: int) -> Atoms:
    """A frame of these molecules with its info."""
    families = [member.info["scaffold"] for member in members]
    family = next((name for name in families if name != SMALL), SMALL)
    molecule = ".".join(member.info["molecule"] for member in members)
    atoms.info = {"kind": kind, "molecule": molecule, "scaffold": family, "trajectory": f"{kind}-{number}"}
    return atoms


def dimer(source: Source, gap: tuple[float, float], number: int, kind: str = "dimer") -> Atoms:
    """Two molecules whose closest atoms are as far apart as drawn from `gap` (Angstrom)."""
    members = source.group(2)
    moved = [thermal(atoms, bonds(atoms), 300.0, source.rng) for atoms in members]
    return named(joined(moved, source.rng.uniform(*gap), source.rng), kind, members, number)


def cluster(source: Source, number: int) -> Atoms:
    """Three to six molecules of together at most 60 atoms."""
    members: list[Atoms] = []
    for atoms in source.group(int(source.rng.integers(3, 7))):
        if sum(map(len, members)) + len(atoms) <= 60:
            members.append(atoms)
    return named(joined(members, source.rng.uniform(1.8, 3.0), source.rng), "cluster", members, number)


def scans(source: Source, counts: dict[str, int], first: int = 0) -> list[Atoms]:
    """`counts` frames of each kind; trajectories are numbered from `first`.

    conformer: as relaxed by a force field; thermal: along modes at 100 to 1000 K; stretch: one bond; scaled: the whole
    molecule at 0.9 to 1.15 times its size; torsion: one to three bonds turned, nothing closer than 1.2 Angstrom; dimer: at
    1.6 to 6 Angstrom; contact: two molecules at 0.8 to 1.8 Angstrom; cluster: three to six molecules.
    """
    frames = []
    for kind, count in counts.items():
        for number in range(first, first + count):
            if kind == "dimer":
                frames.append(dimer(source, (1.6, 6.0) if number % 2 else (1.8, 3.2), number))
            elif kind == "contact":
                frames.append(dimer(source, (0.8, 1.8), number, "contact"))
            elif kind == "cluster":
                frames.append(cluster(source, number))
            else:
                frames.append(deformed(source, kind, number))
    return frames


def deformed(source: Source, kind: str, number: int) -> Atoms:
    """A molecule of the kinds conformer, thermal, stretch, scaled and torsion (scans)."""
    rng, atoms = source.rng, source.one()
    pairs = bonds(atoms)
    if kind == "torsion":
        while not rotatable(pairs):
            atoms = source.one()
            pairs = bonds(atoms)
        axes = rotatable(pairs)
        for _ in range(10):
            moved = atoms
            for k in rng.choice(len(axes), min(len(axes), int(rng.integers(1, 4))), replace=False):
                moved = turned(moved, *axes[k], rng.uniform(0.0, 360.0))
            if closest(moved, pairs) > 1.2:
                break
        moved = thermal(moved, pairs, 200.0, rng)
    elif kind == "conformer":
        moved = atoms.copy()
    elif kind == "thermal":
        moved = thermal(atoms, pairs, rng.uniform(100.0, 1000.0), rng)
    elif kind == "stretch":
        moved = stretched(thermal(atoms, pairs, 200.0, rng), pairs, rng)
    elif kind == "scaled":
        moved = thermal(atoms, pairs, 200.0, rng)
        moved.positions *= rng.uniform(0.9, 1.15)
    else:
        raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(SCAN_KINDS)}")
    return named(moved, kind, [atoms], number)


def starts(source: Source, counts: dict[str, int], temperatures: tuple[float, float], first: int = 0) -> list[Atoms]:
    """Starting points of dynamics, `counts` of each kind (molecule, dimer, cluster), with info["temperature"] in K.

    Dimers and clusters get at most 600 K, above which they only fly apart. The kinds md-cool and md-hot are single molecules
    up to 500 K and above.
    """
    frames = []
    for kind, count in counts.items():
        for number in range(first, first + count):
            low, high = temperatures
            if kind == "molecule":
                temperature = source.rng.uniform(low, high)
                atoms = source.one()
                atoms = named(atoms.copy(), "md-cool" if temperature <= 500.0 else "md-hot", [atoms], number)
            else:
                temperature = source.rng.uniform(low, max(low, min(high, 600.0)))
                atoms = dimer(source, (1.8, 2.6), number) if kind == "dimer" else cluster(source, number)
                atoms.info.update(kind=f"md-{kind}", trajectory=f"md-{kind}-{number}")
            atoms.info["temperature"] = round(float(temperature), 1)
            frames.append(atoms)
    return frames


# ---- close atoms -------------------------------------------------------------------------------------------------------


def pair(symbols: tuple[str, str], distance: float) -> Atoms:
    """Two bare atoms in open space, `distance` Angstrom apart.

    Models are of closed shells, and an odd number of electrons is refused: of such atoms there are two pairs, far from each other.
    """
    atoms = Atoms(symbols, [[0.0, 0.0, 0.0], [0.0, 0.0, distance]])
    if atoms.numbers.sum() % 2:
        other = atoms.copy()
        other.positions[:, 0] += 20.0
        atoms += other
    return atoms


def wall(distances: np.ndarray, forces: np.ndarray, trusted: np.ndarray) -> float:
    """The shortest of `distances` (ascending) down to which the repulsion of two bare atoms only grows, and all labels are trusted.

    Their force (eV/Angstrom, positive: apart) is followed inwards from where it exceeds 5 eV/Angstrom. Where it grows no more, its
    largest value is within one step on either side: the next distance is taken.
    """
    k = np.flatnonzero(forces > 5.0)[-1]
    while k > 0 and trusted[k - 1] and forces[k - 1] > forces[k]:
        k -= 1
    return float(distances[k + 1])


def closeness(atoms: Atoms, walls: np.ndarray) -> float:
    """The smallest distance of two atoms in terms of that of their elements in `walls` [Z, Z] (Angstrom)."""
    i, j = np.triu_indices(len(atoms), 1)
    lengths = np.linalg.norm(atoms.positions[i] - atoms.positions[j], axis=1)
    return float((lengths / walls[atoms.numbers[i], atoms.numbers[j]]).min(initial=np.inf))


def walls_of(frames: list[Atoms]) -> np.ndarray:
    """The shortest distance of every two elements among the frames of the kind pair, Angstrom [Z, Z]; NaN where there is none."""
    walls = np.full((36, 36), np.nan)
    for atoms in frames:
        if atoms.info["kind"] == "pair":
            i, j = atoms.numbers[:2]
            walls[i, j] = walls[j, i] = np.fmin(walls[i, j], atoms.get_distance(0, 1))
    return walls


def has_hole(atoms: Atoms, forces: np.ndarray, walls: np.ndarray) -> bool:
    """Whether atoms within 1.15 times `walls`, which is closer than any bond, are pushed apart by less than 10 eV/Angstrom.

    Alone with each other they are pushed by more; there a teacher takes them for something else than what they are.
    """
    i, j = np.triu_indices(len(atoms), 1)
    vectors = atoms.positions[j] - atoms.positions[i]
    lengths = np.linalg.norm(vectors, axis=1)
    apart = 0.5 * ((forces[j] - forces[i]) * vectors).sum(1) / lengths
    return bool(((lengths < 1.15 * walls[atoms.numbers[i], atoms.numbers[j]]) & (apart < 10.0)).any())


def bare_pairs(walls: np.ndarray, count: int, rng: np.random.Generator) -> list[Atoms]:
    """`count` pairs of every two elements, from their distance in `walls` to 5.5 Angstrom, most of them close.

    They have no scaffold. As SMALL they are trained on: every model needs them, and none is judged by them.
    """
    frames = []
    for symbols in PAIRS:
        first = walls[tuple(atomic_numbers[symbol] for symbol in symbols)]
        for share in [0.0, *(np.arange(1, count) + rng.uniform(-0.5, 0.5, count - 1)) / count]:
            atoms = pair(symbols, first + (5.5 - first) * share**2)
            name = ".".join(f"[{symbol}]" for symbol in symbols)
            atoms.info = {"kind": "pair", "molecule": name, "scaffold": SMALL, "trajectory": f"pair-{'-'.join(symbols)}"}
            frames.append(atoms)
    return frames


def collision(source: Source, symbols: tuple[str, str], walls: np.ndarray, number: int) -> Atoms:
    """Two molecules whose closest atoms, in terms of `walls`, are at 1 to 2.1 of it: atoms of these elements, if there is a way.

    Of 30 random orientations, with the two atoms ahead, it is the first in which they are the closest, or comes nearest to that.
    """
    rng = source.rng
    members = source.with_elements(*symbols)
    moved = [thermal(atoms, bonds(atoms), 300.0, rng) for atoms in members]
    centred = [m.positions - m.positions[rng.choice(np.flatnonzero(m.symbols == symbol))] for m, symbol in zip(moved, symbols)]
    wanted = rng.uniform(1.0, 2.1)
    gaps = wanted * walls[moved[1].numbers[:, None], moved[0].numbers]
    least = wanted * walls[tuple(atomic_numbers[symbol] for symbol in symbols)]
    direction, best = np.array([0.0, 0.0, 1.0]), (np.inf, np.zeros((0, 3)))
    for _ in range(30):
        still, moving = (tumbled(positions, rng) for positions in centred)
        way = approach(moving, still, direction, gaps)
        if way < best[0]:
            best = (way, np.concatenate([still, moving + way * direction]))
        if way < least + 1e-6:
            break
    return named(Atoms([*moved[0].numbers, *moved[1].numbers], best[1]), "collision", members, number)


def pressed(source: Source, walls: np.ndarray, number: int) -> Atoms:
    """A molecule with a bond, of any two elements alike, at 0.65 to 0.9 of its length, and no atoms closer than `walls`."""
    rng = source.rng
    while True:
        atoms = source.one()
        pairs = bonds(atoms)
        kinds = [tuple(sorted(atoms.numbers[[i, j]])) for i, j in pairs]
        chosen = sorted(set(kinds))[rng.integers(len(set(kinds)))]
        some = [bond for bond, kind in zip(pairs, kinds) if kind == chosen]
        moved = stretched(thermal(atoms, pairs, 200.0, rng), some, rng, (0.65, 0.9))
        if closeness(moved, walls) >= 1.0:
            return named(moved, "pressed", [atoms], number)


def pushed(source: Source, counts: dict[str, int], walls: np.ndarray, first: int = 0) -> list[Atoms]:
    """`counts` frames of the kinds collision, of every two elements that there are alike, and pressed, none closer than `walls`."""
    known = [symbols for symbols in PAIRS if all(len(source.holders[symbol][0]) for symbol in symbols)]
    frames = []
    for number in range(first, first + counts.get("collision", 0)):
        symbols = known[number % len(known)]
        frames.append(collision(source, symbols if source.rng.uniform() < 0.5 else symbols[::-1], walls, number))
    return frames + [pressed(source, walls, number) for number in range(first, first + counts.get("pressed", 0))]
