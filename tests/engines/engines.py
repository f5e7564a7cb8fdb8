"""Every engine behind one interface: structures in, results in eV and Angstrom out. test_parity.py compares them all.

To add an engine, write a function ``run(model_file, structures, folder)`` and add it to ENGINES. Names that end with "-cuda" or
"-CUDA" need a GPU and a model file with code for it.
"""

import importlib.util
from pathlib import Path
from typing import Callable, Dict, NamedTuple, Optional, Tuple

import lammps_run
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.stress import voigt_6_to_full_3x3_stress

from mlff import units


class Measured(NamedTuple):
    """What an engine gives; None for what it does not.

    energy in eV, forces [N, 3] in eV/Angstrom, energies [N] in eV, virial [3, 3] in eV, edges as (edges [2, E], vectors [E, 3]).
    """

    energy: float
    forces: np.ndarray
    energies: Optional[np.ndarray] = None
    virial: Optional[np.ndarray] = None
    edges: Optional[tuple] = None


Results = Dict[str, Measured]


class Engine(NamedTuple):
    """An engine.

    run: evaluates structures.
    cannot: why the engine cannot express a structure, or None.
    require: skips the test where the engine is not installed.
    only: names of the structures to run, where all would take too long.
    """

    run: Callable[[Path, Dict[str, Atoms], Path], Results]
    cannot: Callable[[Atoms], Optional[str]] = lambda atoms: None
    require: Callable[[], None] = lambda: None
    only: Optional[Tuple[str, ...]] = None


def full(virial) -> np.ndarray:
    """[3, 3] from xx, yy, zz, xy, xz, yz."""
    xx, yy, zz, xy, xz, yz = virial
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def core(device: str) -> Engine:
    def run(model_file: Path, structures: Dict[str, Atoms], folder: Path) -> Results:
        from mlff.core import Model, System

        model, results = Model(model_file), {}
        for name, atoms in structures.items():
            system = System(model, device, threads=1)
            system.set_atoms(atoms.numbers)
            r = system.compute(atoms.positions, atoms.cell.array, atoms.pbc, ("energy", "atom_energy", "forces", "virial"))
            i, j, vectors = system.edges()
            results[name] = Measured(r["energy"], r["forces"], r["atom_energy"], full(r["virial"]), ([i, j], vectors))
        return results

    return Engine(run)


def ase(device: str) -> Engine:
    def run(model_file: Path, structures: Dict[str, Atoms], folder: Path) -> Results:
        from mlff.ase import MLFFCalculator

        results = {}
        for name, atoms in structures.items():
            atoms = atoms.copy()
            atoms.calc = MLFFCalculator(model_file, device, threads=1)
            try:
                virial = -voigt_6_to_full_3x3_stress(atoms.get_stress()) * atoms.get_volume()
            except PropertyNotImplementedError:
                virial = None
            results[name] = Measured(atoms.get_potential_energy(), atoms.get_forces(), atoms.get_potential_energies(), virial)
        return results

    return Engine(run)


def ase_batch(device: str) -> Engine:
    """All structures at once, in two calls: results of atoms, and stresses."""

    def run(model_file: Path, structures: Dict[str, Atoms], folder: Path) -> Results:
        from mlff.ase import MLFFCalculator

        calculator = MLFFCalculator(model_file, device, threads=1)
        batch = calculator.calculate_batch(list(structures.values()), ("energy", "energies", "forces"))
        stresses = calculator.calculate_batch(list(structures.values()))  # by default of those that have one
        results = {}
        for (name, atoms), r, s in zip(structures.items(), batch, stresses):
            virial = -voigt_6_to_full_3x3_stress(s["stress"]) * atoms.get_volume() if "stress" in s else None
            results[name] = Measured(r["energy"], r["forces"], r["energies"], virial)
        return results

    return Engine(run)


def _one_kind_of_boundary(atoms: Atoms) -> Optional[str]:
    return "has one flag for all three periodic directions" if atoms.pbc.any() and not atoms.pbc.all() else None


