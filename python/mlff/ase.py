"""ASE calculator: ``atoms.calc = MLFFCalculator("model.pt")``."""

from typing import Any, Dict

import numpy as np
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.data import chemical_symbols

from .core import Model, System

VOIGT = [0, 1, 2, 5, 4, 3]  # ASE's order xx, yy, zz, yz, xz, xy from the core's xx, yy, zz, xy, xz, yz


class MLFFCalculator(Calculator):
    """Energies, forces and stresses of a model file in ASE's units and signs (eV, Angstrom; stress = -virial / volume).

    ``stresses`` are the shares of the atoms, whose sum is the stress. Both need a cell that is periodic in three directions. An
    energy alone is computed without gradients; everything else comes from one evaluation. Any combination of periodic
    directions is allowed, as are cells smaller than the cutoff and atoms outside the cell.

    Args:
        model_path: a model.pt of mlff-export.
        device: "cpu".
        threads: number of threads; 0 for OpenMP's default. Results are the same bit for bit for the same number.
        self_check: first compare the model's reference structures with the stored results.

    Attributes:
        model: the loaded :class:`mlff.core.Model`.
        species: chemical symbols that the model knows.
        cutoff: radius of a message in Angstrom.
        sha256: identity of the model; also among the parameters that trajectories and databases store.

    Raises:
        MLFFFileError: the file is missing, damaged, foreign or too new.
        MLFFInternalError: the self-check failed.
        ValueError: (when evaluated) an element that the model does not know, positions that are not finite, an impossible cell.
        PropertyNotImplementedError: (when evaluated) stress without periodicity in three directions.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress", "stresses"]
    default_parameters = {"device": "cpu", "threads": 0}
    ignored_changes = {"initial_charges", "initial_magmoms"}
    name = "mlff"

    def __init__(self, model_path, device: str = "cpu", threads: int = 0, self_check: bool = False, **kwargs):
        self.model = Model(model_path)
        if self_check:
            self.model.self_check(device)
        self.species = [chemical_symbols[z] for z in self.model.atomic_numbers]
        self.cutoff, self.sha256 = self.model.cutoff, self.model.sha256
        super().__init__(model_path=str(model_path), device=device, threads=threads, **kwargs)

    def set(self, **kwargs) -> Dict[str, Any]:
        """Changes ``device`` or ``threads``."""
        unknown = set(kwargs) - {"model_path", "device", "threads"}
        if unknown or "model_path" in kwargs and self.parameters.get("model_path", kwargs["model_path"]) != kwargs["model_path"]:
            raise ValueError(f"MLFFCalculator.set changes device or threads, got {kwargs}; make a new calculator for another model")
        changed = super().set(**kwargs)
        if changed:
            self.reset()
            self._system = System(self.model, self.parameters["device"], self.parameters["threads"])
            self._numbers = None
        return changed

    def todict(self, skip_default: bool = True) -> Dict[str, Any]:
        return {**super().todict(skip_default), "sha256": self.sha256}

    def __reduce__(self):
        """For copies and other processes, which load the file again."""
        parameters = self.parameters
        arguments = parameters["model_path"], parameters["device"], parameters["threads"]
        return type(self), arguments, {"atoms": self.atoms, "results": self.results}

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        atoms, wanted, solid = self.atoms, set(properties), bool(self.atoms.pbc.all())
        if wanted & {"stress", "stresses"} and not solid:
            raise PropertyNotImplementedError(
                f"stress needs a cell that is periodic in three directions, got pbc {atoms.pbc.tolist()}"
            )
        names = ["energy", "atom_energy"]
        if wanted - {"energy", "free_energy", "energies"}:
            names += ["forces", "virial"]
        if "stresses" in wanted:
            names.append("atom_virial")
        self._set_atoms(atoms)
        found = self._system.compute(atoms.positions, atoms.cell.array, atoms.pbc, names)
        self.results.update(energy=found["energy"], free_energy=found["energy"], energies=found["atom_energy"])
        if "forces" in found:
            self.results["forces"] = found["forces"]
        for name, virial in (("stress", "virial"), ("stresses", "atom_virial")):
            if virial in found and solid:
                self.results[name] = -found[virial][..., VOIGT] / atoms.get_volume()

    def _set_atoms(self, atoms) -> None:
        if self._numbers is not None and np.array_equal(self._numbers, atoms.numbers):
            return
        unknown = sorted(set(atoms.symbols) - set(self.species))
        if unknown:
            raise ValueError(f"{atoms.symbols}: the model knows the elements {' '.join(self.species)}, not {' '.join(unknown)}")
        self._system.set_atoms(atoms.numbers)
        self._numbers = atoms.numbers.copy()
