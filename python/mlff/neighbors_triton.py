"""Neighbour search on the GPU: the dense one, which looks at all pairs, and the Verlet list (arrays and stages in docs/cuda.md).

Vectors are r_ij = x_j + shift - x_i in float64. Every step of their computation is odd (differences, products, a rounding that is
the same for both signs), so the two directions of a pair have exactly opposite vectors, the same distance to the last bit, and are
kept or dropped together: that each edge has its reverse rests on it. No result depends on the order in which programs run, and nobody
looks at flags and counts before the kernel has ended: so atomics are relaxed, others would wait for all that the program has written.
"""

from typing import Any, Dict, List, Sequence

import triton
import triton.language as tl

from .box_triton import box_row, inverse_rows
from .caller_triton import guess_positions, inverse_of_cell, is_null, load_caller_cell, settle_positions
from .launch_triton import previous_kernel

SKIN = 1.0
"""Angstrom by which lists reach beyond the cutoff."""

_SKIN = tl.constexpr(SKIN)
# Places at the same distance below which no direction is defined.
_COINCIDENT = tl.constexpr(1e-12)  # squared, Angstrom^2
# An entry of a list is the neighbour's row in its low 32 bits and three shifts plus this number of 10 bits each above them.
_BIAS = tl.constexpr(512)
_MIRROR = tl.constexpr(1024 * (1 + 1024 + 1024 * 1024))  # shifts of an entry and of its reverse add up to this
_BINS = tl.constexpr(1 << 20)  # largest number of bins in a direction
_FAR = tl.constexpr(1.0e9)  # cells (or bins) from the origin beyond which float64 places atoms too coarsely