def torch_module(portable: bool, device: str = "cpu") -> Engine:
    """The TorchScript module called as TorchForce calls it."""

    def run(model_file: Path, structures: Dict[str, Atoms], folder: Path) -> Results:
        from mlff import payload, torchscript

        results = {}
        for name, atoms in structures.items():
            module = torchscript.module(payload.find(model_file), atoms.numbers, portable=portable)
            box = torch.tensor(atoms.cell.array / units.ANGSTROM_PER_NM, device=device) if atoms.pbc.all() else None
            energy, forces = module(torch.tensor(atoms.positions / units.ANGSTROM_PER_NM, device=device), box)
            results[name] = _from_openmm_units(float(energy), forces.cpu().numpy())
        return results

    def require() -> None:
        from mlff import torchscript

        if not portable:
            try:
                torchscript.load_operator()
            except (FileNotFoundError, ImportError) as e:
                pytest.skip(str(e))

    return Engine(run, _one_kind_of_boundary, require)


def openmm(platform: str, **properties: str) -> Engine:
    def run(model_file: Path, structures: Dict[str, Atoms], folder: Path) -> Results:
        from openmm import Context, Platform, System, VerletIntegrator, unit
        from openmm.app import Element, Topology

        from mlff.openmm import create_force

        results = {}
        for name, atoms in structures.items():
            topology, system = Topology(), System()
            residue = topology.addResidue("MOL", topology.addChain())
            for symbol in atoms.symbols:
                topology.addAtom(symbol, Element.getBySymbol(symbol), residue)
                system.addParticle(1.0)
            if atoms.pbc.all():
                box = atoms.cell.array / units.ANGSTROM_PER_NM
                topology.setPeriodicBoxVectors(box)
                system.setDefaultPeriodicBoxVectors(*box)
            system.addForce(create_force(str(model_file), topology))
            context = Context(system, VerletIntegrator(0.001), Platform.getPlatformByName(platform), properties)
            context.setPositions(atoms.positions / units.ANGSTROM_PER_NM)
            state = context.getState(energy=True, forces=True)
            energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
            forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
            results[name] = _from_openmm_units(energy, np.array(forces))
        return results

    def require() -> None:
        for package in ("openmm", "openmmtorch"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed (extra openmm)")
        torch_module(portable=False).require()

    return Engine(run, _one_kind_of_boundary, require)


def _from_openmm_units(energy: float, forces: np.ndarray) -> Measured:
    return Measured(energy / units.KJ_PER_MOL_PER_EV, forces / (units.KJ_PER_MOL_PER_EV * units.ANGSTROM_PER_NM))


def lammps(ranks: int, device: str = "cpu", only: Optional[Tuple[str, ...]] = None) -> Engine:
    def run(model_file: Path, structures: Dict[str, Atoms], folder: Path) -> Results:
        found = lammps_run.evaluate(structures, model_file, folder, ranks=ranks, device=device)
        return {name: Measured(r.energy, r.forces, r.energies, full(r.virial)) for name, r in found.items()}

    return Engine(run, require=lammps_run.require_lammps, only=only)


# Idle ranks of MPI wait with a busy loop, so that more ranks than cores take seconds per structure.
FEW = ("ethanol", "water_box", "triclinic", "isolated_atom", "single_atom", "small_cell", "slab")

ENGINES = {
    "core": core("cpu"),
    "core-cuda": core("cuda"),
    "ase": ase("cpu"),
    "ase-cuda": ase("cuda"),
    "ase-batch": ase_batch("cpu"),
    "ase-batch-cuda": ase_batch("cuda"),
    "operator": torch_module(portable=False),
    "operator-cuda": torch_module(portable=False, device="cuda"),
    "portable": torch_module(portable=True),
    "openmm-Reference": openmm("Reference"),
    "openmm-CPU": openmm("CPU"),
    "openmm-CUDA": openmm("CUDA", Precision="double"),
    "lammps-1-rank": lammps(1),
    "lammps-2-ranks": lammps(2),
    "lammps-4-ranks": lammps(4, only=FEW),
    "lammps-1-rank-cuda": lammps(1, "cuda"),
    "lammps-2-ranks-cuda": lammps(2, "cuda"),
    "lammps-4-ranks-cuda": lammps(4, "cuda", FEW),
}


def params(names) -> list:
    """Parameters for pytest: those that need a GPU are marked."""
    return [pytest.param(n, marks=[pytest.mark.gpu] * n.lower().endswith("-cuda")) for n in names]
