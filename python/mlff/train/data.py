"""Labelled structures as batches of graphs.

Files are extxyz with the teacher's energy, forces and stress (see mlff.train.label); every frame names its kind and
the trajectory it was taken from (info["kind"], info["trajectory"]). Frames of one trajectory look alike, so a split
into training and held-out data keeps trajectories whole.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from torch import Tensor

from ..neighbors import find_neighbors


@dataclass
class Graphs:
    """One or several structures as one graph. B structures, N atoms, E directed edges.

    Atoms and edges are counted per structure in n_atoms [B] and n_edges [B]; `structure` [N] is the owner of an atom.
    """

    atomic_numbers: Tensor  # [N] int64
    edges: Tensor  # [2, E] int64, row 0 the destination i, row 1 the source j
    edge_vectors: Tensor  # [E, 3] float64, x_j + shift - x_i in Angstrom
    structure: Tensor  # [N] int64
    edge_structure: Tensor  # [E] int64
    n_atoms: Tensor  # [B] int64
    volume: Tensor  # [B] float64, Angstrom^3; 1 where there is no stress
    energy: Tensor  # [B] float64, eV
    forces: Tensor  # [N, 3] float64, eV/Angstrom
    stress: Tensor  # [B, 3, 3] float64, eV/Angstrom^3, ASE's sign (positive under tension)
    has_stress: Tensor  # [B] bool
    index: Tensor  # [B] int64, position in the list that was read

    def to(self, device: str | torch.device) -> Graphs:
        return Graphs(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def graph(atoms: Atoms, cutoff: float, index: int = 0) -> Graphs:
    """Neighbours of every atom within `cutoff` Angstrom, periodic images included, and the labels."""
    if atoms.calc is None:
        raise ValueError(f"frame {index} ({atoms.get_chemical_formula()}) has no labels: run mlff.train.label first")
    periodic = bool(atoms.pbc.all())  # a stress is defined for a volume only
    edges, _, vectors = find_neighbors(atoms.positions, cutoff, atoms.cell.array, atoms.pbc)
    n = len(atoms)
    stress = atoms.get_stress(voigt=False) if periodic else np.zeros((3, 3))
    return Graphs(
        atomic_numbers=torch.tensor(atoms.numbers, dtype=torch.long),
        edges=edges,
        edge_vectors=vectors,
        structure=torch.zeros(n, dtype=torch.long),
        edge_structure=torch.zeros(edges.shape[1], dtype=torch.long),
        n_atoms=torch.tensor([n]),
        volume=torch.tensor([atoms.get_volume() if periodic else 1.0], dtype=torch.float64),
        energy=torch.tensor([atoms.get_potential_energy()], dtype=torch.float64),
        forces=torch.tensor(atoms.get_forces()),
        stress=torch.tensor(stress)[None],
        has_stress=torch.tensor([periodic]),
        index=torch.tensor([index]),
    )


def collate(graphs: list[Graphs]) -> Graphs:
    """One graph out of many, on the device where they are."""
    parts = {f.name: [getattr(g, f.name) for g in graphs] for f in fields(Graphs)}
    first_atom = np.cumsum([0] + [len(g.atomic_numbers) for g in graphs])
    first_structure = np.cumsum([0] + [len(g.n_atoms) for g in graphs])
    parts["edges"] = [e + int(o) for e, o in zip(parts["edges"], first_atom)]
    for name in ("structure", "edge_structure"):
        parts[name] = [s + int(o) for s, o in zip(parts[name], first_structure)]
    return Graphs(**{name: torch.cat(part, dim=1 if name == "edges" else 0) for name, part in parts.items()})


def batches(graphs: list[Graphs], max_edges: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """Indices of graphs, grouped so that a batch holds at most `max_edges` edges (and at least one graph).

    Structures differ a hundredfold in size: batches of equal work, not of equal count, use a GPU evenly.
    With a generator the order is random.
    """
    order = torch.randperm(len(graphs), generator=generator).tolist() if generator else range(len(graphs))
    result, edges = [[]], 0
    for k in order:
        count = graphs[k].edges.shape[1]
        if result[-1] and edges + count > max_edges:
            result.append([])
            edges = 0
        result[-1].append(k)
        edges += count
    return result


def read_frames(paths: list[Path]) -> list[Atoms]:
    """All frames of some labelled files, each with its kind and trajectory."""
    frames = []
    for path in paths:
        for atoms in read(path, ":"):
            for key in ("kind", "trajectory"):
                if key not in atoms.info:
                    raise ValueError(f"{path}: expected info[{key!r}] in every frame, got {sorted(atoms.info)}")
            frames.append(atoms)
    return frames


def split(frames: list[Atoms], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and of held-out frames: whole trajectories, about a share `held_out` of them.

    A hash of seed and name decides, so a trajectory stays on its side when more data are added: a student that goes
    on from an earlier one has not seen its held-out frames either.
    """
    sides: tuple[list[int], list[int]] = ([], [])
    for k, atoms in enumerate(frames):
        digest = hashlib.sha256(f"{seed}/{atoms.info['trajectory']}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(k)
    return sides


def element_shifts(frames: list[Atoms], atomic_numbers: list[int]) -> Tensor:
    """Energy shift per element [S] in eV, float64: least squares of the total energies on the composition.

    Where compositions leave a freedom (molecules of the same few formulas do) this is the solution of smallest norm;
    only sums that occur in the data have a meaning, as with any relative energy.
    """
    counts = np.array([[np.sum(atoms.numbers == z) for z in atomic_numbers] for atoms in frames], dtype=float)
    energies = np.array([atoms.get_potential_energy() for atoms in frames])
    sizes = counts.sum(1)
    if not np.array_equal(sizes, [len(atoms) for atoms in frames]):
        found = sorted({int(z) for atoms in frames for z in atoms.numbers})
        raise ValueError(f"expected only atomic numbers {atomic_numbers} in the data, got {found}")
    return torch.tensor(np.linalg.lstsq(counts / sizes[:, None], energies / sizes, rcond=1e-10)[0])


def sha256(paths: list[Path]) -> str:
    """SHA-256 over the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()
