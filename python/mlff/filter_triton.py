"""Radial basis, moments of the first layer and short range on the GPU (equations in filter.py, message.py and repulsion.py)."""

import triton
import triton.language as tl

from .launch_triton import previous_kernel
from .neighbors_triton import bounds, search_row


@triton.jit
def envelope(x):
    """Polynomial cutoff f(x) and df/dx on [0, 1], zero beyond (filter.cutoff_envelope)."""
    x = tl.minimum(x, 1.0)
    x5 = x * x * x * x * x
    return 1.0 + x5 * x * (-28.0 + x * (48.0 - 21.0 * x)), x5 * (-168.0 + x * (336.0 - 168.0 * x))


@triton.jit
def switch(d, radius):
    """What is left of the network, and its derivative (repulsion.switch); all of it where the radius is 0."""
    width = tl.maximum(radius * 0.2, 1e-30)
    t = tl.minimum(tl.maximum((radius - d) / width, 0.0), 1.0)
    rest = 1.0 - t
    return 1.0 - t * t * t * t * (35.0 - t * (84.0 - t * (70.0 - 20.0 * t))), 140.0 * t * t * t * rest * rest * rest / width


@triton.jit
def zbl(d, inverse, prefactor, inverse_length, w, dw):
    """Half pair energy in eV and its derivative (repulsion.repulsion); inverse: 1 / d; w, dw: of switch."""
    phi = d * 0.0
    dphi = d * 0.0
    for term in tl.static_range(4):
        coefficient = 0.18175 if term == 0 else 0.50986 if term == 1 else 0.28022 if term == 2 else 0.02817
        exponent = (3.19980 if term == 0 else 0.94229 if term == 1 else 0.40290 if term == 2 else 0.20162) * inverse_length
        value = coefficient * tl.exp(-exponent * d)
        phi += value
        dphi -= exponent * value
    phi, dphi = prefactor * inverse * phi, prefactor * inverse * (dphi - inverse * phi)
    return phi * (1.0 - w), dphi * (1.0 - w) - phi * dw


@triton.jit
def first_wave(x):
    """sin and cos of pi x in float64 for x in [0, 1], to 1e-13: Taylor series about the middle."""
    y = 3.141592653589793 * (x - 0.5)
    z = y * y
    sine, cosine = z * 0.0 + 1.0, z * 0.0 + 1.0
    for n in tl.static_range(9, 0, -1):
        sine = 1.0 - sine * (z * (1.0 / (2 * n * (2 * n + 1))))
        cosine = 1.0 - cosine * (z * (1.0 / (2 * n * (2 * n - 1))))
    return cosine, -y * sine


@triton.jit
def cosine_cutoff(x):
    """Cosine cutoff f(x) and df/dx on [0, 1] (filter.cosine_cutoff)."""
    sine, cosine = first_wave(0.5 * (1.0 - x))
    return sine * sine, -3.141592653589793 * sine * cosine


@triton.jit
def next_wave(sine, cosine, sine_1, cosine_1):
    """sin and cos of a sum of two angles, from those of both."""
    return sine * cosine_1 + cosine * sine_1, cosine * cosine_1 - sine * sine_1


@triton.jit
def gaussian_of(k: tl.constexpr, gaussians, d, f, df):
    """Row k of a radial basis of Gaussians and its derivative, f32 (filter.radial_basis), from d in float64, and the cutoff's f and
    df/dd. A difference of distances keeps its digits in float64 alone; what the exponential makes of it needs no more than float32."""
    steepness = tl.load(gaussians + 2 * k + 1)
    x = ((d - tl.load(gaussians + 2 * k)) * steepness).to(tl.float32)
    bell = tl.exp(-0.5 * x * x)
    return bell * f, bell * (df - x * steepness.to(tl.float32) * f)