@triton.jit
def _round(x):
    """The nearest whole number, halves to even: the same for both signs, which floor(x + 1/2) is not. |x| < 2^51."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _store_edges(keep, place, row, j, dx, dy, dz, square, other, flags, caller_i, caller_j, neighbors, geometry, distance, reverse,
                 edge_capacity, BLOCK: tl.constexpr):
    """Writes the edges of one block of candidates at their places in the row, and reports atoms at the same place. Returns where, whether
    there is one, its distance, one over it and its unit vector."""
    fits = keep & (place < edge_capacity)
    e = row.to(tl.int64) * edge_capacity + place
    inverse = tl.math.rsqrt(tl.maximum(square, 1e-290))
    d = square * inverse
    u0, u1, u2 = (dx * inverse).to(tl.float32), (dy * inverse).to(tl.float32), (dz * inverse).to(tl.float32)
    first, second = tl.join(u0, u2), tl.join(u1, d.to(tl.float32))
    values = tl.reshape(tl.join(first, second), (BLOCK, 4))  # (u_x, u_y, u_z, d)
    tl.store(geometry + e[:, None] * 4 + tl.arange(0, 4)[None, :], values, mask=fits[:, None])
    tl.store(neighbors + e, j, mask=fits)
    tl.store(distance + e, d, mask=fits)
    tl.store(reverse + e, other, mask=fits)
    # Flags 4 and 5 as one number of 64 bits, so that the two indices are those of one pair.
    pair = (caller_j.to(tl.int64) + 1) * 4294967296 + caller_i.to(tl.int64) + 1
    both = flags.to(tl.pointer_type(tl.int64), bitcast=True) + 2 + tl.zeros([BLOCK], tl.int32)
    tl.atomic_max(both, pair, mask=keep & (square < _COINCIDENT), sem="relaxed")
    return e, fits, d, inverse, u0, u1, u2


@triton.jit
def _bounds(b, starts, images):
    p = images + b * 3
    return tl.load(starts + b), tl.load(starts + b + 1), tl.load(p), tl.load(p + 1), tl.load(p + 2)


@triton.jit
def bounds(b, starts, images):
    """First row of structure b, the row after its last one, and the images to look at in each direction: of the first structure they
    are loaded before it is known which one is wanted, for a small molecule is a chain of latencies."""
    start, end, n0, n1, n2 = _bounds(0, starts, images)
    if b > 0:
        start, end, n0, n1, n2 = _bounds(b, starts, images)
    return start, end, n0, n1, n2


@triton.jit
def search_row(row, n_local, b, element, start, end, n0, n1, n2, limit_d, seen0, seen1, length, narrow, positions, elements, boxes, flags,
               order, species, caller_positions, caller_box, caller_atoms, edge_count, neighbors, geometry, distance, reverse, slot,
               edge_capacity, candidate_capacity, BLOCK: tl.constexpr):
    """Edges of one row among all pairs of its structure b, of which bounds tells. seen: the flags so far. length, narrow: of the caller's
    numbers, where it has arrays on the device.

    Returns how many candidates and how many edges there are, and of the last block of candidates, a thread each, what
    filter_triton.radial_block wants to know.
    """
    width1, width2 = 2 * n1 + 1, 2 * n2 + 1
    per_atom = (2 * n0 + 1) * width1 * width2
    candidates = (end - start) * per_atom
    limit = tl.minimum(candidates, candidate_capacity)
    lane = tl.arange(0, BLOCK)
    # All that the first block needs is loaded before anything is made of it: one latency, not four.
    met = lane + start
    if per_atom > 1:
        met = lane // per_atom + start
    guess = guess_positions(row, True, positions, caller_positions, caller_atoms, narrow)
    atom_j, p_0, p_1, p_2 = guess_positions(met, lane < limit, positions, caller_positions, caller_atoms, narrow)
    known = tl.load(elements + met, mask=lane < limit, other=-1)
    a0, a1, a2 = box_row(boxes, b, 0)
    b0, b1, b2 = box_row(boxes, b, 3)
    c0, c1, c2 = box_row(boxes, b, 6)
    u0, u1, u2 = box_row(boxes, b, 9)
    v0, v1, v2 = box_row(boxes, b, 12)
    w0, w1, w2 = box_row(boxes, b, 15)
    cell = load_caller_cell(caller_box, narrow, length)
    tl.debug_barrier()  # the assembler moves loads behind those that wait for others, but not across this
    x, y, z = settle_positions(guess, row, True, caller_positions, length, narrow)
    if is_null(caller_box) == 0:
        a0, a1, a2, b0, b1, b2, c0, c1, c2 = cell
        u0, u1, u2, v0, v1, v2, w0, w1, w2 = inverse_of_cell(*cell)
    uu, vv, ww = u0 * u0 + u1 * u1 + u2 * u2, v0 * v0 + v1 * v1 + v2 * v2, w0 * w0 + w1 * w1 + w2 * w2
    square_limit = limit_d * limit_d
    itself = (row - start) * per_atom + per_atom // 2
    count = 0
    zero = tl.zeros([BLOCK], tl.float32)
    e, inside, d, inverse, e_0, e_1, e_2, z_j = lane.to(tl.int64), lane < 0, zero.to(tl.float64), zero.to(tl.float64), zero, zero, zero, lane
    for first in range(0, limit, BLOCK):
        c = first + lane
        valid = c < limit
        j = c + start
        m = c * 0
        if per_atom > 1:
            j = c // per_atom + start
            m = c % per_atom
        if first > 0:
            atom_j, p_0, p_1, p_2 = guess_positions(j, valid, positions, caller_positions, caller_atoms, narrow)
            known = tl.load(elements + j, mask=valid, other=-1)
        dx, dy, dz = settle_positions((atom_j, p_0, p_1, p_2), j, valid, caller_positions, length, narrow)
        dx, dy, dz = dx - x, dy - y, dz - z
        if uu + vv + ww != 0:
            k, m2 = m // width2, m % width2
            s0 = (k // width1 - n0) - _round(u0 * dx + u1 * dy + u2 * dz)
            s1 = (k % width1 - n1) - _round(v0 * dx + v1 * dy + v2 * dz)
            s2 = (m2 - n2) - _round(w0 * dx + w1 * dy + w2 * dz)
            dx += s0 * a0 + s1 * b0 + s2 * c0
            dy += s0 * a1 + s1 * b1 + s2 * c1
            dz += s0 * a2 + s1 * b2 + s2 * c2
        square = dx * dx + dy * dy + dz * dz
        keep = valid & (known >= 0) & (element >= 0) & (c != itself) & ((row < n_local) | (j < n_local)) & (square < square_limit)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(slot + row.to(tl.int64) * candidate_capacity + c, tl.where(keep & (place < edge_capacity), place, -1), mask=valid)
        other = (row - start) * per_atom + per_atom - 1 - m
        e, inside, d, inverse, e_0, e_1, e_2 = _store_edges(keep, place, row, j, dx, dy, dz, square, other, flags, row + lane * 0, j, neighbors,
                                                   geometry, distance, reverse, edge_capacity, BLOCK)
        d, inverse, z_j = tl.where(inside, d, 1.0), tl.where(inside, inverse, 1.0), tl.where(inside, known, -1)
        count += tl.sum(keep.to(tl.int32), 0)
    tl.store(order + row, row)
    tl.store(species + row, element)
    tl.store(edge_count + row, tl.minimum(count, edge_capacity))
    tl.atomic_max(flags, count, mask=count > seen0, sem="relaxed")
    if row == start:
        tl.atomic_max(flags + 1, candidates, mask=candidates > seen1, sem="relaxed")
        # n must be at least floor(cutoff |inverse row| + 1/2); the host rounds too, so a difference in the last digits is none.
        h0, h1, h2 = n0 + 0.5, n1 + 0.5, n2 + 0.5
        reach = square_limit * (1.0 - 1e-12)
        # Written so that a box that is not finite has too few as well, and the host looks at it.
        enough = (h0 * h0 >= reach * uu) & (h1 * h1 >= reach * vv) & (h2 * h2 >= reach * ww)
        tl.atomic_max(flags + 6, b + 1, mask=enough == 0, sem="relaxed")
    tl.atomic_max(flags + 3, row + 1, mask=(x + y + z) * 0.0 != 0.0, sem="relaxed")
    return candidates, count, (e, inside, d, inverse, e_0, e_1, e_2, z_j)


@triton.jit
def moved(counts, positions, boxes, reference_positions, reference_box, flags, rebuild, BLOCK: tl.constexpr):
    """Asks for a new list if an atom has moved more than half the skin or a box is another; reports positions not finite."""
    previous_kernel()
    n_total = tl.load(counts + 1)
    atom = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = atom < n_total
    at = atom.to(tl.int64) * 3
    square = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for k in tl.static_range(3):
        x = tl.load(positions + at + k, mask=valid, other=0.0)
        d = x - tl.load(reference_positions + at + k, mask=valid, other=0.0)
        square += d * d
        total += x
    finite = total * 0.0 == 0.0
    tl.atomic_max(flags + 3 + atom * 0, atom + 1, mask=valid & (finite == 0), sem="relaxed")
    # Written so that a reference that is not a number asks for a list too.
    other = valid & finite & ((square <= 0.25 * _SKIN * _SKIN) == 0)
    if tl.max(other.to(tl.int32), 0) > 0:
        tl.store(rebuild, 1)
    size = 18 * tl.load(counts + 2)
    for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        number = first + tl.arange(0, BLOCK)
        box = tl.load(boxes + number, mask=number < size, other=0.0)
        differs = box != tl.load(reference_box + number, mask=number < size, other=0.0)
        if tl.max(differs.to(tl.int32), 0) > 0:
            tl.store(rebuild, 1)


@triton.jit
def grid(counts, positions, starts, boxes, cutoff, rebuild, reference_box, grid_axes, grid_bins, flags, BLOCK: tl.constexpr):
    """Bins of one structure, of at least the reach of the list wherever there is room.

    Directions that are not periodic have unit vectors orthogonal to the others; the atoms' extent is divided there. A structure has
    at most as many bins as atoms, so those of structure b are the bins from starts[b] on, and n_total bins are enough.

    grid_axes f64 [structures, 16]: three rows whose product with a position is the place in a direction, counted in cells or
    Angstrom; what is subtracted from it; bins per unit. grid_bins i32 [structures, 8]: numbers of bins; how many bins the list
    reaches to either side; periodic or not, one bit each.
    """
    previous_kernel()
    if tl.load(rebuild) == 0:
        return
    b = tl.program_id(0)
    if b >= tl.load(counts + 2):
        return
    for k in tl.static_range(18):
        tl.store(reference_box + b * 18 + k, tl.load(boxes + b * 18 + k))
    if b == 0:
        tl.store(flags + 8, 1)
    start, end = tl.load(starts + b), tl.load(starts + b + 1)
    a0, a1, a2 = box_row(boxes, b, 0)
    b0, b1, b2 = box_row(boxes, b, 3)
    c0, c1, c2 = box_row(boxes, b, 6)
    # Bins must be numbers: a box that is not finite counts as none, and the host looks at it.
    finite = (a0 + a1 + a2 + b0 + b1 + b2 + c0 + c1 + c2) * 0.0 == 0.0
    tl.atomic_max(flags + 6, b + 1, mask=finite == 0, sem="relaxed")
    a0, a1, a2 = tl.where(finite, a0, 0.0), tl.where(finite, a1, 0.0), tl.where(finite, a2, 0.0)
    b0, b1, b2 = tl.where(finite, b0, 0.0), tl.where(finite, b1, 0.0), tl.where(finite, b2, 0.0)
    c0, c1, c2 = tl.where(finite, c0, 0.0), tl.where(finite, c1, 0.0), tl.where(finite, c2, 0.0)
    u0, u1, u2, v0, v1, v2, w0, w1, w2 = inverse_rows(a0, a1, a2, b0, b1, b2, c0, c1, c2)
    open0, open1, open2 = (a0 == 0) & (a1 == 0) & (a2 == 0), (b0 == 0) & (b1 == 0) & (b2 == 0), (c0 == 0) & (c1 == 0) & (c2 == 0)
    none = tl.full([BLOCK], 1e300, tl.float64)
    low0, low1, low2, high0, high1, high2 = none, none, none, -none, -none, -none
    if open0 | open1 | open2:
        for first in range(start, end, BLOCK):
            atom = first + tl.arange(0, BLOCK)
            valid = atom < end
            at = positions + atom.to(tl.int64) * 3
            x = tl.load(at, mask=valid, other=0.0)
            y = tl.load(at + 1, mask=valid, other=0.0)
            z = tl.load(at + 2, mask=valid, other=0.0)
            valid = valid & ((x + y + z) * 0.0 == 0.0)
            t0, t1, t2 = u0 * x + u1 * y + u2 * z, v0 * x + v1 * y + v2 * z, w0 * x + w1 * y + w2 * z
            low0, high0 = tl.where(valid & (t0 < low0), t0, low0), tl.where(valid & (t0 > high0), t0, high0)
            low1, high1 = tl.where(valid & (t1 < low1), t1, low1), tl.where(valid & (t1 > high1), t1, high1)
            low2, high2 = tl.where(valid & (t2 < low2), t2, low2), tl.where(valid & (t2 > high2), t2, high2)
    reach = (tl.load(cutoff) + _SKIN) * (1.0 + 1e-9)
    from0, extent0, length0, n0 = _bins(open0, tl.min(low0, 0), tl.max(high0, 0), u0, u1, u2, reach)
    from1, extent1, length1, n1 = _bins(open1, tl.min(low1, 0), tl.max(high1, 0), v0, v1, v2, reach)
    from2, extent2, length2, n2 = _bins(open2, tl.min(low2, 0), tl.max(high2, 0), w0, w1, w2, reach)
    while n0.to(tl.int64) * n1 * n2 > tl.maximum(end - start, 1):
        largest = tl.maximum(n0, tl.maximum(n1, n2))
        half = (largest + 1) // 2
        first0, first1 = n0 == largest, (n0 < largest) & (n1 == largest)
        n0, n1, n2 = tl.where(first0, half, n0), tl.where(first1, half, n1), tl.where(first0 | first1, n2, half)
    axes, bins = grid_axes + b * 16, grid_bins + b * 8
    _store_axis(axes, bins, 0, open0, u0, u1, u2, from0, extent0, length0, n0, reach)
    _store_axis(axes, bins, 1, open1, v0, v1, v2, from1, extent1, length1, n1, reach)
    _store_axis(axes, bins, 2, open2, w0, w1, w2, from2, extent2, length2, n2, reach)
    tl.store(bins + 6, (open0 == 0).to(tl.int32) + 2 * (open1 == 0).to(tl.int32) + 4 * (open2 == 0).to(tl.int32))


@triton.jit
def _bins(is_open, low, high, u0, u1, u2, reach):
    """Where the bins of a direction begin, their extent in its coordinate, its length in Angstrom, and their number."""
    origin = tl.where(is_open & (low <= high), low, 0.0)
    extent = tl.where(is_open, tl.maximum(high - low, 0.0), 1.0)
    length = extent / tl.sqrt(u0 * u0 + u1 * u1 + u2 * u2)
    n = tl.minimum(tl.maximum(tl.floor(length / reach), 1.0), _BINS + 0.0).to(tl.int32)
    return origin, extent, length, n


@triton.jit
def _store_axis(axes, bins, k: tl.constexpr, is_open, u0, u1, u2, origin, extent, length, n, reach):
    tl.store(axes + 3 * k, u0)
    tl.store(axes + 3 * k + 1, u1)
    tl.store(axes + 3 * k + 2, u2)
    tl.store(axes + 9 + k, origin)
    tl.store(axes + 12 + k, tl.where(extent > 0, n / tl.where(extent > 0, extent, 1.0), 0.0))
    tl.store(bins + k, n)
    steps = tl.ceil(reach * n / tl.where(length > 0, length, 1.0))
    one = is_open & (n == 1)
    tl.store(bins + 3 + k, tl.where(one, 0.0, tl.minimum(steps, _BINS + 0.0)).to(tl.int32))


@triton.jit
def _place(axes, bins, b, k: tl.constexpr, x, y, z, valid):
    """Bin of atoms in direction k, the cells to subtract to bring them into the cell, and whether they are near enough for that."""
    axes += b.to(tl.int64) * 16
    u = axes + 3 * k
    t = tl.load(u, mask=valid) * x + tl.load(u + 1, mask=valid) * y + tl.load(u + 2, mask=valid) * z
    near = tl.abs(t) < _FAR  # not true of what is not a number
    t = tl.where(near, t, 0.0)
    periodic = ((tl.load(bins + b * 8 + 6, mask=valid, other=0) >> k) & 1) == 1
    wrap = tl.where(periodic, tl.floor(t), 0.0)
    number = tl.load(bins + b * 8 + k, mask=valid, other=1)
    bin = (t - wrap - tl.load(axes + 9 + k, mask=valid)) * tl.load(axes + 12 + k, mask=valid)
    bin = tl.minimum(tl.maximum(tl.floor(bin), 0.0), number - 1.0)
    return bin.to(tl.int32), wrap.to(tl.int32), near, number


@triton.jit
def bin_count(counts, positions, structure, starts, grid_axes, grid_bins, rebuild, reference_positions, wrap, bin_of, bin_atoms,
              flags, BLOCK: tl.constexpr):
    """Which bin each atom is in, how many are in each bin, and where atoms were when the list was made. In the caller's order."""
    previous_kernel()
    if tl.load(rebuild) == 0:
        return
    atom = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = atom < tl.load(counts + 1)
    at = atom.to(tl.int64) * 3
    x = tl.load(positions + at, mask=valid, other=0.0)
    y = tl.load(positions + at + 1, mask=valid, other=0.0)
    z = tl.load(positions + at + 2, mask=valid, other=0.0)
    b = tl.load(structure + atom, mask=valid, other=0)
    bin0, wrap0, near0, n0 = _place(grid_axes, grid_bins, b, 0, x, y, z, valid)
    bin1, wrap1, near1, n1 = _place(grid_axes, grid_bins, b, 1, x, y, z, valid)
    bin2, wrap2, near2, n2 = _place(grid_axes, grid_bins, b, 2, x, y, z, valid)
    near = near0 & near1 & near2
    bin = tl.load(starts + b, mask=valid, other=0) + (bin0 * n1 + bin1) * n2 + bin2
    tl.atomic_add(bin_atoms + bin, 1, mask=valid, sem="relaxed")
    tl.atomic_max(flags + 3 + atom * 0, atom + 1, mask=valid & (near == 0), sem="relaxed")
    tl.store(bin_of + atom, bin, mask=valid)
    tl.store(wrap + at, wrap0, mask=valid)
    tl.store(wrap + at + 1, wrap1, mask=valid)
    tl.store(wrap + at + 2, wrap2, mask=valid)
    # An atom that could not be placed is taken up again as soon as it is where it can be.
    tl.store(reference_positions + at, tl.where(near, x, float("nan")), mask=valid)
    tl.store(reference_positions + at + 1, y, mask=valid)
    tl.store(reference_positions + at + 2, z, mask=valid)


