"""Readout on the GPU: atomic energies and their gradient at once (equations in readout.py, the form of the kernel in dense_triton.py)."""

import triton
import triton.language as tl

from .dense_triton import GRADIENT, halves, halves_product, place, product, silu, silu_slope, unscaled_product, weights
from .launch_triton import previous_kernel, together
from .update_triton import load_sum, load_vector


@triton.jit
def store_energies(h, i, known, fixed, weight, constant, row_energy):
    """Energies of rows i from the hidden layer h."""
    energy = (tl.sum(silu(h) * weight, 1) + constant).to(tl.float64) + fixed
    tl.store(row_energy + i, tl.where(known, energy, 0.0))


@triton.jit
def readout(
    counts, s, species, w1, b1, w2, b2, shift, repulsion_energy, row_energy, g, F: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EXIT: tl.constexpr,
):
    """row_energy f64 [local]: readout, shift of the element and repulsion; g [total, 4F]: dE/ds in the first F columns.

    Atoms that the model ignores (species -1) have neither. The hidden layer is half as wide as others: each program has all of it.
    """
    row, c = place(F // BN, BM, BN)
    i = tl.program_id(0) // (F // BN) * BM + tl.arange(0, BM)
    k, m = tl.arange(0, BK), tl.arange(0, M)
    w_hi, w_lo = weights(w1 + k[:, None] * M + m[None, :], F * M)
    t_hi, t_lo = weights(w1 + c * M + m[:, None], F * M)
    bias, weight, constant = tl.load(b1 + m)[None, :], tl.load(w2 + m)[None, :], tl.load(b2)
    z, n = tl.load(species + i), tl.load(counts)
    known = z >= 0
    fixed = tl.load(shift + tl.maximum(z, 0)) + tl.load(repulsion_energy + i)
    previous_kernel()
    if EXIT:
        if tl.program_id(0) // (F // BN) * BM >= n:
            return
    h = product(tl.load(s + row * F + k[None, :]), w_hi, w_lo) + bias
    for k0 in tl.static_range(BK, F, BK):
        w_hi, w_lo = weights(w1 + (k0 + k)[:, None] * M + m[None, :], F * M)
        h += product(tl.load(s + row * F + k0 + k[None, :]), w_hi, w_lo)
    if tl.program_id(0) % (F // BN) == 0:
        store_energies(h, i, known, fixed, weight, constant, row_energy)
    hi, lo, scale = halves(tl.where(known[:, None], silu_slope(h) * weight * GRADIENT, 0.0))
    tl.store(g + row * (4 * F) + c, halves_product(hi, lo, scale, t_hi, t_lo))


@triton.jit
def readout_merged(
    counts, terms, species, b1, w2, b2, shift, repulsion_energy, row_energy, M: tl.constexpr, BM: tl.constexpr, TERMS: tl.constexpr
):
    """Energies alone, from the terms [local, TERMS, M] of the hidden layer, which update_merged has made."""
    i, m = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, M)
    bias, weight, constant = tl.load(b1 + m)[None, :], tl.load(w2 + m)[None, :], tl.load(b2)
    z = tl.load(species + i)
    fixed = tl.load(shift + tl.maximum(z, 0)) + tl.load(repulsion_energy + i)
    previous_kernel()
    h = load_sum(terms + i.to(tl.int64)[:, None] * (TERMS * M) + m[None, :], M, TERMS) + bias
    store_energies(h, i, z >= 0, fixed, weight, constant, row_energy)


@triton.jit
def readout_merged_backward(
    counts, terms, species, r_w1, r_b1, r_w2, r_b2, shift, repulsion_energy, row_energy, g_out, pq, slope, w2, w1, parts, F: tl.constexpr,
    M: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TERMS: tl.constexpr,
):
    """readout from the terms [local, TERMS, M] of its hidden layer, which update_merged has made, and update_merged_backward of the last layer:
    every program makes the gradient of its rows again."""
    ACROSS: tl.constexpr = F // H * (2 * F // BN)
    row, c = place(ACROSS, BM, BN)
    i = tl.program_id(0) // ACROSS * BM + tl.arange(0, BM)
    part = tl.program_id(0) % ACROSS // (2 * F // BN)
    m, k, unit = tl.arange(0, M), tl.arange(0, F), part * H + tl.arange(0, H)
    t_hi, t_lo = weights(r_w1 + k[None, :] * M + m[:, None], F * M)
    w = w2 + unit[None, :] * (3 * F) + k[:, None]
    ss_hi, ss_lo = weights(w, 3 * F * F)
    sv_hi, sv_lo = weights(w + 2 * F, 3 * F * F)
    to_hi, to_lo = weights(w1 + (c - part * (2 * F)) * F + unit[:, None], 2 * F * F)
    k = k[None, :]
    bias, weight, constant = tl.load(r_b1 + m)[None, :], tl.load(r_w2 + m)[None, :], tl.load(r_b2)
    z = tl.load(species + i)
    fixed = tl.load(shift + tl.maximum(z, 0)) + tl.load(repulsion_energy + i)
    p_0, p_1, p_2 = load_vector(pq + row * (6 * F) + k, 2 * F)
    q_0, q_1, q_2 = load_vector(pq + row * (6 * F) + F + k, 2 * F)
    p_dot_q = p_0 * q_0 + p_1 * q_1 + p_2 * q_2
    p_dot_q, t_hi, t_lo, ss_hi, ss_lo, sv_hi, sv_lo, to_hi, to_lo = together(p_dot_q, t_hi, t_lo, ss_hi, ss_lo, sv_hi, sv_lo, to_hi, to_lo)
    previous_kernel()
    h, factor = together(load_sum(terms + row * (TERMS * M) + m[None, :], M, TERMS), tl.load(slope + row * F + unit[None, :]))
    h += bias
    g = unscaled_product(tl.where((z >= 0)[:, None], silu_slope(h) * weight * GRADIENT, 0.0), t_hi, t_lo)
    g_h = unscaled_product(g, ss_hi, ss_lo) + unscaled_product(g * p_dot_q, sv_hi, sv_lo)
    tl.store(parts + row * (2 * F * (F // H)) + c, unscaled_product(g_h * factor, to_hi, to_lo))
    if tl.program_id(0) % ACROSS == 0:
        store_energies(h, i, z >= 0, fixed, weight, constant, row_energy)
        tl.store(g_out + row * (4 * F) + k, g)
