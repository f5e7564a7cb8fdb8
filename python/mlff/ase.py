"""ASE calculator: ``atoms.calc = MLFFCalculator("model.pt")``, on the CPU or on a GPU, for one structure or for many at a time."""

from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.cell import Cell
from ase.data import chemical_symbols

from .core import NO_GRADE, MLFFInputError, MLFFResourceError, Model, System, device_count

BATCH_ATOMS = 16384  # of a batch, and the places for pairs of all its atoms: together some GB of GPU memory
BATCH_CANDIDATES = 1 << 26
MAX_CANDIDATES = 65536  # of a structure in a batch, atoms times images (plugin/mlff.h)
VOIGT = [0, 1, 2, 5, 4, 3]  # ASE's order xx, yy, zz, yz, xz, xy from the core's xx, yy, zz, xy, xz, yz


class MLFFCalculator(Calculator):
    """Energies, forces and stresses of a model file in ASE's units and signs (eV, Angstrom; stress = -virial / volume).

    ``stresses`` are the shares of the atoms, whose sum is the stress. Both need a cell that is periodic in three directions. An
    energy alone is computed without gradients; everything else comes from one evaluation. Any combination of periodic
    directions is allowed, as are cells smaller than the cutoff and atoms outside the cell.

    Models trained by this version also give ``extrapolation_grade`` [N], which has no unit: above 1 an atom is unlike the training
    data (docs/extrapolation.md). It is computed when it is asked for, ``calc.get_property("extrapolation_grade", atoms)``.

    Args:
        model_path: a model.pt of mlff-export.
        device: "cpu", "cuda" (the first GPU), "cuda:1" ..., or "auto": the first GPU if there is one that the file has code
            for, else the CPU. Both compute in float32: results differ by rounding.
        threads: number of threads of the CPU; 0 for OpenMP's default. Results are the same bit for bit for the same number.
        self_check: first compare the model's reference structures with the stored results.
        with_grade: compute the grades with the forces, for dynamics that look at them at every step: one evaluation, not two.

    Attributes:
        model: the loaded :class:`mlff.core.Model`.
        device: where it is evaluated, "cpu" or a GPU.
        species: chemical symbols that the model knows.
        cutoff: radius of a message in Angstrom.
        sha256: identity of the model; also among the parameters that trajectories and databases store.

    Raises:
        MLFFFileError: the file is missing, damaged, foreign or too new.
        MLFFInternalError: the self-check failed.
        MLFFResourceError: no such device, or a file without machine code for it.
        ValueError: with_grade of a model without grades; (when evaluated) an element that the model does not know, positions that are not
            finite, an impossible cell.
        PropertyNotImplementedError: (when evaluated) stress without periodicity in three directions, grades of a model without.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress", "stresses"]
    default_parameters = {"device": "cpu", "threads": 0, "with_grade": False}
    ignored_changes = {"initial_charges", "initial_magmoms"}
    name = "mlff"

    def __init__(
        self, model_path, device: str = "cpu", threads: int = 0, self_check: bool = False, with_grade: bool = False, **kwargs
    ):
        self.model = Model(model_path)
        self.species = [chemical_symbols[z] for z in self.model.atomic_numbers]
        self.cutoff, self.sha256 = self.model.cutoff, self.model.sha256
        if self.model.has_extrapolation_grade:
            self.implemented_properties = [*MLFFCalculator.implemented_properties, "extrapolation_grade"]
        super().__init__(model_path=str(model_path), device=device, threads=threads, with_grade=with_grade, **kwargs)
        if self_check:
            self.model.self_check(self.device)

    def set(self, **kwargs) -> Dict[str, Any]:
        """Changes ``device``, ``threads`` or ``with_grade``."""
        unknown = set(kwargs) - {"model_path", "device", "threads", "with_grade"}
        if unknown or "model_path" in kwargs and self.parameters.get("model_path", kwargs["model_path"]) != kwargs["model_path"]:
            changes = f"changes device, threads or with_grade, got {', '.join(sorted(unknown or {'model_path'}))}"
            raise ValueError(f"MLFFCalculator.set {changes}; make a new calculator for another model")
        if kwargs.get("with_grade") and not self.model.has_extrapolation_grade:
            raise ValueError(NO_GRADE)
        wanted = {**self.parameters, **kwargs}
        system = getattr(self, "_system", None)
        if system is None or any(self.parameters[key] != wanted[key] for key in ("device", "threads")):
            device = self._choose(wanted["device"])
            system = System(self.model, device, wanted["threads"])  # where that fails, all is as it was
            self.device, self._system = device, system
            self._batch = None  # the system of calculate_batch
            self._numbers = None
        changed = super().set(**kwargs)
        if changed:
            self.reset()
        return changed

    def _choose(self, device: str) -> str:
        if device != "auto":
            return device
        try:
            if device_count("cuda"):
                self.model.check_device("cuda")
                return "cuda"
        except MLFFResourceError:
            pass
        return "cpu"

    def todict(self, skip_default: bool = True) -> Dict[str, Any]:
        return {**super().todict(skip_default), "sha256": self.sha256}

    def __reduce__(self):
        """For copies and other processes, which load the file again."""
        parameters = self.parameters
        arguments = parameters["model_path"], parameters["device"], parameters["threads"], False, parameters["with_grade"]
        return type(self), arguments, {"atoms": self.atoms, "results": self.results}

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        if atoms is not None and self.check_state(atoms):  # when this is called directly; get_property has looked before
            self.results = {}
        super().calculate(atoms, properties, system_changes)
        atoms, wanted, solid = self.atoms, set(properties), bool(self.atoms.pbc.all())
        if wanted & {"stress", "stresses"} and not solid:
            raise PropertyNotImplementedError(_no_stress(atoms))
        names = ["energy", "atom_energy"]
        if wanted - {"energy", "free_energy", "energies", "extrapolation_grade"}:
            names += ["forces", "virial"]
            if self.parameters["with_grade"]:
                wanted.add("extrapolation_grade")
        if "stresses" in wanted:
            names.append("atom_virial")
        if "extrapolation_grade" in wanted:
            names.append("extrapolation_grade")
        self._set_atoms(atoms)
        found = self._system.compute(atoms.positions, atoms.cell.array, atoms.pbc, names)
        self.results.update(energy=found["energy"], free_energy=found["energy"], energies=found["atom_energy"])
        for name in {"forces", "extrapolation_grade"} & set(found):
            self.results[name] = found[name]
        for name, virial in (("stress", "virial"), ("stresses", "atom_virial")):
            if virial in found and solid:
                self.results[name] = -found[virial][..., VOIGT] / atoms.get_volume()

    def get_property(self, name, atoms=None, allow_calculation=True):
        if name == "extrapolation_grade" and not self.model.has_extrapolation_grade:
            raise PropertyNotImplementedError(NO_GRADE)
        return super().get_property(name, atoms, allow_calculation)

    def calculate_batch(
        self, structures: Sequence[Atoms], properties: Optional[Sequence[str]] = None
    ) -> List[Dict[str, Any]]:
        """Evaluates many structures, of any composition and periodicity, some thousands of atoms at a time.

        On a GPU that is much faster than one after the other, as long as they are small. Results of ``atoms.calc`` are not
        touched.

        Args:
            structures: list of Atoms; their calculators and constraints are not looked at.
            properties: out of implemented_properties. By default energy, forces, and the stress of those structures that are
                periodic in three directions.

        Returns:
            a dict for each structure, in their order, with the properties as ``atoms.calc.results`` has them.

        Raises:
            PropertyNotImplementedError: stress or stresses are asked for, and a structure is not periodic in three directions.
            ValueError: an unknown property or element, positions that are not finite, an impossible cell.
            The messages name the structure by its index.
        """
        if isinstance(structures, Atoms):
            raise TypeError("structures: expected a list of Atoms, got one; give [atoms]")
        structures = list(structures)
        wanted = {"energy", "forces", "stress"} if properties is None else set(properties)
        if wanted - set(self.implemented_properties):
            raise ValueError(f"properties must be out of {' '.join(self.implemented_properties)}; got {properties!r}")
        for index, atoms in enumerate(structures):
            self._check_elements(atoms, f"structure {index}, ")
            if properties is not None and wanted & {"stress", "stresses"} and not atoms.pbc.all():
                raise PropertyNotImplementedError(f"structure {index}, {atoms.symbols}: {_no_stress(atoms)}")
        sources = {"energies": "atom_energy", "stress": "virial", "stresses": "atom_virial"}
        sources.update({name: name for name in ("forces", "extrapolation_grade")})
        names = ["energy", *(source for name, source in sources.items() if name in wanted)]
        if self._batch is None:
            self._batch = System(self.model, self.device, self.parameters["threads"])
        results: List[Dict[str, Any]] = [{} for _ in structures]
        for chunk in self._chunks(structures):
            try:
                found = self._evaluate([structures[k] for k in chunk], names)
            except MLFFInputError as e:
                for k in chunk:  # which one is it?
                    atoms = structures[k]
                    try:
                        self._batch.set_atoms(atoms.numbers)
                        self._batch.compute(atoms.positions, atoms.cell.array, atoms.pbc, ["energy"])
                    except MLFFInputError as error:
                        raise MLFFInputError(f"structure {k}, {atoms.symbols}: {error}") from None
                raise e
            for k, result in zip(chunk, found):
                results[k] = {name: value for name, value in result.items() if name in wanted}
        return results

    def _chunks(self, structures: Sequence[Atoms]) -> Iterator[List[int]]:
        """Indices of structures to evaluate together: alike, since all rows of a batch get room for the most candidates of one."""
        candidates = np.array([self._candidates(atoms) for atoms in structures], dtype=float)
        chunk: List[int] = []
        n_atoms = 0
        for k in np.argsort(candidates, kind="stable").tolist():
            n = n_atoms + len(structures[k])
            if chunk and (n > BATCH_ATOMS or n * candidates[k] > BATCH_CANDIDATES or candidates[k] > MAX_CANDIDATES):
                yield chunk
                chunk, n = [], len(structures[k])
            chunk.append(k)
            n_atoms = n
        if chunk:
            yield chunk

    def _candidates(self, atoms: Atoms) -> float:
        """Atoms times images that the search over all pairs looks at; what cannot be a cell is left to the core to refuse."""
        periodic = atoms.pbc & atoms.cell.any(1)
        try:
            cell = Cell(atoms.cell.array * periodic[:, None]).complete()
            heights = 1 / np.linalg.norm(np.linalg.inv(cell.array), axis=0)[periodic]
        except np.linalg.LinAlgError:
            return float(len(atoms))
        return len(atoms) * float(np.prod(2 * np.floor(self.cutoff / heights + 0.5) + 1))

    def _evaluate(self, structures: Sequence[Atoms], names: Sequence[str]) -> List[Dict[str, Any]]:
        """Results of structures that fit into one call."""
        starts = np.cumsum([0] + [len(atoms) for atoms in structures])
        self._batch.set_atoms(np.concatenate([atoms.numbers for atoms in structures]))
        self._batch.set_structures(starts)
        found = self._batch.compute_batch(
            np.concatenate([atoms.positions for atoms in structures]),
            np.stack([atoms.cell.array for atoms in structures]),
            np.stack([atoms.pbc for atoms in structures]),
            names,
        )
        results: List[Dict[str, Any]] = []
        for k, atoms in enumerate(structures):
            own = slice(starts[k], starts[k + 1])
            result = {"energy": float(found["energy"][k]), "free_energy": float(found["energy"][k])}
            if "atom_energy" in found:
                result["energies"] = found["atom_energy"][own].copy()
            for name in {"forces", "extrapolation_grade"} & set(found):
                result[name] = found[name][own].copy()
            if atoms.pbc.all():
                if "virial" in found:
                    result["stress"] = -found["virial"][k, VOIGT] / atoms.get_volume()
                if "atom_virial" in found:
                    result["stresses"] = -found["atom_virial"][own][:, VOIGT] / atoms.get_volume()
            results.append(result)
        return results

    def _set_atoms(self, atoms) -> None:
        if self._numbers is not None and np.array_equal(self._numbers, atoms.numbers):
            return
        self._check_elements(atoms)
        self._system.set_atoms(atoms.numbers)
        self._numbers = atoms.numbers.copy()

    def _check_elements(self, atoms: Atoms, which: str = "") -> None:
        if np.isin(atoms.numbers, self.model.atomic_numbers).all():
            return
        known, unknown = " ".join(self.species), " ".join(sorted(set(atoms.symbols) - set(self.species)))
        raise ValueError(f"{which}{atoms.symbols}: the model knows the elements {known}, not {unknown}")


def _no_stress(atoms: Atoms) -> str:
    return f"stress needs a cell that is periodic in three directions, got pbc {atoms.pbc.tolist()}"
