"""Radial basis, moments of the first layer and repulsion on the GPU (equations in filter.py, message.py and repulsion.py)."""

import triton
import triton.language as tl


@triton.jit
def envelope(x):
    """Polynomial cutoff f(x) and df/dx on [0, 1], zero beyond (filter.cutoff_envelope)."""
    x = tl.minimum(x, 1.0)
    x5 = x * x * x * x * x
    return 1.0 + x5 * x * (-28.0 + x * (48.0 - 21.0 * x)), x5 * (-168.0 + x * (336.0 - 168.0 * x))


@triton.jit
def zbl(d, prefactor, inverse_length, radius):
    """Half pair energy in eV and its derivative (repulsion.repulsion)."""
    phi = d * 0.0
    dphi = d * 0.0
    for term in tl.static_range(4):
        coefficient = 0.18175 if term == 0 else 0.50986 if term == 1 else 0.28022 if term == 2 else 0.02817
        exponent = (3.19980 if term == 0 else 0.94229 if term == 1 else 0.40290 if term == 2 else 0.20162) * inverse_length
        value = coefficient * tl.exp(-exponent * d)
        phi += value
        dphi -= exponent * value
    f, df = envelope(d / radius)
    return prefactor * phi / d * f, prefactor / d * ((dphi - phi / d) * f + phi * df / radius)


@triton.jit
def sine_cosine(number, x, x_rest):
    """sin and cos of pi n (x + x_rest) in float32, good to the last digits for every n < 2048.

    x has at most 12 bits behind the point, so that n x, its whole turns and its quarter turns are exact.
    """
    turns = number * x
    turns -= 2.0 * tl.floor(0.5 * turns + 0.5)
    quarter = tl.floor(2.0 * turns + 0.5)
    r = turns - 0.5 * quarter + number * x_rest
    z = r * r
    s = r * (3.14159265 + z * (-5.16771278 + z * (2.55016404 + z * (-0.599264529 + z * 0.0821458866))))
    c = 1.0 + z * (-4.93480220 + z * (4.05871213 + z * (-1.33526277 + z * (0.235330630 - z * 0.0258068913))))
    even = 1.0 - tl.abs(quarter)
    odd = even == 0.0
    return tl.where(odd, c * quarter, s * even), tl.where(odd, -s * quarter, c * even)


