"""Teachers: what labels structures with energy, forces and, where all of the cell is periodic, stress.

Any ASE calculator is one, by the name `package.module:CalculatorClass`; TEACHERS lists those that work without further
settings, with the package to install. Results follow ASE's conventions: energy in eV, forces in eV/Angstrom, stress in
eV/Angstrom^3, Voigt order (xx, yy, zz, yz, xz, xy), positive under tension: stress = (1/V) dE/d(strain).

A teacher works in float64 where it can, because a student is asked to reproduce differences (forces, stresses, relative
energies) that are 1e-6 of the total energy. Whatever changes the teacher's numbers (cutoff of its long-range part,
precision, version) is part of its provenance, which belongs into the record of every student that learns from it.

Students know neither charge nor spin, so every teacher is asked for neutral molecules with closed shells (data.check).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers

SO3LR_LONG_RANGE_CUTOFF = 12.0  # Angstrom
AIMNET2_FILE = "aimnet2_wb97m_ens_f.jpt"

Results = dict[str, "float | np.ndarray"]


@dataclass
class Teacher:
    """A function from structures to their results, and what has to be known about it.

    Attributes:
        provenance: name, package, version, settings, citation; JSON values.
        evaluate: results of some structures: energy, forces [N, 3], stress [6] of periodic ones; a teacher that is an
            ensemble adds force_spread [N], the standard deviation of its members' forces (root of the sum over x, y, z).
        max_pairs: evaluate is given several structures as long as their number times the square of the largest is below
            this; 0 for one at a time.
        elements: atomic numbers that it knows; None for any, or where the teacher says so itself.
        periodic: whether it takes periodic cells.
    """

    provenance: dict
    evaluate: Callable[[list[Atoms]], list[Results]]
    max_pairs: int = 0
    elements: frozenset[int] | None = None
    periodic: bool = True


def of_calculator(calculator: Calculator, provenance: dict, **about) -> Teacher:
    """A teacher out of an ASE calculator."""

    def evaluate(structures: list[Atoms]) -> list[Results]:
        results = []
        for atoms in structures:
            names = ["energy", "forces", "stress"] if atoms.pbc.all() else ["energy", "forces"]
            calculator.calculate(atoms, names)
            missing = [name for name in names if name not in calculator.results]
            if missing:
                raise ValueError(f"the teacher {provenance['name']} returned no {' and no '.join(missing)} for {atoms}")
            results.append({name: calculator.results[name] for name in names})
        return results

    return Teacher(provenance, evaluate, **about)


def so3lr_calculator(device: str = "cpu", long_range_cutoff: float = SO3LR_LONG_RANGE_CUTOFF) -> Calculator:
    """SO3LR in float64.

    Its electrostatics are shifted to zero at `long_range_cutoff` Angstrom and its dispersion is switched off over the last
    2 Angstrom, so both depend on that number: students of one family must share it. Cells smaller than the cutoff are
    fine, the teacher's neighbour list holds periodic images.
    """
    from so3krates_torch.calculator.so3 import SO3LRCalculator

    return SO3LRCalculator(
        r_max_lr=long_range_cutoff,
        dispersion_energy_cutoff_lr_damping=2.0,
        compute_stress=True,
        device=device,
        default_dtype="float64",
    )


def so3lr(device: str = "cpu", long_range_cutoff: float = SO3LR_LONG_RANGE_CUTOFF) -> Teacher:
    """SO3LR, a general-purpose SO(3)-equivariant transformer with explicit long-range physics, for organic molecules."""
    provenance = {
        "name": "SO3LR",
        "package": "so3krates-torch",
        "version": importlib.metadata.version("so3krates-torch"),
        "license": "MIT",
        "citation": "A. Kabylda, J. T. Frank, S. Suarez-Dou, A. Khabibrakhmanov, L. Medrano Sandonas, O. T. Unke, "
        "S. Chmiela, K.-R. Mueller, A. Tkatchenko, Molecular Simulations with a Pretrained Neural Network and "
        "Universal Pairwise Force Fields, J. Am. Chem. Soc. 2025; doi:10.1021/jacs.5c09558",
        "level_of_theory": "PBE0+MBD",
        "long_range_cutoff_A": long_range_cutoff,
        "dispersion_switching_A": 2.0,
        "dtype": "float64",
    }
    return of_calculator(so3lr_calculator(device, long_range_cutoff), provenance, elements=_elements("H C N O F P S Cl"))


def aimnet2_model(device: str = "cpu") -> torch.jit.ScriptModule:
    """The ensemble of AIMNet2 out of its wheel; `models` are its four members, at a quarter of the cost each."""
    # the model is a file in the wheel: importing the package would need all that it works with
    spec = importlib.util.find_spec("Auto3D")
    if spec is None:
        raise ModuleNotFoundError("No module named 'Auto3D'")
    path = Path(spec.submodule_search_locations[0]) / "models" / AIMNET2_FILE
    return torch.jit.load(str(path), map_location=device).eval()


def aimnet2(device: str = "cpu") -> Teacher:
    """AIMNet2, an ensemble of four, for organic molecules in open space; whole batches of them at once.

    It computes in float32 and sums energies in float64.
    """
    model = aimnet2_model(device)
    provenance = {
        "name": "AIMNet2",
        "package": "auto3d",
        "version": importlib.metadata.version("auto3d"),
        "file": AIMNET2_FILE,
        "license": "MIT",
        "citation": "D. Anstine, R. Zubatyuk, O. Isayev, AIMNet2: a neural network potential to meet your neutral, charged, "
        "organic, and elemental-organic needs, Chem. Sci. 2025; doi:10.1039/D4SC08572H",
        "level_of_theory": "wB97M-D3/def2-TZVPP",
        "ensemble": 4,
        "dtype": "float32",
    }

    def evaluate(structures: list[Atoms]) -> list[Results]:
        sizes, largest = [len(atoms) for atoms in structures], max(map(len, structures))
        coordinates = torch.zeros(len(sizes), largest, 3)
        numbers = torch.zeros(len(sizes), largest, dtype=torch.long)  # 0 is padding
        for k, atoms in enumerate(structures):
            coordinates[k, : sizes[k]] = torch.tensor(atoms.positions)
            numbers[k, : sizes[k]] = torch.tensor(atoms.numbers)
        charge = torch.zeros(len(sizes), device=device)
        # TorchScript would recompile the first calls, which takes longer than it saves and changes the last bits from call to call
        with torch.jit.optimized_execution(False):
            out = model({"coord": coordinates.to(device), "numbers": numbers.to(device), "charge": charge})
        energy, forces, spread = (out[name].detach().cpu().numpy() for name in ("energy", "forces", "forces_std"))
        spread = np.linalg.norm(spread, axis=2)
        return [{"energy": float(energy[k]), "forces": forces[k, :n], "force_spread": spread[k, :n]} for k, n in enumerate(sizes)]

    # on a CPU larger batches are no faster; a pair takes about 20 kB
    max_pairs = 400_000 if "cuda" in device else 10_000
    return Teacher(provenance, evaluate, max_pairs, _elements("H B C N O F Si P S Cl As Se Br I"), periodic=False)


def sevennet(device: str = "cpu", model: str = "7net-0") -> Teacher:
    """SevenNet, an E(3)-equivariant network for inorganic crystals, float32."""
    from sevenn.calculator import SevenNetCalculator

    provenance = {
        "name": f"SevenNet {model}",
        "package": "sevenn",
        "version": importlib.metadata.version("sevenn"),
        "license": "MIT",
        "citation": "Y. Park, J. Kim, S. Hwang, S. Han, Scalable Parallel Algorithm for Graph Neural Network Interatomic "
        "Potentials in Molecular Dynamics Simulations, J. Chem. Theory Comput. 2024; doi:10.1021/acs.jctc.4c00190",
        "level_of_theory": "PBE(+U)",
        "dtype": "float32",
    }
    calculator = SevenNetCalculator(model, device=device)
    return of_calculator(calculator, provenance, elements=frozenset(calculator.type_map))


def chgnet(device: str = "cpu") -> Teacher:
    """CHGNet, a network for inorganic crystals that knows magnetic moments, float32."""
    from chgnet.model.dynamics import CHGNetCalculator

    provenance = {
        "name": "CHGNet",
        "package": "chgnet",
        "version": importlib.metadata.version("chgnet"),
        "license": "BSD-3-Clause",
        "citation": "B. Deng, P. Zhong, K. Jun, J. Riebesell, K. Han, C. J. Bartel, G. Ceder, CHGNet as a pretrained universal "
        "neural network potential for charge-informed atomistic modelling, Nat. Mach. Intell. 2023; "
        "doi:10.1038/s42256-023-00716-3",
        "level_of_theory": "PBE(+U)",
        "dtype": "float32",
    }
    return of_calculator(CHGNetCalculator(use_device=device), provenance, elements=frozenset(range(1, 95)))


def gfn2_xtb(device: str = "cpu") -> Teacher:
    """GFN2-xTB, a semi-empirical method: an independent check of the others. Runs on the CPU, whatever the device."""
    from tblite.ase import TBLite

    provenance = {
        "name": "GFN2-xTB",
        "package": "tblite",
        "version": importlib.metadata.version("tblite"),
        "license": "LGPL-3.0-or-later",
        "citation": "C. Bannwarth, S. Ehlert, S. Grimme, GFN2-xTB, J. Chem. Theory Comput. 2019; doi:10.1021/acs.jctc.8b01176",
        "level_of_theory": "GFN2-xTB",
        "dtype": "float64",
    }
    return of_calculator(TBLite(method="GFN2-xTB", verbosity=0), provenance, elements=frozenset(range(1, 87)))


TEACHERS: dict[str, tuple[Callable[..., Teacher], str]] = {  # and what to install
    "aimnet2": (aimnet2, "auto3d==2.3.1"),
    "chgnet": (chgnet, "chgnet"),
    "gfn2-xtb": (gfn2_xtb, "tblite"),
    "sevennet": (sevennet, "sevenn"),
    "so3lr": (so3lr, "so3krates-torch"),
}


def load_teacher(name: str, device: str = "cpu", **options) -> Teacher:
    """A teacher by short name (TEACHERS) or as `package.module:CalculatorClass`, with keyword `options` of either.

    Raises:
        ValueError: no such teacher.
        ImportError: the package of the teacher is not installed.
    """
    ours = torch.get_default_dtype()
    try:
        teacher = _load(name, device, options)
        theirs = torch.get_default_dtype()
    finally:
        torch.set_default_dtype(ours)
    if theirs == ours:
        return teacher

    # some teachers change the default type for the whole process and rely on it: they have it while they work, no longer
    def evaluate(structures: list[Atoms], inner=teacher.evaluate) -> list[Results]:
        torch.set_default_dtype(theirs)
        try:
            return inner(structures)
        finally:
            torch.set_default_dtype(ours)

    teacher.evaluate = evaluate
    return teacher


def _load(name: str, device: str, options: dict) -> Teacher:
    if name in TEACHERS:
        function, package = TEACHERS[name]
        try:
            return function(device=device, **options)
        except ImportError as e:
            raise ImportError(f"the teacher {name} cannot be loaded ({e}): pip install {package}") from e
        except TypeError as e:
            raise ValueError(f"the teacher {name} does not take the options {options}: {e}") from e
    if ":" not in name:
        known = ", ".join(sorted(TEACHERS))
        raise ValueError(f"unknown teacher {name!r}: expected one of {known}, or 'package.module:CalculatorClass'")
    module_name, class_name = name.split(":", 1)
    try:
        calculator = getattr(importlib.import_module(module_name), class_name)(**options)
    except ImportError as e:
        raise ImportError(f"the teacher {name} cannot be loaded ({e})") from e
    except (AttributeError, TypeError) as e:
        raise ValueError(f"the teacher {name} cannot be made with the options {options}: {e}") from e
    return of_calculator(calculator, {"name": class_name, "module": module_name, "options": options})


def _elements(symbols: str) -> frozenset[int]:
    return frozenset(atomic_numbers[symbol] for symbol in symbols.split())
