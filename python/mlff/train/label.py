"""Teacher labels: energy, forces and (periodic) stress of structures, through any ASE calculator.

    python -m mlff.train.label sampled.extxyz labelled.extxyz --teacher so3lr

Labels follow ASE's conventions: energy in eV, forces in eV/Angstrom, stress in eV/Angstrom^3, Voigt order
(xx, yy, zz, yz, xz, xy), positive under tension: stress = (1/V) dE/d(strain).

A teacher is evaluated in float64, because a student is asked to reproduce differences (forces, stresses, relative
energies) that are 1e-6 of the total energy. Whatever changes the teacher's numbers (cutoff of its long-range
part, precision, version) is part of its provenance, which is returned beside the calculator and belongs into the
training record of every student that learns from it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import iread, write
from rich.progress import track

SO3LR_LONG_RANGE_CUTOFF = 12.0  # Angstrom


def so3lr(device: str = "cpu", long_range_cutoff: float = SO3LR_LONG_RANGE_CUTOFF) -> tuple[Calculator, dict]:
    """SO3LR, a general-purpose SO(3)-equivariant transformer with explicit long-range physics.

    Its electrostatics are shifted to zero at `long_range_cutoff` and its dispersion is switched off over the last
    2 Angstrom, so both depend on that number: students of one family must share it. Cells smaller than the cutoff
    are fine, the teacher's neighbour list holds periodic images.
    """
    from so3krates_torch.calculator.so3 import SO3LRCalculator

    calculator = SO3LRCalculator(
        r_max_lr=long_range_cutoff,
        dispersion_energy_cutoff_lr_damping=2.0,
        compute_stress=True,
        device=device,
        default_dtype="float64",
    )
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
    return calculator, provenance


TEACHERS = {"so3lr": so3lr}


def load_teacher(name: str, device: str = "cpu", **options) -> tuple[Calculator, dict]:
    """A teacher by short name (`so3lr`) or as `package.module:CalculatorClass` with keyword `options`."""
    if name in TEACHERS:
        return TEACHERS[name](device=device, **options)
    if ":" not in name:
        known = ", ".join(sorted(TEACHERS))
        raise ValueError(f"unknown teacher {name!r}: expected one of {known}, or 'package.module:CalculatorClass'")
    module_name, class_name = name.split(":", 1)
    calculator = getattr(importlib.import_module(module_name), class_name)(**options)
    return calculator, {"name": class_name, "module": module_name, "options": options}


def label(atoms: Atoms, calculator: Calculator) -> Atoms:
    """A copy of `atoms` that carries the teacher's energy, forces and, where all of its cell is periodic, stress."""
    calculator.calculate(atoms, ["energy", "forces", "stress"] if atoms.pbc.all() else ["energy", "forces"])
    results = {name: calculator.results[name] for name in ("energy", "forces")}
    if atoms.pbc.all():
        results["stress"] = calculator.results["stress"]
    for name, value in results.items():
        if not np.all(np.isfinite(value)):
            raise ValueError(f"the teacher returned a {name} that is not finite for {atoms}")
    labelled = atoms.copy()
    labelled.calc = SinglePointCalculator(labelled, **results)
    return labelled


def label_file(source: Path, target: Path, calculator: Calculator, max_force: float, index: str = ":") -> dict[str, int]:
    """Label the frames `source[index]` into `target` (extxyz); frames pushed harder than `max_force` (eV/A) are left out.

    Close contacts are wanted, but the teacher has never seen atoms on top of each other: beyond some force its
    word is extrapolation, and one such frame outweighs a thousand others in a squared loss.
    """
    counts = {"labelled": 0, "left_out": 0}
    target.unlink(missing_ok=True)
    for atoms in track(iread(source, index), description=f"label {source.name}"):
        labelled = label(atoms, calculator)
        if np.linalg.norm(labelled.get_forces(), axis=1).max() > max_force:
            counts["left_out"] += 1
            continue
        write(target, labelled, format="extxyz", append=True)
        counts["labelled"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="structures, any format that ASE reads")
    parser.add_argument("--index", default=":", help="frames to label as a Python slice, to share the work: 0::2 and 1::2")
    parser.add_argument("target", type=Path, help="extxyz to write")
    parser.add_argument("--teacher", default="so3lr", help="short name, or package.module:CalculatorClass")
    parser.add_argument("--options", type=json.loads, default={}, help="keyword arguments of the teacher, as JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-force", type=float, default=30.0, help="leave out frames above this, eV/Angstrom")
    args = parser.parse_args()
    calculator, provenance = load_teacher(args.teacher, args.device, **args.options)
    record = args.target.with_suffix(".json")
    record.write_text(json.dumps({"teacher": provenance}, indent=2) + "\n")  # before the labels: a part is usable too
    counts = label_file(args.source, args.target, calculator, args.max_force, args.index)
    record.write_text(json.dumps({"teacher": provenance, **counts}, indent=2) + "\n")
    print(counts)


if __name__ == "__main__":
    main()
