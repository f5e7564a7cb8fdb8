"""Atoms of the caller that are on the device already, in its own units and type (docs/cuda.md)."""

from typing import Any, Dict, List

import triton
import triton.language as tl

from .box_triton import inverse_rows
from .launch_triton import previous_kernel


@triton.jit
def is_null(pointer):
    return pointer.to(tl.int64, bitcast=True) == 0


@triton.jit
def load_numbers(caller, at, narrow, mask):
    """Numbers of the caller's in float64; narrow: they are float32, whatever the pointer says. No branch: nothing waits but for its own loads."""
    wide = tl.load(caller + at, mask=mask & (narrow == 0), other=0.0)
    return tl.where(narrow, tl.load(caller.to(tl.pointer_type(tl.float32), bitcast=True) + at, mask=mask & narrow, other=0.0).to(tl.float64), wide)


@triton.jit
def guess_positions(row, mask, positions, caller_positions, caller_atoms, narrow):
    """What :func:`settle_positions` wants to know of rows. Mostly all atoms are the model's, in the caller's order: so the same rows of the
    caller, which has no fewer, are read beside the numbers of the rows that it should be, and not after these."""
    given = is_null(caller_positions) == 0
    atom = tl.load(caller_atoms + row, mask=mask & given, other=0)
    x, y, z = _load_vector(tl.where(given, caller_positions, positions), row, narrow & given, mask)
    return atom, x, y, z


@triton.jit
def settle_positions(guess, row, mask, caller_positions, length, narrow):
    """Positions of rows in Angstrom: the caller's, where it has them on the device."""
    given = is_null(caller_positions) == 0
    atom, x, y, z = guess
    moved = mask & given & (atom != row)
    x_0, y_0, z_0 = _load_vector(caller_positions, atom, narrow, moved)
    length = tl.where(given, length, 1.0)
    return tl.where(moved, x_0, x) * length, tl.where(moved, y_0, y) * length, tl.where(moved, z_0, z) * length


@triton.jit
def _load_vector(numbers, row, narrow, mask):
    at = row.to(tl.int64) * 3
    return load_numbers(numbers, at, narrow, mask), load_numbers(numbers, at + 1, narrow, mask), load_numbers(numbers, at + 2, narrow, mask)


@triton.jit
def load_caller_cell(caller_box, narrow, length):
    """Cell vectors of the caller in Angstrom, nine numbers; zero where it has no box on the device."""
    given = is_null(caller_box) == 0
    a0, a1, a2 = _load_row(caller_box, 0, narrow, length, given)
    b0, b1, b2 = _load_row(caller_box, 3, narrow, length, given)
    c0, c1, c2 = _load_row(caller_box, 6, narrow, length, given)
    return a0, a1, a2, b0, b1, b2, c0, c1, c2


@triton.jit
def _load_row(box, k, narrow, length, given):
    return (load_numbers(box, k, narrow, given) * length, load_numbers(box, k + 1, narrow, given) * length,
            load_numbers(box, k + 2, narrow, given) * length)


@triton.jit
def inverse_of_cell(a0, a1, a2, b0, b1, b2, c0, c1, c2):
    """The other nine numbers of a box; a vector of zeros is a direction that is not periodic."""
    u0, u1, u2, v0, v1, v2, w0, w1, w2 = inverse_rows(a0, a1, a2, b0, b1, b2, c0, c1, c2)
    a, b, c = (a0 == 0) & (a1 == 0) & (a2 == 0), (b0 == 0) & (b1 == 0) & (b2 == 0), (c0 == 0) & (c1 == 0) & (c2 == 0)
    u0, u1, u2 = tl.where(a, 0.0, u0), tl.where(a, 0.0, u1), tl.where(a, 0.0, u2)
    v0, v1, v2 = tl.where(b, 0.0, v0), tl.where(b, 0.0, v1), tl.where(b, 0.0, v2)
    w0, w1, w2 = tl.where(c, 0.0, w0), tl.where(c, 0.0, w1), tl.where(c, 0.0, w2)
    return u0, u1, u2, v0, v1, v2, w0, w1, w2


@triton.jit
def import_atoms(counts, caller_positions, caller_box, caller_atoms, units, positions, boxes, BLOCK: tl.constexpr):
    """Positions and the box for the list search. A box that is a null pointer leaves boxes as they are."""
    previous_kernel()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length, narrow = tl.load(units), tl.load(units + 3).to(tl.int32) != 0
    valid = row < tl.load(counts + 1)
    guess = guess_positions(row, valid, positions, caller_positions, caller_atoms, narrow)
    x, y, z = settle_positions(guess, row, valid, caller_positions, length, narrow)
    at = positions + row.to(tl.int64) * 3
    tl.store(at, x, mask=valid)
    tl.store(at + 1, y, mask=valid)
    tl.store(at + 2, z, mask=valid)
    if tl.program_id(0) == 0:
        if is_null(caller_box) == 0:
            cell = load_caller_cell(caller_box, narrow, length)
            inverse = inverse_of_cell(*cell)
            for k in tl.static_range(9):
                tl.store(boxes + k, cell[k])
                tl.store(boxes + 9 + k, inverse[k])


def import_stages(plan) -> List[Dict[str, Any]]:
    """Stages before a list search whose caller has its arrays on the device."""
    name = plan.launch("import_atoms", import_atoms, warps=4, BLOCK=128)
    return [plan.stage(name, "counts caller_positions caller_box caller_atoms units positions boxes".split(), ["total", 128, 1])]