@triton.jit
def store_halves(rows, values, mask, KB: tl.constexpr):
    """Writes float32 rows [BE, KB] as pairs of halves [hi, lo] (docs/cuda.md)."""
    hi = values.to(tl.float16)
    tl.store(rows, hi, mask=mask)
    tl.store(rows + KB, (values - hi.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit
def radial(
    counts, species, edge_count, neighbors, geometry, distance, cutoff, pair_table, phase, basis, slope, moments, repulsion_energy,
    repulsion_slope, edge_capacity, S: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, SKP: tl.constexpr,
    ROWS: tl.constexpr, BE: tl.constexpr, LINE: tl.constexpr,
):
    """Everything of a row that depends on distances and elements alone.

    basis, slope: f16 [edges, 2 KB], B(d) and dB/dd as pairs of halves. moments: f32 [local, 4 SKP], sums over neighbours of
    element z of B_k (1, u_x, u_y, u_z) at [a, z K + k]. repulsion_energy: f64 [local], repulsion_slope: f32 [edges]. KB and
    ROWS: K and 4 S rounded up to a power of two, at least 16.

    First what needs float64, one edge a thread; then, from what that leaves in phase [edges, 4] (d / rc as 12 bits and a
    rest, f, df/dd), the basis: in one loop, every thread that holds a part of a row of the basis would do the float64 work of
    that row again.
    """
    i = tl.program_id(0)
    if i >= tl.load(counts):
        return
    n = tl.load(edge_count + i)
    z_i = tl.maximum(tl.load(species + i), 0)
    rc = tl.load(cutoff)
    first = i.to(tl.int64) * edge_capacity
    energy = tl.zeros([LINE], tl.float64)
    for start in range(0, n, LINE):
        place = start + tl.arange(0, LINE)
        inside = place < n
        e = first + place
        d = tl.load(distance + e, mask=inside, other=1.0)
        x = d / rc
        f, df = envelope(x)
        coarse = tl.floor(x * 4096.0 + 0.5) * (1.0 / 4096.0)
        tl.store(phase + e * 4, coarse.to(tl.float32), mask=inside)
        tl.store(phase + e * 4 + 1, (x - coarse).to(tl.float32), mask=inside)
        tl.store(phase + e * 4 + 2, f.to(tl.float32), mask=inside)
        tl.store(phase + e * 4 + 3, (df / rc).to(tl.float32), mask=inside)
        z_j = tl.maximum(tl.load(species + tl.load(neighbors + e, mask=inside, other=0), mask=inside, other=0), 0)
        pair = pair_table + (z_i * S + z_j) * 3
        radius = tl.load(pair + 2)
        close = inside & (d < radius)
        value, derivative = d * 0.0, d * 0.0
        if tl.max(close.to(tl.int32), 0) > 0:
            value, derivative = zbl(d, tl.load(pair), tl.load(pair + 1), radius)
        energy += tl.where(close, value, 0.0)
        tl.store(repulsion_slope + e, tl.where(close, derivative, 0.0).to(tl.float32), mask=inside)
    tl.store(repulsion_energy + i, tl.sum(energy, 0))
    tl.debug_barrier()

    k = tl.arange(0, KB)
    number = (k + 1).to(tl.float32)[None, :]
    wave = number * (3.141592653589793 / rc).to(tl.float32)
    last = k[None, :] == K - 1
    row = tl.arange(0, ROWS)
    axis, z = (row // S)[:, None], (row % S)[:, None]
    sums = tl.zeros([ROWS, KB], tl.float32)
    for start in range(0, n, BE):
        place = start + tl.arange(0, BE)
        inside = place < n
        e = first + place
        z_j = tl.load(species + tl.load(neighbors + e, mask=inside, other=0), mask=inside, other=-1)
        f = tl.load(phase + e * 4 + 2, mask=inside, other=0.0)[:, None]
        df = tl.load(phase + e * 4 + 3, mask=inside, other=0.0)[:, None]
        x = tl.load(phase + e * 4, mask=inside, other=0.0)[:, None]
        sine, cosine = sine_cosine(number, x, tl.load(phase + e * 4 + 1, mask=inside, other=0.0)[:, None])
        inverse = 1.0 / tl.load(geometry + e * 4 + 3, mask=inside, other=1.0)[:, None]
        sine *= inverse
        mask = inside[:, None] & (k < K)[None, :]
        b = tl.where(mask, tl.where(last, f, sine * f), 0.0)
        db = tl.where(mask, tl.where(last, df, (wave * cosine - sine) * inverse * f + sine * df), 0.0)
        at = e[:, None] * (2 * KB) + k[None, :]
        store_halves(basis + at, b, inside[:, None], KB)
        store_halves(slope + at, db, inside[:, None], KB)
        u0 = tl.load(geometry + e * 4, mask=inside, other=0.0)[None, :]
        u1 = tl.load(geometry + e * 4 + 1, mask=inside, other=0.0)[None, :]
        u2 = tl.load(geometry + e * 4 + 2, mask=inside, other=0.0)[None, :]
        factor = tl.where(axis == 0, 1.0, tl.where(axis == 1, u0, tl.where(axis == 2, u1, u2)))
        factor = tl.where((z == z_j[None, :]) & (axis < 4), factor, 0.0)
        sums = tl.dot(factor, b, sums, input_precision="tf32x3")
    out = moments + i.to(tl.int64) * (4 * SKP) + ((row // S) * SKP + (row % S) * K)[:, None] + k[None, :]
    tl.store(out, sums, mask=(row < 4 * S)[:, None] & (k < K)[None, :])
