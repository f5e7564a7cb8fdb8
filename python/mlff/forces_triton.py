"""Forces, virials and energies from the gradient of the edges; import and export of arrays on the device (docs/cuda.md)."""

from typing import Any, Dict, List

import triton
import triton.language as tl

from .launch_triton import previous_kernel
from .neighbors_triton import inverse_rows

PARTS = 128  # programs that sum the rows of one large structure
_PARTS = tl.constexpr(PARTS)


@triton.jit
def _failed(flags, edge_capacity, candidate_capacity):
    """Whether edges are missing or cannot be trusted (flags 0, 1, 3 to 6)."""
    places = (tl.load(flags + 3) | tl.load(flags + 4) | tl.load(flags + 5) | tl.load(flags + 6)) != 0
    return (tl.load(flags) > edge_capacity) | (tl.load(flags + 1) > candidate_capacity) | places


@triton.jit
def _load_vectors(rows, e, mask, BLOCK: tl.constexpr):
    """The four numbers of rows e of an array [.., 4], by one load each."""
    values = tl.load(rows + e[:, None] * 4 + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(values, (BLOCK, 2, 2)))
    x, z = tl.split(even)
    y, w = tl.split(odd)
    return x, y, z, w


@triton.jit
def forces(counts, flags, order, edge_count, neighbors, reverse, slot, geometry, gradient, forces, atom_virial, edge_capacity,
           candidate_capacity, BLOCK: tl.constexpr):
    """Force (eV/Angstrom) and virial (eV) of one row, local or ghost.

    With q_e = dE/dr_ij of edge e of a local row i: F_i = sum over the edges of row i of ([i local] q_e - [j local] q_e'), where
    e' is the edge the other way, and W_i = -1/2 sum r_e (x) the same, symmetrised. Summed in float64, always in the same order.
    """
    row = tl.program_id(0)
    n_local, n_total = tl.load(counts), tl.load(counts + 1)
    number, caller = tl.load(edge_count + row), tl.load(order + row)
    failed = _failed(flags, edge_capacity, candidate_capacity)
    number = tl.where(row < n_total, number, 0)
    fx, fy, fz = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    xx, yy, zz = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    xy, xz, yz = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, number, BLOCK):
        k = first + tl.arange(0, BLOCK)
        valid = k < number
        e = row.to(tl.int64) * edge_capacity + k
        j = tl.load(neighbors + e, mask=valid, other=0)
        c = tl.load(reverse + e, mask=valid, other=0)
        back = valid & (j < n_local) & (c < candidate_capacity)
        place = tl.load(slot + j.to(tl.int64) * candidate_capacity + c, mask=back, other=-1)
        u0, u1, u2, d = _load_vectors(geometry, e, valid, BLOCK)
        previous_kernel()
        p0, p1, p2, _ = _load_vectors(gradient, e, valid & (row < n_local), BLOCK)
        q0, q1, q2, _ = _load_vectors(gradient, j.to(tl.int64) * edge_capacity + place, back & (place >= 0), BLOCK)
        g0, g1, g2 = p0.to(tl.float64) - q0, p1.to(tl.float64) - q1, p2.to(tl.float64) - q2
        r0, r1, r2 = d.to(tl.float64) * u0, d.to(tl.float64) * u1, d.to(tl.float64) * u2
        fx += g0
        fy += g1
        fz += g2
        xx += r0 * g0
        yy += r1 * g1
        zz += r2 * g2
        xy += r0 * g1 + r1 * g0
        xz += r0 * g2 + r2 * g0
        yz += r1 * g2 + r2 * g1
    previous_kernel()
    if row >= n_total:
        return
    nan = float("nan")
    out = forces + caller.to(tl.int64) * 3
    tl.store(out, tl.where(failed, nan, tl.sum(fx, 0)))
    tl.store(out + 1, tl.where(failed, nan, tl.sum(fy, 0)))
    tl.store(out + 2, tl.where(failed, nan, tl.sum(fz, 0)))
    out = atom_virial + caller.to(tl.int64) * 6
    tl.store(out, tl.where(failed, nan, -0.5 * tl.sum(xx, 0)))
    tl.store(out + 1, tl.where(failed, nan, -0.5 * tl.sum(yy, 0)))
    tl.store(out + 2, tl.where(failed, nan, -0.5 * tl.sum(zz, 0)))
    tl.store(out + 3, tl.where(failed, nan, -0.25 * tl.sum(xy, 0)))
    tl.store(out + 4, tl.where(failed, nan, -0.25 * tl.sum(xz, 0)))
    tl.store(out + 5, tl.where(failed, nan, -0.25 * tl.sum(yz, 0)))


@triton.jit
def _atom_energies(counts, flags, order, row_energy, atom_energy, row, valid, failed):
    """Energies of rows, written in the caller's order too; those not finite are reported if nothing else explains them."""
    n_local = tl.load(counts)
    local = valid & (row < n_local)
    energy = tl.load(row_energy + row, mask=local, other=0.0)
    caller = tl.load(order + row, mask=valid, other=0)
    tl.atomic_max(flags + 7 + row * 0, caller + 1, mask=local & (energy * 0.0 != 0.0) & (failed == 0))
    tl.store(atom_energy + caller, tl.where(failed, float("nan"), energy), mask=valid)
    return energy


