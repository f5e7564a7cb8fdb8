"""The gradient of the edges; forces, virials and energies from it (docs/cuda.md)."""

from typing import Any, Dict, List, Optional

import triton
import triton.language as tl

from .caller_triton import is_null
from .dense_triton import GRADIENT
from .filter_triton import basis_columns, cosine_cutoff, envelope, first_wave, stack, switch
from .launch_triton import finished, previous_kernel
from .plan import SMALL

PARTS = 128  # programs that sum the rows of one large structure
_PARTS = tl.constexpr(PARTS)


@triton.jit
def _failed(flags, edge_capacity, candidate_capacity):
    """Whether edges are missing or cannot be trusted (flags 0, 1, 3 to 6)."""
    places = (tl.load(flags + 3) | tl.load(flags + 4) | tl.load(flags + 5) | tl.load(flags + 6)) != 0
    return (tl.load(flags) > edge_capacity) | (tl.load(flags + 1) > candidate_capacity) | places


@triton.jit
def load_fours(rows, e, mask, BLOCK: tl.constexpr):
    """The four numbers of rows e of an array [.., 4], by one load each."""
    values = tl.load(rows + e[:, None] * 4 + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(values, (BLOCK, 2, 2)))
    x, z = tl.split(even)
    y, w = tl.split(odd)
    return x, y, z, w


@triton.jit
def edge_gradient(
    counts, species, edge_count, neighbors, geometry, distance, cutoff, pair_table, g_moments, pair_gradient, repulsion_slope, gradient,
    edge_capacity, gaussians, S: tl.constexpr, K: tl.constexpr, SKP: tl.constexpr, SLICES: tl.constexpr, BE: tl.constexpr, COSINE: tl.constexpr,
):
    """gradient f32 [edges, 4]: dE/dr of every edge of local rows: first layer, repulsion, and what message_backward collected.

    SLICES: of pair_gradient, 0 if there is one message layer only. gaussians, COSINE: as in filter_triton.radial. One edge a thread,
    which makes its radial basis again: that takes less time than to read it.
    """
    i = tl.program_id(0)
    n_local, n, scale = tl.load(counts), tl.load(edge_count + i), 1.0 / tl.load(cutoff)
    wave = (3.141592653589793 * scale).to(tl.float32)
    z_i = tl.maximum(tl.load(species + i), 0)
    n = tl.where(i < n_local, n, 0)
    for start in range(0, tl.maximum(n, 1), BE):
        place = start + tl.arange(0, BE)
        inside = place < n
        e = i.to(tl.int64) * edge_capacity + place
        # Loads that others depend on do not wait for the number of edges: what is left over in a row names rows too.
        z = tl.maximum(tl.load(species + tl.load(neighbors + e, mask=place < edge_capacity, other=0)), 0)
        u_0 = tl.load(geometry + e * 4, mask=inside, other=0.0)
        u_1 = tl.load(geometry + e * 4 + 1, mask=inside, other=0.0)
        u_2 = tl.load(geometry + e * 4 + 2, mask=inside, other=0.0)
        d = tl.load(distance + e, mask=inside, other=1.0)
        g_d = tl.load(repulsion_slope + e, mask=inside, other=0.0) * GRADIENT
        g_0, g_1, g_2 = g_d * 0.0, g_d * 0.0, g_d * 0.0
        for slice in tl.static_range(SLICES):
            from_d, from_0, from_1, from_2 = load_fours(pair_gradient, e * SLICES + slice, inside, BE)
            g_d, g_0, g_1, g_2 = g_d + from_d, g_0 + from_0, g_1 + from_1, g_2 + from_2
        x = tl.minimum(d * scale, 1.0)
        if COSINE:
            f64, df64 = cosine_cutoff(x)
        else:
            f64, df64 = envelope(x)
        f, df, inverse = f64.to(tl.float32), (df64 * scale).to(tl.float32), 1.0 / d.to(tl.float32)
        w, dw = switch(d.to(tl.float32), tl.load(pair_table + (z_i * S + z) * 3 + 2).to(tl.float32))
        f, df = w * f, w * df + dw * f
        sine_1, cosine_1 = first_wave(x)
        b, db = basis_columns(d, inverse, f, df, wave, sine_1, cosine_1, gaussians, K, K)
        finished(*b, *db)
        previous_kernel()
        m = g_moments + i.to(tl.int64) * (4 * SKP) + z * K
        for k in tl.static_range(K):
            m_1, m_2, m_3 = tl.load(m + SKP + k), tl.load(m + 2 * SKP + k), tl.load(m + 3 * SKP + k)
            g_d += db[k] * (tl.load(m + k) + u_0 * m_1 + u_1 * m_2 + u_2 * m_3)
            g_0 += b[k] * m_1
            g_1 += b[k] * m_2
            g_2 += b[k] * m_3
        along = g_d - (g_0 * u_0 + g_1 * u_1 + g_2 * u_2) * inverse
        values = stack((along * u_0 + g_0 * inverse, along * u_1 + g_1 * inverse, along * u_2 + g_2 * inverse, 0.0 * along))
        tl.store(gradient + e[:, None] * 4 + tl.arange(0, 4)[None, :], tl.reshape(values, (BE, 4)) * (1.0 / GRADIENT), mask=inside[:, None])
    previous_kernel()


