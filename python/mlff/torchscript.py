"""The TorchScript module around a payload: what ``torch.jit.load`` and OpenMM's TorchForce see of a ``model.pt``.

The payload is a plain tensor attribute, not a registered buffer: ``.to(device)`` then leaves it on the host, and it survives
freezing and saving again, stored uncompressed, so that the core finds it without torch (docs/file-format.md).

Units of the module are OpenMM's: nm, kJ/mol, kJ/mol/nm.
"""

import os
from pathlib import Path
from typing import Optional, Sequence, Tuple

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from .payload import unpack
from .units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

MAX_ENERGY_ERROR = 1e-5  # eV/atom, of the self-check
MAX_FORCE_ERROR = 1e-4  # eV/Angstrom


def load_operator() -> None:
    """Registers ``torch.ops.mlff.energy_forces``; does nothing if that has been done."""
    if not hasattr(torch.ops.mlff, "energy_forces"):
        from .core import library_path

        torch.ops.load_library(str(library_path("libmlff_torch.so")))


class OperatorModel(nn.Module):
    """Energy and forces by the compiled core, through the operator library.

    Attributes:
        payload: uint8 [bytes].
        atomic_numbers: int64 [n] of every atom of the system, or None: then forward raises an error that says what to do.
        indices: int64 [m] atoms that the model handles, or None for all.
    """

    payload: Tensor
    atomic_numbers: Optional[Tensor]
    indices: Optional[Tensor]

    def __init__(self, payload: Tensor, atomic_numbers: Optional[Tensor], indices: Optional[Tensor]):
        super().__init__()
        self.payload = payload
        self.atomic_numbers = atomic_numbers
        self.indices = indices

    def forward(self, positions: Tensor, boxvectors: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        # TorchForce asks for gradients of its positions; the forces are computed here, so no graph is recorded.
        return torch.ops.mlff.energy_forces(self.payload, self.atomic_numbers, self.indices, positions.detach(), boxvectors)


def module(
    payload: bytes, atomic_numbers: Optional[Sequence[int]] = None, indices: Optional[Sequence[int]] = None, portable: bool = False
) -> torch.jit.ScriptModule:
    """The scripted module of a payload.

    Its ``forward(positions, boxvectors=None)`` takes positions [n, 3] in nm (float32 or float64) and box vectors [3, 3]
    in nm (rows). It returns the energy in kJ/mol (float64 scalar) and forces [n, 3] in kJ/mol/nm (the dtype of positions; zero for atoms
    that the model does not handle), on the device of positions. On a GPU it works in torch's current stream, with the machine
    code of the payload; the module itself stays as it is, for it has no weights of torch's.

    Args:
        payload: bytes of :func:`mlff.export.build_payload` or :func:`mlff.payload.find`.
        atomic_numbers: [n] of every atom of the system; those of atoms outside ``indices`` are not looked at. Without them
            the file serves LAMMPS and ASE, and its forward raises an error.
        indices: [m] atoms that the model handles; None for all.
        portable: a forward in plain TorchScript (see portable.py) in place of the operator.

    Raises:
        PayloadError: damaged payload.
        ValueError: an element that the model does not know; indices that repeat, lie outside the system, or come without elements.
    """
    header, _ = unpack(payload)
    numbers = None if atomic_numbers is None else torch.from_numpy(np.array(atomic_numbers, dtype=np.int64))
    atoms = None if indices is None else torch.from_numpy(np.array(indices, dtype=np.int64))
    _check_atoms(header["atomic_numbers"], numbers, atoms)
    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    if portable:
        from .portable import PortableModel

        return torch.jit.script(PortableModel(data, numbers, atoms).eval())
    load_operator()
    return torch.jit.script(OperatorModel(data, numbers, atoms).eval())


def save(
    payload: bytes,
    path,
    atomic_numbers: Optional[Sequence[int]] = None,
    indices: Optional[Sequence[int]] = None,
    portable: bool = False,
) -> None:
    """Writes ``model.pt``; arguments and errors as for :func:`module`. A file in its place is replaced at the end."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    script = module(payload, atomic_numbers, indices, portable)
    try:
        torch.jit.save(script, str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def self_check(payload: bytes, portable: bool = False) -> Tuple[float, float]:
    """Evaluates the reference structures of a payload by the module that a file would hold.

    Returns:
        the largest deviation of the energy in eV/atom and of a force component in eV/Angstrom.

    Raises:
        RuntimeError: the deviations exceed MAX_ENERGY_ERROR or MAX_FORCE_ERROR.
    """
    header, tensors = unpack(payload)
    energy_error = force_error = 0.0
    for reference in header["references"]:
        numbers, x, cell, pbc, energy, forces = (
            tensors[f"{reference['prefix']}.{key}"] for key in ("atomic_numbers", "positions", "cell", "pbc", "energy", "forces")
        )
        if pbc.any() and not pbc.all():
            continue  # OpenMM knows three periodic directions or none
        box = torch.tensor(cell / ANGSTROM_PER_NM) if pbc.all() else None
        e, f = module(payload, numbers, portable=portable)(torch.tensor(x / ANGSTROM_PER_NM), box)
        energy_error = max(energy_error, abs(float(e) / KJ_PER_MOL_PER_EV - float(energy[0])) / len(numbers))
        force_error = max(force_error, float(np.abs(f.numpy() / (KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM) - forces).max()))
    if not (energy_error <= MAX_ENERGY_ERROR and force_error <= MAX_FORCE_ERROR):
        raise RuntimeError(
            f"self-check failed: energies deviate by {energy_error:.1e} eV/atom (at most {MAX_ENERGY_ERROR:.0e}), "
            f"forces by {force_error:.1e} eV/Angstrom (at most {MAX_FORCE_ERROR:.0e}); reinstall mlff or report this"
        )
    return energy_error, force_error


def _check_atoms(known: Sequence[int], numbers: Optional[Tensor], indices: Optional[Tensor]) -> None:
    if numbers is None:
        if indices is not None:
            raise ValueError("indices need the atomic_numbers of the whole system")
        return
    selected = torch.arange(len(numbers)) if indices is None else indices
    if selected.ndim != 1 or bool((selected < 0).any()) or bool((selected >= len(numbers)).any()):
        raise ValueError(f"indices must be a list of atoms within 0 .. {len(numbers) - 1}, got {selected.tolist()}")
    if len(torch.unique(selected)) != len(selected):
        raise ValueError("an atom is listed twice in indices")
    for atom in selected.tolist():
        if int(numbers[atom]) not in known:
            raise ValueError(
                f"atom {atom} is {_symbol(int(numbers[atom]))}, which the model does not know; "
                f"it knows {' '.join(_symbol(z) for z in known)}"
            )


def _symbol(atomic_number: int) -> str:
    return chemical_symbols[atomic_number] if 0 < atomic_number < len(chemical_symbols) else f"atomic number {atomic_number}"
