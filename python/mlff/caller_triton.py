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
def load_position(row, mask, positions, caller_positions, caller_atoms, length, narrow):
    """Positions of rows in Angstrom: the caller's, where it has them on the device."""
    given = is_null(caller_positions) == 0
    at = tl.where(given, tl.load(caller_atoms + row, mask=mask & given, other=0), row).to(tl.int64) * 3
    numbers, narrow, length = tl.where(given, caller_positions, positions), narrow & given, tl.where(given, length, 1.0)
    x, y = load_numbers(numbers, at, narrow, mask), load_numbers(numbers, at + 1, narrow, mask)
    return x * length, y * length, load_numbers(numbers, at + 2, narrow, mask) * length


@triton.jit
def _load_row(box, k, narrow, length):
    return (load_numbers(box, k, narrow, True) * length, load_numbers(box, k + 1, narrow, True) * length,
            load_numbers(box, k + 2, narrow, True) * length)


@triton.jit
def load_caller_box(box, narrow, length):
    """The 18 numbers of a box, nine by nine, from the caller's; a vector of zeros is a direction that is not periodic."""
    a0, a1, a2 = _load_row(box, 0, narrow, length)
    b0, b1, b2 = _load_row(box, 3, narrow, length)
    c0, c1, c2 = _load_row(box, 6, narrow, length)
    u0, u1, u2, v0, v1, v2, w0, w1, w2 = inverse_rows(a0, a1, a2, b0, b1, b2, c0, c1, c2)
    a, b, c = (a0 == 0) & (a1 == 0) & (a2 == 0), (b0 == 0) & (b1 == 0) & (b2 == 0), (c0 == 0) & (c1 == 0) & (c2 == 0)
    u0, u1, u2 = tl.where(a, 0.0, u0), tl.where(a, 0.0, u1), tl.where(a, 0.0, u2)
    v0, v1, v2 = tl.where(b, 0.0, v0), tl.where(b, 0.0, v1), tl.where(b, 0.0, v2)
    w0, w1, w2 = tl.where(c, 0.0, w0), tl.where(c, 0.0, w1), tl.where(c, 0.0, w2)
    return (a0, a1, a2, b0, b1, b2, c0, c1, c2), (u0, u1, u2, v0, v1, v2, w0, w1, w2)


@triton.jit
def import_atoms(counts, caller_positions, caller_box, caller_atoms, units, positions, boxes, BLOCK: tl.constexpr):
    """Positions and the box for the list search. A box that is a null pointer leaves boxes as they are."""
    previous_kernel()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length, narrow = tl.load(units), tl.load(units + 3).to(tl.int32) != 0
    valid = row < tl.load(counts + 1)
    x, y, z = load_position(row, valid, positions, caller_positions, caller_atoms, length, narrow)
    at = positions + row.to(tl.int64) * 3
    tl.store(at, x, mask=valid)
    tl.store(at + 1, y, mask=valid)
    tl.store(at + 2, z, mask=valid)
    if tl.program_id(0) == 0:
        if is_null(caller_box) == 0:
            cell, inverse = load_caller_box(caller_box, narrow, length)
            for k in tl.static_range(9):
                tl.store(boxes + k, cell[k])
                tl.store(boxes + 9 + k, inverse[k])


def import_stages(plan) -> List[Dict[str, Any]]:
    """Stages before a list search whose caller has its arrays on the device."""
    name = plan.launch("import_atoms", import_atoms, warps=4, BLOCK=128)
    return [plan.stage(name, "counts caller_positions caller_box caller_atoms units positions boxes".split(), ["total", 128, 1])]