@triton.jit
def basis_of(k: tl.constexpr, K: tl.constexpr, sine, cosine, inverse, f, df, wave):
    """Row k of the radial basis and its derivative, f32, from the sine and cosine of pi (k + 1) d / rc, 1 / d, the cutoff's f and
    df/dd, and pi / rc. The last row is the cutoff alone."""
    if k == K - 1:
        return f, df
    else:
        shape = sine.to(tl.float32) * inverse
        return shape * f, ((wave * (k + 1.0)) * cosine.to(tl.float32) - shape) * inverse * f + shape * df


@triton.jit
def basis_columns(d, inverse, f, df, wave, sine_1, cosine_1, gaussians, K: tl.constexpr, N: tl.constexpr):
    """N columns of the radial basis and as many of its derivative, zero from K on. sine_1, cosine_1: of pi d / rc; the others as basis_of
    and gaussian_of have them."""
    sine, cosine = sine_1, cosine_1
    # From the one before the last: half as long a chain of numbers that wait for each other.
    sine_2, cosine_2 = next_wave(sine_1, cosine_1, sine_1, cosine_1)
    next_sine, next_cosine = sine_2, cosine_2
    b, db = (), ()
    for k in tl.static_range(N):
        one, one_slope = f * 0.0, f * 0.0
        if k < K:
            if gaussians is None:
                one, one_slope = basis_of(k, K, sine, cosine, inverse, f, df, wave)
                after_sine, after_cosine = next_wave(sine, cosine, sine_2, cosine_2)
                sine, cosine, next_sine, next_cosine = next_sine, next_cosine, after_sine, after_cosine
            else:
                one, one_slope = gaussian_of(k, gaussians, d, f, df)
        b, db = b + (one,), db + (one_slope,)
    return b, db


@triton.jit
def stack(columns):
    """[N, 2, 2, ...] of a tuple of columns [N], a power of two of them."""
    if len(columns) == 1:
        return columns[0]
    else:
        return tl.join(stack(columns[0::2]), stack(columns[1::2]))