@triton.jit
def total_partial(counts, flags, order, row_energy, atom_virial, atom_energy, partial, edge_capacity, candidate_capacity,
                  BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Energies of atoms, and the sums over one of PARTS ranges of rows: partial f64 [PARTS, 8], the virial and the energy."""
    previous_kernel()
    n_total = tl.load(counts + 1)
    failed = _failed(flags, edge_capacity, candidate_capacity)
    part = tl.program_id(0)
    column = tl.arange(0, 8)
    size = tl.cdiv(tl.cdiv(n_total, _PARTS), BLOCK) * BLOCK
    begin, end = tl.minimum(part * size, n_total), tl.minimum((part + 1) * size, n_total)
    if begin >= end:
        tl.store(partial + part * 8 + column, tl.zeros([8], tl.float64))
        return
    energy = tl.zeros([BLOCK], tl.float64)
    virial = tl.zeros([BLOCK, 8], tl.float64)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        energy += _atom_energies(counts, flags, order, row_energy, atom_energy, row, row < end, failed)
        if BACKWARD:
            at = atom_virial + row.to(tl.int64)[:, None] * 6 + column[None, :]
            virial += tl.load(at, mask=(row < end)[:, None] & (column < 6)[None, :], other=0.0)
    tl.store(partial + part * 8 + column, tl.sum(virial, 0), mask=column < 6)
    tl.store(partial + part * 8 + 6, tl.sum(energy, 0))


@triton.jit
def total(counts, starts, flags, rebuild, order, row_energy, atom_virial, partial, energies, virials, atom_energy, status,
          edge_capacity, candidate_capacity, BACKWARD: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr):
    """Energy and virial of one structure; the last program to finish hands over the flags and clears them.

    PARTIAL: total_partial has run, so the sums of one structure are those of its parts and the atoms' energies are written.
    """
    b = tl.program_id(0)
    structures = tl.load(counts + 2)
    n_local = tl.load(counts)
    begin, end = tl.load(starts + b), tl.load(starts + b + 1)
    previous_kernel()
    failed = _failed(flags, edge_capacity, candidate_capacity)
    if b >= structures:
        return
    from_virial, from_energy, wide, step = atom_virial, row_energy, 6, 1
    if PARTIAL:
        if structures == 1:
            begin, end, n_local = 0 * begin, 0 * end + _PARTS, 0 * n_local + _PARTS
            from_virial, from_energy, wide, step = partial, partial + 6, 8, 8
    column = tl.arange(0, 8)
    energy = tl.zeros([BLOCK], tl.float64)
    virial = tl.zeros([BLOCK, 8], tl.float64)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        if PARTIAL:
            energy += tl.load(from_energy + row.to(tl.int64) * step, mask=(row < end) & (row < n_local), other=0.0)
        else:
            energy += _atom_energies(counts, flags, order, row_energy, atom_energy, row, row < end, failed)
        if BACKWARD:
            at = from_virial + row.to(tl.int64)[:, None] * wide + column[None, :]
            virial += tl.load(at, mask=(row < end)[:, None] & (column < 6)[None, :], other=0.0)
    nan = float("nan")
    tl.store(energies + b, tl.where(failed, nan, tl.sum(energy, 0)))
    if BACKWARD:
        tl.store(virials + b.to(tl.int64) * 6 + column, tl.where(failed, nan, tl.sum(virial, 0)), mask=column < 6)
    last = structures == 1
    if structures > 1:  # flag 15 counts the programs that no longer need the flags
        last = tl.atomic_add(flags + 15, 1) == structures - 1
    if last:
        k = tl.arange(0, 16)
        tl.debug_barrier()  # what this program reported is there
        values = tl.atomic_xchg(flags + k, k * 0)
        tl.store(status + k, tl.where(k < 15, values, 0))
        tl.store(rebuild, 0)


@triton.jit
def _is_null(pointer):
    return pointer.to(tl.int64, bitcast=True) == 0


@triton.jit
def import_atoms(counts, caller_positions, caller_box, caller_atoms, units, positions, boxes, BLOCK: tl.constexpr):
    """Positions and the box from the caller's units and type. A box that is a null pointer leaves boxes as they are; a vector of
    zeros in it is a direction that is not periodic."""
    previous_kernel()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < tl.load(counts + 1)
    atom = tl.load(caller_atoms + row, mask=valid, other=0).to(tl.int64)
    length = tl.load(units)
    for k in tl.static_range(3):
        x = tl.load(caller_positions + atom * 3 + k, mask=valid, other=0.0).to(tl.float64)
        tl.store(positions + row.to(tl.int64) * 3 + k, x * length, mask=valid)
    if tl.program_id(0) == 0:
        if _is_null(caller_box) == 0:
            a0, a1, a2 = _load_row(caller_box, 0, length)
            b0, b1, b2 = _load_row(caller_box, 3, length)
            c0, c1, c2 = _load_row(caller_box, 6, length)
            u0, u1, u2, v0, v1, v2, w0, w1, w2 = inverse_rows(a0, a1, a2, b0, b1, b2, c0, c1, c2)
            _store_rows(boxes, 0, a0, a1, a2, u0, u1, u2)
            _store_rows(boxes, 3, b0, b1, b2, v0, v1, v2)
            _store_rows(boxes, 6, c0, c1, c2, w0, w1, w2)


@triton.jit
def _load_row(box, k, length):
    x, y, z = tl.load(box + k), tl.load(box + k + 1), tl.load(box + k + 2)
    return x.to(tl.float64) * length, y.to(tl.float64) * length, z.to(tl.float64) * length


@triton.jit
def _store_rows(boxes, k, a0, a1, a2, u0, u1, u2):
    """A vector of the cell and its row of the inverse, which is zero with the vector."""
    zero = (a0 == 0) & (a1 == 0) & (a2 == 0)
    tl.store(boxes + k, a0)
    tl.store(boxes + k + 1, a1)
    tl.store(boxes + k + 2, a2)
    tl.store(boxes + k + 9, tl.where(zero, 0.0, u0))
    tl.store(boxes + k + 10, tl.where(zero, 0.0, u1))
    tl.store(boxes + k + 11, tl.where(zero, 0.0, u2))


@triton.jit
def export_atoms(counts, energies, forces, caller_atoms, units, caller_energy, caller_forces, BLOCK: tl.constexpr):
    """Energy of structure 0 and forces in the caller's units and type. Either pointer may be null: then it is not wanted."""
    previous_kernel()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < tl.load(counts + 1)
    if _is_null(caller_forces) == 0:
        atom = tl.load(caller_atoms + row, mask=valid, other=0).to(tl.int64)
        unit = tl.load(units + 2)
        for k in tl.static_range(3):
            f = tl.load(forces + row.to(tl.int64) * 3 + k, mask=valid, other=0.0) * unit
            tl.store(caller_forces + atom * 3 + k, f.to(caller_forces.dtype.element_ty), mask=valid)
    if tl.program_id(0) == 0:
        if _is_null(caller_energy) == 0:
            tl.store(caller_energy, tl.load(energies) * tl.load(units + 1))


def force_stages(plan, large: bool = False) -> List[Dict[str, Any]]:
    """The last stages of a schedule. large: with a kernel more, which sums the rows of one structure in parts.

    Reads the buffers ``row_energy`` f64 [local] and ``gradient`` f32 [edges, 4], which the plan must have.
    """
    capacities = ["edge_capacity", "candidate_capacity"]
    if not any(b["name"] == "partial" for b in plan.buffers):
        plan.buffer("partial", "one", 8 * PARTS, "f64")

    def stage(name: str, args: str, grid: List[Any], kind: str) -> Dict[str, Any]:
        return plan.stage(name, [*args.split(), *capacities], grid, kind)

    name = "forces.large" if large else "forces.small"
    warps = 1 if large else 2  # few atoms leave most of a GPU idle
    plan.launch(name, forces, warps=warps, BLOCK=32 * warps)
    args = "counts flags order edge_count neighbors reverse slot geometry gradient forces atom_virial"
    stages = [stage(name, args, ["total", 1, 1], "backward")]
    for kind in ("backward", "energy"):
        backward = kind == "backward"
        if large:
            name = plan.launch(f"total_partial.{kind}", total_partial, warps=4, BACKWARD=backward, BLOCK=128)
            args = "counts flags order row_energy atom_virial atom_energy partial"
            stages.append(stage(name, args, ["one", 1, PARTS], kind))
        name = f"total.{kind}.{'large' if large else 'small'}"
        plan.launch(name, total, warps=4, BACKWARD=backward, PARTIAL=large, BLOCK=128)
        args = "counts starts flags rebuild order row_energy atom_virial partial energies virials atom_energy status"
        stages.append(stage(name, args, ["structures", 1, 1], kind))
    return stages


def export_import_stages(plan) -> Dict[str, Dict[str, List[Dict[str, Any]]]]:
    """Stages before and after an evaluation whose caller has its arrays on the device, by the caller's type."""
    stages: Dict[str, Dict[str, List[Dict[str, Any]]]] = {"import": {}, "export": {}}
    for function, args in (
        (import_atoms, "counts caller_positions caller_box caller_atoms units positions boxes"),
        (export_atoms, "counts energies forces caller_atoms units caller_energy caller_forces"),
    ):
        for dtype in ("f32", "f64"):
            types = {"caller_positions": dtype, "caller_box": dtype, "caller_forces": dtype}
            name = plan.launch(f"{function.__name__}.{dtype}", function, warps=4, BLOCK=256)
            stages[function.__name__[:6]][dtype] = [plan.stage(name, args.split(), ["total", 256, 1], dtypes=types)]
    return stages
