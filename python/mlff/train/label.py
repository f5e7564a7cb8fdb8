"""Labels: a file of structures in, the same with the teacher's energy, forces, stress out.

    mlff label --teacher aimnet2 conformers.extxyz -o labelled.extxyz

Labels are evaluated once. A record beside the file (same name, ending .json) holds the teacher's provenance and the SHA-256 of
the source and of the labels: labelling that is complete is not done again, one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Iterator

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols
from ase.io import write
from rich.console import Console
from rich.progress import Progress

from ..files import replacing
from . import MAX_FORCE
from .data import Place, read_structures, sha256
from .teachers import Teacher


def label(structures: list[Atoms], teacher: Teacher) -> list[Atoms]:
    """Copies that carry the teacher's energy, forces and, where all of the cell is periodic, stress."""
    labelled = []
    for atoms, results in zip(structures, teacher.evaluate(structures), strict=True):
        copy = atoms.copy()
        if "force_spread" in results:
            copy.arrays["force_spread"] = results.pop("force_spread")
        copy.calc = SinglePointCalculator(copy, **results)
        labelled.append(copy)
    return labelled


def label_file(source: Path, target: Path, teacher: Teacher, max_force: float = MAX_FORCE, index: str = ":") -> dict:
    """Label the frames `source[index]` into `target` (extxyz); frames pushed harder than `max_force` (eV/A) are left out.

    Close contacts are wanted, but a teacher has never seen atoms on top of each other: beyond some force its word is
    extrapolation, and one such frame outweighs a thousand others in a squared loss. Frames for which it returns NaN or
    infinities are left out, too.

    Returns the record that is beside the target, with the numbers of frames `labelled`, `left_out` for their force and
    `not_finite`. A frame that the teacher or a student cannot take (data.check) raises ValueError before anything is labelled, and so does
    an unfinished labelling of other frames, by another teacher or to another limit into the same target.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file of structures")
    if target.resolve() == source.resolve():
        raise ValueError(f"{target}: expected another file for the labels than that of the structures")
    job = {"teacher": teacher.provenance, "source_sha256": sha256([source]), "frames": index, "max_force_eV_A": max_force}
    record = _read(target.with_suffix(".json"))
    if target.is_file() and all(record.get(k) == v for k, v in job.items()) and record.get("sha256") == sha256([target]):
        return record

    frames = read_structures(source, index)
    for k, atoms in enumerate(frames):
        _suits(atoms, teacher, Place(source, k, atoms, index))
    part, state = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    done = {"frames": 0, "labelled": 0, "left_out": 0, "not_finite": 0, "bytes": 0}
    begun = _read(state) if part.is_file() else {}
    if begun.get("job", job) != job:
        differ = ", ".join(key for key, value in job.items() if begun["job"].get(key) != value)
        raise ValueError(
            f"{part} holds {begun['done']['frames']} frames of another labelling, with another {differ}; let that one end with the settings that "
            f"it had, or remove {part.name} to begin anew"
        )
    if begun and part.stat().st_size >= begun["done"]["bytes"]:
        done = begun["done"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as f:
        f.truncate(done["bytes"])  # what was written of an unfinished batch
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"label {source.name}", total=len(frames), completed=done["frames"])
        for batch in _batches(frames[done["frames"] :], teacher.max_pairs):
            labelled = label(batch, teacher)
            finite = [atoms for atoms in labelled if all(np.all(np.isfinite(value)) for value in atoms.calc.results.values())]
            kept = [atoms for atoms in finite if np.linalg.norm(atoms.calc.results["forces"], axis=1).max() <= max_force]
            if kept:
                _append(part, kept)
            done["frames"] += len(batch)
            done["labelled"] += len(kept)
            done["left_out"] += len(finite) - len(kept)
            done["not_finite"] += len(batch) - len(finite)
            done["bytes"] = part.stat().st_size
            with replacing(state) as path:
                path.write_text(json.dumps({"job": job, "done": done}))
            bar.advance(task, len(batch))
    counts = {key: done[key] for key in ("labelled", "left_out", "not_finite")}
    record = {**job, **counts, "sha256": sha256([part])}
    with replacing(target.with_suffix(".json")) as path:  # first: as long as the labels are not there, the same command goes on from the part
        path.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(part, target)
    state.unlink(missing_ok=True)
    return record


def summary(record: dict) -> str:
    """A record of labels in words."""
    text = f"{record['labelled']} frames with labels of {record['teacher']['name']}, {record['left_out']} left out"
    return text + (f", {record['not_finite']} for which it returned NaN" if record["not_finite"] else "")


def _suits(atoms: Atoms, teacher: Teacher, where: Place) -> None:
    name = teacher.provenance["name"]
    if atoms.pbc.any() and not teacher.periodic:
        raise ValueError(f"{where}: the teacher {name} takes molecules in open space, got a periodic cell; choose another teacher")
    if teacher.elements is not None:
        unknown = sorted(set(atoms.numbers.tolist()) - teacher.elements)
        if unknown:
            symbols, known = (" ".join(chemical_symbols[z] for z in numbers) for numbers in (unknown, sorted(teacher.elements)))
            raise ValueError(f"{where}: the teacher {name} knows {known}, got {symbols}; choose another teacher")


def _append(part: Path, frames: list[Atoms]) -> None:
    try:
        write(part, frames, format="extxyz", append=True)
    except OSError as e:
        raise OSError(f"{part} could not be written: {e}; once it can, the same command goes on where this one stopped") from e


def _batches(frames: list[Atoms], max_pairs: int) -> Iterator[list[Atoms]]:
    """Frames in their order, as many at once as Teacher.max_pairs allows; going on after a batch gives the batches that follow."""
    batch: list[Atoms] = []
    for atoms in frames:
        if batch and (len(batch) + 1) * max(map(len, [*batch, atoms])) ** 2 > max_pairs:
            yield batch
            batch = []
        batch.append(atoms)
    if batch:
        yield batch


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