@triton.jit
def pair_of_halves(columns, BE: tl.constexpr, N: tl.constexpr):
    """A tuple of N columns [BE] as matrices hi, lo [BE, N] of halves."""
    values = tl.reshape(stack(columns), (BE, N))
    hi = values.to(tl.float16)
    return hi, (values - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def store_halves(rows, e, columns, mask, BE: tl.constexpr, KB: tl.constexpr, STEP: tl.constexpr):
    """Writes KB columns of rows e as pairs of halves [hi, lo] (docs/cuda.md), STEP at a time. All of them at once fill whole lines of memory;
    8 of them are what one thread writes of its own row, and need no exchange between threads, whose barriers few edges cannot hide."""
    for k in tl.static_range(0, KB, STEP):
        hi, lo = pair_of_halves(columns[k : k + STEP], BE, STEP)
        at = rows + e[:, None] * (2 * KB) + (k + tl.arange(0, STEP))[None, :]
        tl.store(at, hi, mask=mask[:, None])
        tl.store(at + KB, lo, mask=mask[:, None])


@triton.jit
def radial_block(
    e, inside, d, inverse64, u0, u1, u2, z_i, z_j, scale, energy, sums, pair_table, basis, slope, repulsion_slope, gaussians, S: tl.constexpr,
    K: tl.constexpr, KB: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr, COSINE: tl.constexpr, STEP: tl.constexpr,
):
    """What radial says of BE edges e with distances d and 1 / d, unit vectors u and elements z_j of the neighbours, -1 where there is no edge.
    Returns energy [BE] and sums [ROWS, KB], the moments, with what these add to them."""
    wave = (3.141592653589793 * scale).to(tl.float32)
    row = tl.arange(0, ROWS)
    axis, z = (row // S)[:, None], (row % S)[:, None]
    pair = pair_table + (z_i * S + tl.maximum(z_j, 0)) * 3
    radius = tl.load(pair + 2)
    x = tl.minimum(d * scale, 1.0)  # what does not need the radius, while that is on its way
    if COSINE:
        f64, df64 = cosine_cutoff(x)
    else:
        f64, df64 = envelope(x)
    sine_1, cosine_1 = first_wave(x)
    close = inside & (d < radius)
    value, derivative, w, dw = d * 0.0, d * 0.0, d * 0.0 + 1.0, d * 0.0
    if tl.max(close.to(tl.int32), 0) > 0:
        w, dw = switch(d, radius)
        value, derivative = zbl(d, inverse64, tl.load(pair), tl.load(pair + 1), w, dw)
    energy += tl.where(close, value, 0.0)
    tl.store(repulsion_slope + e, tl.where(close, derivative, 0.0).to(tl.float32), mask=inside)
    f, df, inverse = (w * f64).to(tl.float32), (w * df64 * scale + dw * f64).to(tl.float32), inverse64.to(tl.float32)
    b, db = basis_columns(d, inverse, f, df, wave, sine_1, cosine_1, gaussians, K, KB)
    store_halves(basis, e, b, inside, BE, KB, STEP)
    store_halves(slope, e, db, inside, BE, KB, STEP)
    hi, lo = pair_of_halves(b, BE, KB)

    factor = tl.where(axis == 0, 1.0, tl.where(axis == 1, u0[None, :], tl.where(axis == 2, u1[None, :], u2[None, :])))
    factor = tl.where((z == z_j[None, :]) & (axis < 4), factor, 0.0)
    factor_hi = factor.to(tl.float16)
    factor_lo = (factor - factor_hi.to(tl.float32)).to(tl.float16)
    return energy, tl.dot(factor_hi, hi, tl.dot(factor_hi, lo, tl.dot(factor_lo, hi, sums)))


@triton.jit
def load_edges(first, start, n, elements, neighbors, geometry, distance, BE: tl.constexpr):
    """Of a block of the n edges that begin at first: e, whether there is one, d, 1 / d, u, z_j, as radial_block wants them."""
    inside = start + tl.arange(0, BE) < n
    e = first + start + tl.arange(0, BE)
    d = tl.load(distance + e, mask=inside, other=1.0)
    u0 = tl.load(geometry + e * 4, mask=inside, other=0.0)
    u1 = tl.load(geometry + e * 4 + 1, mask=inside, other=0.0)
    u2 = tl.load(geometry + e * 4 + 2, mask=inside, other=0.0)
    z_j = tl.load(elements + tl.load(neighbors + e, mask=inside, other=0), mask=inside, other=-1)
    return e, inside, d, 1.0 / d, u0, u1, u2, z_j


@triton.jit
def store_row(i, energy, sums, repulsion_energy, moments, S: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, SKP: tl.constexpr,
              ROWS: tl.constexpr):
    """Writes what radial_block has summed over the edges of row i."""
    tl.store(repulsion_energy + i, tl.sum(energy, 0))
    row, k = tl.arange(0, ROWS), tl.arange(0, KB)
    out = moments + i.to(tl.int64) * (4 * SKP) + ((row // S) * SKP + (row % S) * K)[:, None] + k[None, :]
    tl.store(out, sums, mask=(row < 4 * S)[:, None] & (k < K)[None, :])


@triton.jit
def radial(
    counts, species, edge_count, neighbors, geometry, distance, cutoff, pair_table, basis, slope, moments, repulsion_energy,
    repulsion_slope, edge_capacity, gaussians, S: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, SKP: tl.constexpr, ROWS: tl.constexpr,
    BE: tl.constexpr, COSINE: tl.constexpr,
):
    """Everything of a row that depends on distances and elements alone.

    basis, slope: f16 [edges, 2 KB], B(d) and dB/dd as pairs of halves. moments: f32 [local, 4 SKP], sums over neighbours of
    element z of B_k (1, u_x, u_y, u_z) at [a, z K + k]. repulsion_energy: f64 [local], repulsion_slope: f32 [edges]. gaussians:
    f64 [K, 2] (filter.gaussian_rows), None for Bessel functions. KB and ROWS: K and 4 S rounded up to a power of two, at least 16.
    COSINE: the cutoff function is the cosine, not the polynomial.

    One edge a thread, which turns its sine and cosine from one multiple of the angle to the next in float64.
    """
    i = tl.program_id(0)
    n_local, scale = tl.load(counts), 1.0 / tl.load(cutoff)
    previous_kernel()
    if i >= n_local:
        return
    n = tl.load(edge_count + i)
    z_i = tl.maximum(tl.load(species + i), 0)
    first = i.to(tl.int64) * edge_capacity
    energy, sums = tl.zeros([BE], tl.float64), tl.zeros([ROWS, KB], tl.float32)
    for start in range(0, n, BE):
        e, inside, d, inverse, u0, u1, u2, z_j = load_edges(first, start, n, species, neighbors, geometry, distance, BE)
        energy, sums = radial_block(e, inside, d, inverse, u0, u1, u2, z_i, z_j, scale, energy, sums, pair_table, basis, slope, repulsion_slope,
                                    gaussians, S, K, KB, ROWS, BE, COSINE, KB)
    store_row(i, energy, sums, repulsion_energy, moments, S, K, KB, SKP, ROWS)


@triton.jit
def pairs_radial(
    counts, positions, elements, structure, starts, boxes, images, cutoff, flags, order, species, caller_positions, caller_box, caller_atoms,
    units, edge_count, neighbors, geometry, distance, reverse, slot, edge_capacity, candidate_capacity, pair_table, basis, slope, moments,
    repulsion_energy, repulsion_slope,
    gaussians, S: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, SKP: tl.constexpr, ROWS: tl.constexpr, COSINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The edges of a row among all pairs of its structure, then what radial makes of them. Rows are the caller's atoms; ghosts have edges to
    local atoms only. Where the caller has arrays on the device, positions and the box are read from these."""
    row = tl.program_id(0)
    n_local, n_total, b, element = tl.load(counts), tl.load(counts + 1), tl.load(structure + row), tl.load(elements + row)
    limit_d, seen0, seen1 = tl.load(cutoff), tl.load(flags), tl.load(flags + 1)
    length, narrow = tl.load(units), tl.load(units + 3).to(tl.int32) != 0
    start, end, n0, n1, n2 = bounds(b, starts, images)
    scale = 1.0 / limit_d
    previous_kernel()
    if row >= n_total:
        return
    candidates, n, edge = search_row(row, n_local, b, element, start, end, n0, n1, n2, limit_d, seen0, seen1, length, narrow, positions,
                                     elements, boxes, flags, order, species, caller_positions, caller_box, caller_atoms, edge_count,
                                     neighbors, geometry, distance, reverse, slot, edge_capacity, candidate_capacity, BLOCK)
    if row >= n_local:
        return
    first, z_i, n = row.to(tl.int64) * edge_capacity, tl.maximum(element, 0), tl.minimum(n, edge_capacity)
    energy, sums = tl.zeros([BLOCK], tl.float64), tl.zeros([ROWS, KB], tl.float32)
    if candidates <= BLOCK:  # edges are those of the threads that have met them: three latencies less
        e, inside, d, inverse, u0, u1, u2, z_j = edge
        energy, sums = radial_block(e, inside, d, inverse, u0, u1, u2, z_i, z_j, scale, energy, sums, pair_table, basis, slope, repulsion_slope,
                                    gaussians, S, K, KB, ROWS, BLOCK, COSINE, 8)
    else:
        tl.debug_barrier()  # what other threads of this program have found is there
        for start in range(0, n, BLOCK):
            e, inside, d, inverse, u0, u1, u2, z_j = load_edges(first, start, n, elements, neighbors, geometry, distance, BLOCK)
            energy, sums = radial_block(e, inside, d, inverse, u0, u1, u2, z_i, z_j, scale, energy, sums, pair_table, basis, slope, repulsion_slope,
                                        gaussians, S, K, KB, ROWS, BLOCK, COSINE, 8)
    store_row(row, energy, sums, repulsion_energy, moments, S, K, KB, SKP, ROWS)