@triton.jit
def bin_scan(counts, starts, grid_bins, rebuild, bin_atoms, bin_end, BLOCK: tl.constexpr):
    """Where each bin ends in the list of atoms sorted by bins."""
    previous_kernel()
    if tl.load(rebuild) == 0:
        return
    last = tl.maximum(tl.load(counts + 2) - 1, 0)
    bins = grid_bins + last * 8
    used = tl.minimum(tl.load(starts + last) + tl.load(bins) * tl.load(bins + 1) * tl.load(bins + 2), tl.load(counts + 1))
    before = 0
    for first in range(0, used, BLOCK):
        k = first + tl.arange(0, BLOCK)
        number = tl.load(bin_atoms + k, mask=k < used, other=0)
        tl.store(bin_end + k, before + tl.cumsum(number, 0), mask=k < used)
        before += tl.sum(number, 0)


@triton.jit
def bin_fill(counts, rebuild, bin_of, bin_end, bin_atoms, binned, BLOCK: tl.constexpr):
    """Puts the atoms into their bins, in any order. The numbers of atoms count down, so they are zero for the next list."""
    previous_kernel()
    if tl.load(rebuild) == 0:
        return
    atom = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = atom < tl.load(counts + 1)
    bin = tl.load(bin_of + atom, mask=valid, other=0)
    place = tl.load(bin_end + bin, mask=valid, other=0) - tl.atomic_add(bin_atoms + bin, -1, mask=valid, sem="relaxed")
    tl.store(binned + place, atom, mask=valid)