@triton.jit
def _store_vector(pointer, x, y, z):
    tl.store(pointer, x)
    tl.store(pointer + 1, y)
    tl.store(pointer + 2, z)


@triton.jit
def _add(a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8


@triton.jit
def _store_sums(sums, caller, failed, forces, atom_virial, caller_forces, atom, unit, narrow):
    """Force and virial of one row from its sums of x, y, z and minus two xx, yy, zz, four xy, xz, yz over pairs; and the force in the
    caller's unit at its row ``atom``, if it has one; narrow: as float32."""
    f0, f1, f2, xx, yy, zz, xy, xz, yz = tl.reduce(sums, 0, _add)
    nothing = tl.where(failed, float("nan"), 0.0).to(tl.float64)
    f0, f1, f2 = f0 + nothing, f1 + nothing, f2 + nothing
    _store_vector(forces + caller.to(tl.int64) * 3, f0, f1, f2)
    virial = atom_virial + caller.to(tl.int64) * 6
    _store_vector(virial, -0.5 * xx + nothing, -0.5 * yy + nothing, -0.5 * zz + nothing)
    _store_vector(virial + 3, -0.25 * xy + nothing, -0.25 * xz + nothing, -0.25 * yz + nothing)
    if is_null(caller_forces) == 0:
        place = atom.to(tl.int64) * 3
        if narrow:
            out = caller_forces.to(tl.pointer_type(tl.float32), bitcast=True) + place
            _store_vector(out, (f0 * unit).to(tl.float32), (f1 * unit).to(tl.float32), (f2 * unit).to(tl.float32))
        else:
            _store_vector(caller_forces + place, f0 * unit, f1 * unit, f2 * unit)


@triton.jit
def forces(counts, flags, order, edge_count, neighbors, reverse, slot, geometry, gradient, forces, atom_virial, caller_forces, caller_atoms,
           units, edge_capacity, candidate_capacity, BLOCK: tl.constexpr):
    """Force (eV/Angstrom) and virial (eV) of one row, local or ghost; the force in the caller's units and type too, where it has arrays
    on the device.

    With q_e = dE/dr_ij of edge e of a local row i: F_i = sum over the edges of row i of ([i local] q_e - [j local] q_e'), where
    e' is the edge the other way, and W_i = -1/2 sum r_e (x) the same, symmetrised. Summed in float64, always in the same order.
    """
    row = tl.program_id(0)
    n_local, n_total = tl.load(counts), tl.load(counts + 1)
    number, caller = tl.load(edge_count + row), tl.load(order + row)
    failed = _failed(flags, edge_capacity, candidate_capacity)
    atom, unit, narrow = tl.load(caller_atoms + caller), tl.load(units + 2), tl.load(units + 3) != 0
    number = tl.where(row < n_total, number, 0)
    zero = tl.zeros([BLOCK], tl.float64)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for first in range(0, tl.maximum(number, 1), BLOCK):
        # Loads that others depend on do not wait for the number of edges: what is left over in a row names rows and candidates too.
        k = first + tl.arange(0, BLOCK)
        inside, valid = k < edge_capacity, k < number
        e = row.to(tl.int64) * edge_capacity + k
        j = tl.load(neighbors + e, mask=inside, other=0)
        c = tl.load(reverse + e, mask=inside, other=0)
        u0, u1, u2, d = load_fours(geometry, e, inside, BLOCK)
        place = tl.load(slot + j.to(tl.int64) * candidate_capacity + c, mask=c < candidate_capacity, other=-1)
        back = valid & (j < n_local) & (place >= 0)
        previous_kernel()
        p0, p1, p2, _ = load_fours(gradient, e, valid & (row < n_local), BLOCK)
        q0, q1, q2, _ = load_fours(gradient, j.to(tl.int64) * edge_capacity + place, back, BLOCK)
        g0, g1, g2 = p0.to(tl.float64) - q0, p1.to(tl.float64) - q1, p2.to(tl.float64) - q2
        r0, r1, r2 = d.to(tl.float64) * u0, d.to(tl.float64) * u1, d.to(tl.float64) * u2
        sums = _add(*sums, g0, g1, g2, r0 * g0, r1 * g1, r2 * g2, r0 * g1 + r1 * g0, r0 * g2 + r2 * g0, r1 * g2 + r2 * g1)
    previous_kernel()
    if row >= n_total:
        return
    _store_sums(sums, caller, failed, forces, atom_virial, caller_forces, atom, unit, narrow)


@triton.jit
def _sums_and_largest(a, m, b, n):
    return a + b, tl.maximum(m, n)


@triton.jit
def _virials_and_energies(row, end, n_local, order, row_energy, atom_virial, atom_energy, failed, BACKWARD: tl.constexpr):
    """Of rows [BLOCK, 1] before ``end``, [BLOCK, 8]: the virial and in column 6 the energy, which is written in the caller's order too; and
    where one of them is not finite, one more than the caller's index of the atom, unless something else explains it."""
    column = tl.arange(0, 8)[None, :]
    inside, is_energy = row < end, column == 6
    wanted = inside & is_energy & (row < n_local)
    if BACKWARD:
        wanted = wanted | (inside & (column < 6))
    caller = tl.load(order + row, mask=inside, other=0)
    values = tl.load(tl.where(is_energy, row_energy + row + 0 * column, atom_virial + row.to(tl.int64) * 6 + column), mask=wanted, other=0.0)
    tl.store(atom_energy + caller + 0 * column, tl.where(failed, float("nan"), values), mask=inside & is_energy)
    return values, tl.where((values * 0.0 != 0.0) & (failed == 0), caller + 1, 0)


@triton.jit
def total_partial(counts, flags, order, row_energy, atom_virial, atom_energy, partial, edge_capacity, candidate_capacity,
                  BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Energies of atoms, and the sums over one of PARTS ranges of rows: partial f64 [PARTS, 8], the virial and the energy."""
    previous_kernel()
    n_local, n_total = tl.load(counts), tl.load(counts + 1)
    failed = _failed(flags, edge_capacity, candidate_capacity)
    part = tl.program_id(0)
    size = tl.cdiv(tl.cdiv(n_total, _PARTS), BLOCK) * BLOCK
    begin, end = tl.minimum(part * size, n_total), tl.minimum((part + 1) * size, n_total)
    column = tl.arange(0, 8)
    if begin >= end:
        tl.store(partial + part * 8 + column, tl.zeros([8], tl.float64))
        return
    sums = tl.zeros([BLOCK, 8], tl.float64)
    not_finite = tl.zeros([BLOCK, 8], tl.int32)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)[:, None]
        values, found = _virials_and_energies(row, end, n_local, order, row_energy, atom_virial, atom_energy, failed, BACKWARD)
        sums, not_finite = _sums_and_largest(sums, not_finite, values, found)
    sums, worst = tl.reduce((sums, not_finite), 0, _sums_and_largest)
    tl.store(partial + part * 8 + column, sums)
    tl.atomic_max(flags + 7 + 0 * column, worst, mask=worst > 0)


@triton.jit
def total(counts, starts, flags, rebuild, order, row_energy, atom_virial, partial, energies, virials, atom_energy, status, caller_energy, units,
          edge_capacity, candidate_capacity, BACKWARD: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr):
    """Energy and virial of one structure, and the energy of the first one in the caller's units, where it has arrays on the device; the
    last program to finish hands over the flags and clears them.

    PARTIAL: total_partial has run, so the sums of one structure are those of its parts.
    """
    b = tl.program_id(0)
    structures, n_local = tl.load(counts + 2), tl.load(counts)
    begin, end = tl.load(starts + b), tl.load(starts + b + 1)
    unit = tl.load(units + 1)
    previous_kernel()
    flag, column = tl.arange(0, 16), tl.arange(0, 8)
    seen = tl.load(flags + flag)
    failed = _failed(flags, edge_capacity, candidate_capacity)
    if b >= structures:
        return
    sums = tl.zeros([BLOCK, 8], tl.float64)
    not_finite = tl.zeros([BLOCK, 8], tl.int32)
    if PARTIAL:
        if structures == 1:
            begin, end = 0 * begin, 0 * end
            part = tl.arange(0, _PARTS)[:, None]
            sums += tl.load(partial + part * 8 + column[None, :])
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)[:, None]
        values, found = _virials_and_energies(row, end, n_local, order, row_energy, atom_virial, atom_energy, failed, BACKWARD)
        sums, not_finite = _sums_and_largest(sums, not_finite, values, found)
    sums, not_finite = tl.reduce((sums, not_finite), 0, _sums_and_largest)
    sums = tl.where(failed, float("nan"), sums)
    tl.store(energies + b + 0 * column, sums, mask=column == 6)
    if BACKWARD:
        tl.store(virials + b.to(tl.int64) * 6 + column, sums, mask=column < 6)
    if b == 0:
        if is_null(caller_energy) == 0:
            tl.store(caller_energy + 0 * column, sums * unit, mask=column == 6)
    worst = tl.max(not_finite, 0)
    last = structures == 1
    if structures > 1:  # flag 15 counts the programs that no longer need the flags
        tl.atomic_max(flags + 7, worst, mask=worst > 0)
        tl.debug_barrier()  # what this program reported is there
        last = tl.atomic_add(flags + 15, 1) == structures - 1
        if last:
            seen = tl.atomic_xchg(flags + flag, flag * 0)
    if last:
        tl.store(status + flag, tl.where(flag == 7, tl.maximum(seen, worst), tl.where(flag < 15, seen, 0)))
        tl.store(flags + flag, flag * 0)
        tl.store(rebuild, 0)


CAPACITIES = ["edge_capacity", "candidate_capacity"]


def _carveout(large: bool) -> Optional[int]:
    return None if large else SMALL.carveout


def forces_stage(plan, large: bool) -> Dict[str, Any]:
    """Forces from the buffer ``gradient`` f32 [edges, 4], which the plan must have."""
    warps = 1 if large else 2  # few atoms leave most of a GPU idle
    name = plan.launch(f"forces.{'large' if large else 'small'}", forces, warps=warps, carveout=_carveout(large), BLOCK=32 * warps)
    args = "counts flags order edge_count neighbors reverse slot geometry gradient forces atom_virial caller_forces caller_atoms units"
    return plan.stage(name, [*args.split(), *CAPACITIES], ["total", 1, 1], "backward")


def total_stages(plan, large: bool) -> List[Dict[str, Any]]:
    """The last stages of a schedule. large: with a kernel more, which sums the rows of one structure in parts.

    Reads the buffer ``row_energy`` f64 [local], which the plan must have.
    """
    if not any(b["name"] == "partial" for b in plan.buffers):
        plan.buffer("partial", "one", 8 * PARTS, "f64")
    stages = []
    for kind in ("backward", "energy"):
        backward = kind == "backward"
        if large:
            name = plan.launch(f"total_partial.{kind}", total_partial, warps=4, BACKWARD=backward, BLOCK=128)
            args = "counts flags order row_energy atom_virial atom_energy partial"
            stages.append(plan.stage(name, [*args.split(), *CAPACITIES], ["one", 1, PARTS], kind))
        name = f"total.{kind}.{'large' if large else 'small'}"
        plan.launch(name, total, warps=4, carveout=_carveout(large), BACKWARD=backward, PARTIAL=large, BLOCK=128)
        args = "counts starts flags rebuild order row_energy atom_virial partial energies virials atom_energy status caller_energy units"
        stages.append(plan.stage(name, [*args.split(), *CAPACITIES], ["structures", 1, 1], kind))
    return stages
