"""Many small structures in one compact file, a tenth of the size of extxyz: NumPy's npz (examples/train).

    sizes [F], numbers [N], positions [N, 3] in 0.001 Angstrom, those of KEYS that all frames have as indices [F] into lists of
    names, temperature [F] in K (0 where there is none), cells [F, 3, 3] in Angstrom if any frame is periodic (0 of one that is not)
    labels, where all have them: energy [F] in eV, forces [N, 3] in 0.0001 eV/Angstrom, force_spread [N] in eV/Angstrom,
    stress [F, 6] in eV/Angstrom^3, ASE's order and sign (NaN of a frame that has none)

Positions are rounded before a teacher sees them, so labels belong to exactly what is stored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ..files import replacing

KEYS = ("kind", "molecule", "scaffold", "trajectory")
LENGTH, FORCE = 1e-3, 1e-4  # Angstrom, eV/Angstrom


def save(path: Path, frames: list[Atoms]) -> None:
    """Write frames with what they have of info[KEYS] and, if all have them, labels.

    Raises ValueError for positions that are not within 32 Angstrom of the origin, for labels of positions that were not rounded
    before, and for a frame with only some periodic directions.
    """
    positions = np.concatenate([np.zeros((0, 3)), *(atoms.positions for atoms in frames)])
    if not np.abs(positions).max(initial=0.0) < 32.0:
        raise ValueError(f"{path}: expected positions within 32 Angstrom of the origin, got {np.abs(positions).max():g}")
    for k, atoms in enumerate(frames):
        if atoms.pbc.any() and not atoms.pbc.all():
            raise ValueError(f"{path}: expected three periodic directions or none, got pbc {atoms.pbc.tolist()} in frame {k}")
    arrays = {
        "sizes": np.array([len(atoms) for atoms in frames], dtype=np.uint16),
        "numbers": np.concatenate([np.zeros(0), *(atoms.numbers for atoms in frames)]).astype(np.uint8),
        "positions": np.round(positions / LENGTH).astype(np.int16),
        "temperature": np.array([atoms.info.get("temperature", 0.0) for atoms in frames], dtype=np.float32),
    }
    if any(atoms.pbc.all() for atoms in frames):
        arrays["cells"] = np.array([atoms.cell.array if atoms.pbc.all() else np.zeros((3, 3)) for atoms in frames])
    for key in KEYS:
        if all(key in atoms.info for atoms in frames):
            names, index = np.unique([str(atoms.info[key]) for atoms in frames], return_inverse=True)
            arrays[f"{key}_names"], arrays[key] = np.array("\n".join(names)), index.astype(np.uint32)
    if frames and all(atoms.calc is not None for atoms in frames):
        # a bond that is 0.0005 Angstrom longer pulls with 20 meV/Angstrom, as much as a good student's error
        if not np.abs(positions - arrays["positions"] * LENGTH).max(initial=0.0) < LENGTH / 100:
            raise ValueError(
                f"{path}: expected labels of positions in steps of {LENGTH} Angstrom; round them (rounded) and label again"
            )
        results = [atoms.calc.results for atoms in frames]
        arrays["energy"] = np.array([r["energy"] for r in results])
        arrays["forces"] = np.round(np.concatenate([r["forces"] for r in results]) / FORCE).astype(np.int32)
        if any("stress" in r for r in results):
            arrays["stress"] = np.array([r.get("stress", np.full(6, np.nan)) for r in results])
        if all("force_spread" in atoms.arrays for atoms in frames):
            arrays["force_spread"] = np.concatenate([atoms.arrays["force_spread"] for atoms in frames]).astype(np.float16)
    with replacing(path) as unfinished, open(unfinished, "wb") as f:
        np.savez_compressed(f, **arrays)


def load(path: Path) -> list[Atoms]:
    """The frames of a file, with their labels."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    first = np.concatenate([[0], np.cumsum(arrays["sizes"], dtype=int)])
    names = {key: str(arrays[f"{key}_names"]).split("\n") for key in KEYS if key in arrays}
    frames = []
    for k, (a, b) in enumerate(zip(first[:-1], first[1:])):
        atoms = Atoms(arrays["numbers"][a:b], arrays["positions"][a:b] * LENGTH)
        if "cells" in arrays and arrays["cells"][k].any():
            atoms.cell, atoms.pbc = arrays["cells"][k], True
        atoms.info = {key: names[key][arrays[key][k]] for key in names}
        if arrays["temperature"][k]:
            atoms.info["temperature"] = float(arrays["temperature"][k])
        if "force_spread" in arrays:
            atoms.arrays["force_spread"] = arrays["force_spread"][a:b].astype(float)
        if "energy" in arrays:
            labels = {"energy": float(arrays["energy"][k]), "forces": arrays["forces"][a:b] * FORCE}
            if "stress" in arrays and np.isfinite(arrays["stress"][k]).all():
                labels["stress"] = arrays["stress"][k]
            atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    return frames


def rounded(atoms: Atoms) -> Atoms:
    """A copy about its centre with the positions that a file keeps."""
    copy = atoms.copy()
    copy.positions = np.round((atoms.positions - atoms.positions.mean(0)) / LENGTH) * LENGTH
    return copy