@triton.jit
def bin_sort(counts, rebuild, bin_of, bin_end, binned, order, bin_rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sorts each bin by the atoms' indices (an atom's place is the number of smaller ones), which makes the order of the rows."""
    previous_kernel()
    if tl.load(rebuild) == 0:
        return
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = k < tl.load(counts + 1)
    permute = tl.load(counts + 3) != 0
    atom = tl.load(binned + k, mask=valid, other=0)
    bin = tl.load(bin_of + atom, mask=valid, other=0)
    start = tl.load(bin_end + bin - 1, mask=valid & (bin > 0), other=0)
    size = tl.where(valid, tl.load(bin_end + bin, mask=valid, other=0) - start, 0)
    place = start
    for first in range(0, tl.max(size, 0), BLOCK):
        m = first + tl.arange(0, BLOCK)[None, :]
        inside = m < size[:, None]
        one = tl.load(binned + start[:, None] + m, mask=inside, other=0)
        place += tl.sum((inside & (one < atom[:, None])).to(tl.int32), 1)
    tl.store(order + tl.where(permute, place, atom), atom, mask=valid)
    tl.store(bin_rows + place, tl.where(permute, place, atom), mask=valid)


@triton.jit
def gather(counts, positions, elements, boxes, structure, order, wrap, species, wrapped, BLOCK: tl.constexpr):
    """Positions in the order of the rows, moved into the cell as when the list was made. Ignored atoms are nowhere (NaN)."""
    previous_kernel()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < tl.load(counts + 1)
    atom = tl.load(order + row, mask=valid, other=0)
    at = atom.to(tl.int64) * 3
    box = boxes + tl.load(structure + row, mask=valid, other=0).to(tl.int64) * 18
    element = tl.load(elements + atom, mask=valid, other=-1)
    wrap0 = tl.load(wrap + at, mask=valid, other=0).to(tl.float64)
    wrap1 = tl.load(wrap + at + 1, mask=valid, other=0).to(tl.float64)
    wrap2 = tl.load(wrap + at + 2, mask=valid, other=0).to(tl.float64)
    for k in tl.static_range(3):
        x = tl.load(positions + at + k, mask=valid, other=0.0)
        a, b, c = tl.load(box + k, mask=valid), tl.load(box + 3 + k, mask=valid), tl.load(box + 6 + k, mask=valid)
        x -= wrap0 * a + wrap1 * b + wrap2 * c
        tl.store(wrapped + row.to(tl.int64) * 3 + k, tl.where(element >= 0, x, float("nan")), mask=valid)
    tl.store(species + row, element, mask=valid)


@triton.jit
def _range(b, reach, n, periodic):
    """Bins from b - reach to b + reach, only those that exist if the direction is not periodic."""
    low, high = b - reach, b + reach
    return tl.where(periodic, low, tl.maximum(low, 0)), tl.where(periodic, high, tl.minimum(high, n - 1))


@triton.jit
def list_build(counts, structure, starts, boxes, cutoff, grid_bins, rebuild, order, bin_of, bin_end, bin_rows, wrapped, list_count,
               entries, candidate_capacity, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Atoms and images within the cutoff and the skin of each row, in the order of the bins."""
    previous_kernel()
    if tl.load(rebuild) == 0:
        return
    n_local, n_total = tl.load(counts), tl.load(counts + 1)
    reach = tl.load(cutoff) + _SKIN
    for row in range(tl.program_id(0) * ROWS, tl.minimum(tl.program_id(0) * ROWS + ROWS, n_total)):
        b = tl.load(structure + row)
        start = tl.load(starts + b)
        at = wrapped + tl.cast(row, tl.int64) * 3
        own = entries + tl.cast(row, tl.int64) * candidate_capacity
        x, y, z = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        a0, a1, a2 = box_row(boxes, b, 0)
        b0, b1, b2 = box_row(boxes, b, 3)
        c0, c1, c2 = box_row(boxes, b, 6)
        bins = grid_bins + b * 8
        n0, n1, n2, periodic = tl.load(bins), tl.load(bins + 1), tl.load(bins + 2), tl.load(bins + 6)
        bin = tl.load(bin_of + tl.load(order + row)) - start
        low0, high0 = _range(bin // (n1 * n2), tl.load(bins + 3), n0, (periodic & 1) != 0)
        low1, high1 = _range(bin // n2 % n1, tl.load(bins + 4), n1, (periodic & 2) != 0)
        low2, high2 = _range(bin % n2, tl.load(bins + 5), n2, (periodic & 4) != 0)
        high0 = tl.where(x == x, high0, low0 - 1)  # an ignored atom has no entries
        count = 0
        for d0 in range(low0, high0 + 1):
            s0 = (d0 + _BIAS * n0) // n0 - _BIAS  # cells by which the bins are moved; the quotient is of positive numbers
            for d1 in range(low1, high1 + 1):
                s1 = (d1 + _BIAS * n1) // n1 - _BIAS
                base = start + ((d0 - s0 * n0) * n1 + d1 - s1 * n1) * n2
                # Along the last direction bins follow each other in memory: one run for each image of the cell.
                for s2 in range((low2 + _BIAS * n2) // n2 - _BIAS, (high2 + _BIAS * n2) // n2 - _BIAS + 1):
                    bin_low = base + tl.maximum(low2 - s2 * n2, 0)
                    bin_high = base + tl.minimum(high2 - s2 * n2, n2 - 1)
                    run, run_end = tl.load(bin_end + bin_low - 1, mask=bin_low > 0, other=0), tl.load(bin_end + bin_high)
                    tx, ty, tz = s0 * a0 + s1 * b0 + s2 * c0, s0 * a1 + s1 * b1 + s2 * c1, s0 * a2 + s1 * b2 + s2 * c2
                    image = (s0 + _BIAS) + (s1 + _BIAS) * 1024 + (s2 + _BIAS) * 1048576
                    for first in range(run, run_end, BLOCK):
                        k = first + tl.arange(0, BLOCK)
                        valid = k < run_end
                        j = tl.load(bin_rows + k, mask=valid, other=0)
                        other = wrapped + j.to(tl.int64) * 3
                        dx = tl.load(other, mask=valid, other=0.0) - x + tx
                        dy = tl.load(other + 1, mask=valid, other=0.0) - y + ty
                        dz = tl.load(other + 2, mask=valid, other=0.0) - z + tz
                        itself = (j == row) & (s0 == 0) & (s1 == 0) & (s2 == 0)
                        square = dx * dx + dy * dy + dz * dz
                        keep = valid & (square < reach * reach) & (itself == 0) & ((row < n_local) | (j < n_local))
                        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
                        entry = j.to(tl.int64) + tl.cast(image, tl.int64) * 4294967296
                        tl.store(own + place, entry, mask=keep & (place < candidate_capacity))
                        count += tl.sum(keep.to(tl.int32), 0)
        tl.store(list_count + row, count)


@triton.jit
def list_reverse(counts, rebuild, list_count, entries, list_other, candidate_capacity, ROWS: tl.constexpr, OWN: tl.constexpr,
                 BLOCK: tl.constexpr):
    """For each entry the number of its reverse in the row of the neighbour. Each pair is looked up once, by the smaller row."""
    previous_kernel()
    if tl.load(rebuild) == 0:
        return
    n_total = tl.load(counts + 1)
    for row in range(tl.program_id(0) * ROWS, tl.minimum(tl.program_id(0) * ROWS + ROWS, n_total)):
        own = tl.cast(row, tl.int64) * candidate_capacity
        size = tl.minimum(tl.load(list_count + row), candidate_capacity)
        for first in range(0, size, OWN):
            c = first + tl.arange(0, OWN)
            entry = tl.load(entries + own + c, mask=c < size, other=0)
            j = (entry & 0xFFFFFFFF).to(tl.int32)
            valid = (c < size) & (j >= row)
            wanted = row + (_MIRROR - (entry >> 32)) * 4294967296
            there = j.to(tl.int64) * candidate_capacity
            other_size = tl.minimum(tl.load(list_count + j, mask=valid, other=0), candidate_capacity)
            found = tl.full([OWN], -1, tl.int32)
            for other in range(0, tl.max(other_size, 0), BLOCK):
                k = other + tl.arange(0, BLOCK)[None, :]
                one = tl.load(entries + there[:, None] + k, mask=k < other_size[:, None], other=-1)
                found = tl.maximum(found, tl.max(tl.where(one == wanted[:, None], k, -1), 1))
            # A row that overflowed may lack the entry; then the evaluation is flagged, and the place need only exist.
            tl.store(list_other + own + c, tl.maximum(found, 0), mask=valid)
            tl.store(list_other + there + found, c, mask=valid & (found >= 0))


@triton.jit
def pairs_list(counts, structure, boxes, cutoff, flags, order, wrapped, list_count, entries, list_other, edge_count, neighbors,
               geometry, distance, reverse, slot, edge_capacity, candidate_capacity, BLOCK: tl.constexpr):
    """Edges of one row among the entries of its list."""
    previous_kernel()
    row = tl.program_id(0)
    n_total = tl.load(counts + 1)
    at = wrapped + row.to(tl.int64) * 3
    x, y, z = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    b, candidates, caller = tl.load(structure + row), tl.load(list_count + row), tl.load(order + row)
    limit_d = tl.load(cutoff)
    seen0, seen1 = tl.load(flags), tl.load(flags + 1)
    if row >= n_total:
        return
    a0, a1, a2 = box_row(boxes, b, 0)
    b0, b1, b2 = box_row(boxes, b, 3)
    c0, c1, c2 = box_row(boxes, b, 6)
    limit = tl.minimum(candidates, candidate_capacity)
    own = row.to(tl.int64) * candidate_capacity
    count = 0
    for first in range(0, limit, BLOCK):
        c = first + tl.arange(0, BLOCK)
        valid = c < limit
        entry = tl.load(entries + own + c, mask=valid, other=0)
        other = tl.load(list_other + own + c, mask=valid, other=0)
        j, image = (entry & 0xFFFFFFFF).to(tl.int32), (entry >> 32).to(tl.int32)
        s0 = ((image & 1023) - _BIAS).to(tl.float64)
        s1 = (((image >> 10) & 1023) - _BIAS).to(tl.float64)
        s2 = ((image >> 20) - _BIAS).to(tl.float64)
        to = wrapped + j.to(tl.int64) * 3
        dx = tl.load(to, mask=valid, other=0.0) - x + (s0 * a0 + s1 * b0 + s2 * c0)
        dy = tl.load(to + 1, mask=valid, other=0.0) - y + (s0 * a1 + s1 * b1 + s2 * c1)
        dz = tl.load(to + 2, mask=valid, other=0.0) - z + (s0 * a2 + s1 * b2 + s2 * c2)
        square = dx * dx + dy * dy + dz * dz
        keep = valid & (square < limit_d * limit_d)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(slot + own + c, tl.where(keep & (place < edge_capacity), place, -1), mask=valid)
        caller_j = tl.load(order + j, mask=keep & (square < _COINCIDENT), other=0)
        _store_edges(keep, place, row, j, dx, dy, dz, square, other, flags, caller + c * 0, caller_j, neighbors, geometry, distance,
                     reverse, edge_capacity, BLOCK)
        count += tl.sum(keep.to(tl.int32), 0)
    tl.store(edge_count + row, tl.minimum(count, edge_capacity))
    tl.atomic_max(flags, count, mask=count > seen0, sem="relaxed")
    tl.atomic_max(flags + 1, candidates, mask=candidates > seen1, sem="relaxed")


def search_buffers(plan) -> None:
    """Declares the edges and what the list search keeps (rows of its arrays: r in the order of the rows, a in the caller's)."""
    for name, rows, width, dtype in (
        ("order", "total", 1, "i32"),
        ("species", "total", 1, "i32"),
        ("edge_count", "total", 1, "i32"),
        ("neighbors", "edges", 1, "i32"),
        ("geometry", "edges", 4, "f32"),
        ("distance", "edges", 1, "f64"),
        ("reverse", "edges", 1, "i32"),
        ("slot", "candidates", 1, "i32"),
        ("list_count", "total", 1, "i32"),  # r: entries of a row, also those that found no room
        ("entries", "candidates", 1, "i64"),  # neighbour's row and shift, packed
        ("list_other", "candidates", 1, "i32"),  # number of the reverse entry in the row of the neighbour
        ("wrapped", "total", 3, "f64"),  # r
        ("wrap", "total", 3, "i32"),  # a: cells to subtract
        ("reference_positions", "total", 3, "f64"),  # a: when the list was made
        ("reference_box", "structures", 18, "f64"),
        ("grid_axes", "structures", 16, "f64"),
        ("grid_bins", "structures", 8, "i32"),
        ("bin_of", "total", 1, "i32"),  # a
        ("bin_atoms", "bins", 1, "i32"),  # zero but while a list is made
        ("bin_end", "bins", 1, "i32"),
        ("binned", "total", 1, "i32"),  # atoms by bins, unsorted
        ("bin_rows", "total", 1, "i32"),  # rows by bins, sorted
    ):
        plan.buffer(name, rows, width, dtype)


# Arguments of a search among all pairs, before EDGES.
DENSE = "counts positions elements structure starts boxes images cutoff flags order species caller_positions caller_box caller_atoms units"
PLACES = ["edge_capacity", "candidate_capacity"]
EDGES = ["edge_count", "neighbors", "geometry", "distance", "reverse", "slot", *PLACES]


def search_stages(plan, dense: List[Dict[str, Any]]) -> Dict[str, List[Dict[str, Any]]]:
    """Launches and stages of both searches. dense: of that among all pairs, whose kernels are made of search_row.

    The dense search spreads a row over several warps, since small molecules leave most of a GPU idle; the list has one row per
    warp, so that counting edges needs no barrier. Kernels of the list that mostly return at once have several rows per program,
    because starting programs is then all they cost.
    """
    atoms, block = ["total", 256, 1], {"warps": 4, "BLOCK": 256}

    def stage(function, args: str, grid: List[Any], more: Sequence[str] = (), warps: int = 4, **constants) -> Dict[str, Any]:
        return plan.stage(plan.launch(function.__name__, function, warps=warps, **constants), [*args.split(), *more], grid)

    args = "counts positions boxes reference_positions reference_box flags rebuild"
    made = [stage(moved, args, atoms, **block)]
    args = "counts positions starts boxes cutoff rebuild reference_box grid_axes grid_bins flags"
    made.append(stage(grid, args, ["structures", 1, 1], warps=8, BLOCK=1024))
    args = "counts positions structure starts grid_axes grid_bins rebuild reference_positions wrap bin_of bin_atoms flags"
    made.append(stage(bin_count, args, atoms, **block))
    made.append(stage(bin_scan, "counts starts grid_bins rebuild bin_atoms bin_end", ["one", 1, 1], warps=8, BLOCK=2048))
    made.append(stage(bin_fill, "counts rebuild bin_of bin_end bin_atoms binned", atoms, **block))
    args = "counts rebuild bin_of bin_end binned order bin_rows"
    made.append(stage(bin_sort, args, ["total", 32, 1], warps=4, ROWS=32, BLOCK=32))
    made.append(stage(gather, "counts positions elements boxes structure order wrap species wrapped", atoms, **block))
    args = "counts structure starts boxes cutoff grid_bins rebuild order bin_of bin_end bin_rows wrapped list_count entries"
    made.append(stage(list_build, args, ["total", 4, 1], PLACES[1:], warps=1, ROWS=4, BLOCK=32))
    args = "counts rebuild list_count entries list_other"
    made.append(stage(list_reverse, args, ["total", 4, 1], PLACES[1:], warps=1, ROWS=4, OWN=8, BLOCK=64))
    args = "counts structure boxes cutoff flags order wrapped list_count entries list_other"
    made.append(stage(pairs_list, args, ["total", 1, 1], EDGES, warps=1, BLOCK=32))
    return {"dense": dense, "list": made}
