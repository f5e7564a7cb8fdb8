"""Update layers on the GPU (equations in update.py, the form of the kernels in dense_triton.py).

pq [local, 3, 2F]: p = v V beside q = v U for each component of the vectors.

For many atoms every kernel is one product. For few atoms the kernels named ``merged`` have two that follow each other (dense_triton.py).
"""

import triton
import triton.language as tl

from .dense_triton import (
    UNSCALE, halves, halves_product, place, product, silu, silu_slope, store_hidden, unscaled_halves, unscaled_product, weights,
)
from .launch_triton import next_kernel, previous_kernel, together


@triton.jit
def load_vector(pointer, STRIDE: tl.constexpr):
    """Three components that are STRIDE apart."""
    return tl.load(pointer), tl.load(pointer + STRIDE), tl.load(pointer + 2 * STRIDE)


@triton.jit
def load_sum(pointer, STRIDE: tl.constexpr, BLOCKS: tl.constexpr):
    """Sum of BLOCKS numbers that are STRIDE apart."""
    value = tl.load(pointer)
    for k in tl.static_range(1, BLOCKS):
        value += tl.load(pointer + k * STRIDE)
    return value


@triton.jit
def norm_of(p_0, p_1, p_2, EPSILON: tl.constexpr):
    return tl.sqrt(p_0 * p_0 + p_1 * p_1 + p_2 * p_2 + EPSILON)


@triton.jit
def update_mix(counts, v, vu, pq, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXIT: tl.constexpr):
    """p and q of one component of the vectors."""
    ACROSS: tl.constexpr = 6 * F // BN
    row, c = place(ACROSS, BM, BN)
    axis = tl.program_id(0) % ACROSS // (2 * F // BN)
    k = tl.arange(0, F)
    w_hi, w_lo = weights(vu + k[:, None] * (2 * F) + c - axis * (2 * F), 2 * F * F)
    n = tl.load(counts)
    previous_kernel()
    if EXIT:
        if tl.program_id(0) // ACROSS * BM >= n:
            return
    tl.store(pq + row * (6 * F) + c, product(tl.load(v + row * (3 * F) + axis * F + k[None, :]), w_hi, w_lo))


@triton.jit
def update_hidden(
    counts, s, pq, w1, b1, active, slope, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXIT: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """The hidden layer: active [local, F], and the slope of the activation for the backward pass."""
    row, c = place(F // BN, BM, BN)
    k = tl.arange(0, F)
    w = w1 + k[:, None] * F + c
    s_hi, s_lo = weights(w, 2 * F * F)
    n_hi, n_lo = weights(w + F * F, 2 * F * F)
    bias, n = tl.load(b1 + c), tl.load(counts)
    previous_kernel()
    if EXIT:
        if tl.program_id(0) // (F // BN) * BM >= n:
            return
    scalars = tl.load(s + row * F + k[None, :])
    p_0, p_1, p_2 = load_vector(pq + row * (6 * F) + k[None, :], 2 * F)
    h = bias + product(scalars, s_hi, s_lo) + product(norm_of(p_0, p_1, p_2, EPSILON), n_hi, n_lo)
    store_hidden(active, slope, row * F + c, h)


@triton.jit
def update(
    counts, s, v, pq, active, w2, b2, s_out, v_out, gates, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXIT: tl.constexpr,
    LAST: tl.constexpr,
):
    """New features: one program makes columns of s_out [local, F], another of v_out [local, 3F].

    Keeps a_vv, a_sv (gates [local, 2F]) for the backward pass. In the LAST layer nobody reads the vectors.
    """
    ACROSS: tl.constexpr = (1 if LAST else 2) * F // BN
    row, c = place(ACROSS, BM, BN)
    k = tl.arange(0, F)
    w, bias, n = w2 + k[:, None] * (3 * F) + c, b2 + c, tl.load(counts)
    p = pq + row * (6 * F) + c
    if tl.program_id(0) % ACROSS < F // BN:
        ss_hi, ss_lo = weights(w, 3 * F * F)
        sv_hi, sv_lo = weights(w + 2 * F, 3 * F * F)
        p_0, p_1, p_2 = load_vector(p, 2 * F)
        q_0, q_1, q_2 = load_vector(p + F, 2 * F)
        value, b_sv = tl.load(s + row * F + c) + tl.load(bias), tl.load(bias + 2 * F)
        p_dot_q = p_0 * q_0 + p_1 * q_1 + p_2 * q_2
        previous_kernel()
        if EXIT:
            if tl.program_id(0) // ACROSS * BM >= n:
                return
        hi, lo, scale = halves(tl.load(active + row * F + k[None, :]))
        a_sv = halves_product(hi, lo, scale, sv_hi, sv_lo) + b_sv
        tl.store(gates + row * (2 * F) + F + c, a_sv)
        tl.store(s_out + row * F + c, value + halves_product(hi, lo, scale, ss_hi, ss_lo) + a_sv * p_dot_q)
    else:  # columns F and up of the weights; q stands F after p
        vv_hi, vv_lo = weights(w, 3 * F * F)
        q_0, q_1, q_2 = load_vector(p, 2 * F)
        v_0, v_1, v_2 = load_vector(v + row * (3 * F) + c - F, F)
        b_vv = tl.load(bias)
        previous_kernel()
        if EXIT:
            if tl.program_id(0) // ACROSS * BM >= n:
                return
        a_vv = product(tl.load(active + row * F + k[None, :]), vv_hi, vv_lo) + b_vv
        tl.store(gates + row * (2 * F) + c - F, a_vv)
        out = v_out + row * (3 * F) + c - F
        tl.store(out, v_0 + a_vv * q_0)
        tl.store(out + F, v_1 + a_vv * q_1)
        tl.store(out + 2 * F, v_2 + a_vv * q_2)


@triton.jit
def update_hidden_backward(
    counts, g, pq, w2, g_hidden, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXIT: tl.constexpr, LAST: tl.constexpr
):
    """Gradient of the hidden layer after its activation, g_hidden [local, 3F], whose three blocks are to be added up.

    g: gradients with respect to the output, [total, 4F]; in the LAST layer those of the vectors are zero and there are two blocks.
    """
    ACROSS: tl.constexpr = (2 if LAST else 3) * F // BN
    row, c = place(ACROSS, BM, BN)
    part = tl.program_id(0) % ACROSS // (F // BN)  # through a_ss, a_sv, a_vv
    k = tl.arange(0, F)
    block = tl.where(part == 0, 0, 3 - part)  # of the columns of w2
    w_hi, w_lo = weights(w2 + (c - part * F) * (3 * F) + block * F + k[:, None], 3 * F * F)
    n = tl.load(counts)
    k = k[None, :]
    p = pq + row * (6 * F) + k
    g += row * (4 * F) + k
    out = g_hidden + row * (3 * F) + c
    if part == 0:
        previous_kernel()
        if EXIT:
            if tl.program_id(0) // ACROSS * BM >= n:
                return
        tl.store(out, product(tl.load(g), w_hi, w_lo))
    elif part == 1:
        p_0, p_1, p_2 = load_vector(p, 2 * F)
        q_0, q_1, q_2 = load_vector(p + F, 2 * F)
        p_dot_q = p_0 * q_0 + p_1 * q_1 + p_2 * q_2
        previous_kernel()
        if EXIT:
            if tl.program_id(0) // ACROSS * BM >= n:
                return
        tl.store(out, product(tl.load(g) * p_dot_q, w_hi, w_lo))
    else:
        q_0, q_1, q_2 = load_vector(p + F, 2 * F)
        previous_kernel()
        if EXIT:
            if tl.program_id(0) // ACROSS * BM >= n:
                return
        g_0, g_1, g_2 = load_vector(g + F, F)
        tl.store(out, product(g_0 * q_0 + g_1 * q_1 + g_2 * q_2, w_hi, w_lo))


@triton.jit
def update_backward(
    counts, g, pq, gates, slope, g_hidden, w1, g_out, g_pq, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EXIT: tl.constexpr, LAST: tl.constexpr, EPSILON: tl.constexpr,
):
    """dE/ds of the layer's input into the first F columns of g_out [total, 4F], and dE/dp, dE/dq into g_pq [local, 3, 2F]."""
    row, c = place(2 * F // BN, BM, BN)
    part = tl.program_id(0) % (2 * F // BN) // (F // BN)  # dE/ds and dE/dq, or dE/dp
    k = tl.arange(0, F)
    w_hi, w_lo = weights(w1 + c * F + k[:, None], 2 * F * F)
    n = tl.load(counts)
    c -= part * F
    k = k[None, :]
    factor = tl.load(slope + row * F + k)
    p_0, p_1, p_2 = load_vector(pq + row * (6 * F) + c, 2 * F)
    gate = gates + row * (2 * F) + c
    g += row * (4 * F) + c  # of two kernels before
    g_s = tl.load(g)
    g_dot = g_s * tl.load(gate + F)
    g_hidden += row * (3 * F) + k
    out = g_pq + row * (6 * F) + c
    if part == 0:
        q_0, q_1, q_2 = g_dot * p_0, g_dot * p_1, g_dot * p_2
        if not LAST:
            a_vv = tl.load(gate)
            g_0, g_1, g_2 = load_vector(g + F, F)
            q_0 += a_vv * g_0
            q_1 += a_vv * g_1
            q_2 += a_vv * g_2
        previous_kernel()
        if EXIT:
            if tl.program_id(0) // (2 * F // BN) * BM >= n:
                return
        g_h = load_sum(g_hidden, F, 2 if LAST else 3)
        tl.store(g_out + row * (4 * F) + c, g_s + product(g_h * factor, w_hi, w_lo))
        tl.store(out + F, q_0)
        tl.store(out + 3 * F, q_1)
        tl.store(out + 5 * F, q_2)
    else:
        q_0, q_1, q_2 = load_vector(pq + row * (6 * F) + F + c, 2 * F)
        norm = norm_of(p_0, p_1, p_2, EPSILON)
        previous_kernel()
        if EXIT:
            if tl.program_id(0) // (2 * F // BN) * BM >= n:
                return
        g_h = load_sum(g_hidden, F, 2 if LAST else 3)
        along = product(g_h * factor, w_hi, w_lo) / norm
        tl.store(out, g_dot * q_0 + along * p_0)
        tl.store(out + 2 * F, g_dot * q_1 + along * p_1)
        tl.store(out + 4 * F, g_dot * q_2 + along * p_2)


@triton.jit
def update_mix_backward(
    counts, g, g_pq, vu, g_out, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXIT: tl.constexpr, LAST: tl.constexpr
):
    """dE/dv of the layer's input, into the last 3F columns of g_out [total, 4F]: one component."""
    row, c = place(3 * F // BN, BM, BN)
    axis = tl.program_id(0) % (3 * F // BN) // (F // BN)
    k = tl.arange(0, F)
    w = vu + (c - axis * F) * (2 * F) + k[:, None]
    p_hi, p_lo = weights(w, 2 * F * F)
    q_hi, q_lo = weights(w + F, 2 * F * F)
    n = tl.load(counts)
    g_v = tl.zeros([BM, BN], tl.float32)
    if not LAST:
        g_v = tl.load(g + row * (4 * F) + F + c)
    previous_kernel()
    if EXIT:
        if tl.program_id(0) // (3 * F // BN) * BM >= n:
            return
    a = g_pq + row * (6 * F) + axis * (2 * F) + k[None, :]
    a_p, a_q = tl.load(a), tl.load(a + F)
    g_v += product(a_p, p_hi, p_lo) + product(a_q, q_hi, q_lo)
    tl.store(g_out + row * (4 * F) + F + c, g_v)


@triton.jit
def rows_of(w, BN: tl.constexpr, N: tl.constexpr, ACROSS: tl.constexpr, LO: tl.constexpr):
    """Of weights w [.., N] the rows of the columns that this program makes, of which ACROSS programs share the rows: what hands a product on
    to the next one, as a term of it."""
    down = tl.program_id(0) % ACROSS * BN + tl.arange(0, BN)
    return weights(w + down[:, None] * N + tl.arange(0, N)[None, :], LO)


@triton.jit
def update_mix_merged(
    counts, v, vu, pq, s, w1, terms, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EPSILON: tl.constexpr
):
    """update_mix, and the terms [local, 1 + F / BN, F] of the hidden layer of the update: the first of the scalars, the others of BN norms each.

    A program has columns of all three components of p, their norms and the term of these; or of one component of q, or of the first term.
    """
    P: tl.constexpr = F // BN
    row, c = place(5 * P, BM, BN)
    block = tl.program_id(0) % (5 * P)
    k = tl.arange(0, F)[:, None]
    across = tl.arange(0, F)[None, :]
    terms += row * ((1 + P) * F)
    if block < P:
        w_hi, w_lo = weights(vu + k * (2 * F) + c, 2 * F * F)
        n_hi, n_lo = rows_of(w1 + F * F, BN, F, 5 * P, 2 * F * F)
        w_hi, w_lo, n_hi, n_lo = together(w_hi, w_lo, n_hi, n_lo)
        previous_kernel()
        v_0, v_1, v_2 = together(*load_vector(v + row * (3 * F) + across, F))
        p_0, p_1, p_2 = unscaled_product(v_0, w_hi, w_lo), unscaled_product(v_1, w_hi, w_lo), unscaled_product(v_2, w_hi, w_lo)
        store_norms(pq + row * (6 * F) + c, terms + (1 + block) * F + across, p_0, p_1, p_2, n_hi, n_lo, F, EPSILON)
    elif block < 4 * P:
        axis = block // P - 1
        c -= (1 + axis) * F
        w_hi, w_lo = together(*weights(vu + k * (2 * F) + F + c, 2 * F * F))
        previous_kernel()
        tl.store(pq + row * (6 * F) + (2 * axis + 1) * F + c, unscaled_product(tl.load(v + row * (3 * F) + axis * F + across), w_hi, w_lo))
    else:
        c -= 4 * F
        w_hi, w_lo = together(*weights(w1 + k * F + c, 2 * F * F))
        previous_kernel()
        tl.store(terms + c, unscaled_product(tl.load(s + row * F + across), w_hi, w_lo))


@triton.jit
def store_norms(pq, term, p_0, p_1, p_2, n_hi, n_lo, F: tl.constexpr, EPSILON: tl.constexpr):
    """Columns of p, and what their norms are of a hidden layer."""
    tl.store(pq, p_0)
    tl.store(pq + 2 * F, p_1)
    tl.store(pq + 4 * F, p_2)
    tl.store(term, unscaled_product(norm_of(p_0, p_1, p_2, EPSILON), n_hi, n_lo))


@triton.jit
def update_merged(
    counts, s, v, pq, terms, b1, w2, b2, next_w1, slope, s_out, v_out, gates, next_terms, F: tl.constexpr, N: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TERMS: tl.constexpr, LAST: tl.constexpr,
):
    """update from the terms of its hidden layer, and what its scalars are of the next one, that of N units of the source or the readout:
    next_terms [local, F / BN, N]."""
    P: tl.constexpr = F // BN
    ACROSS: tl.constexpr = (1 if LAST else 2) * P
    row, c = place(ACROSS, BM, BN)
    k = tl.arange(0, F)
    units = k[None, :]
    w, bias, b_h = w2 + k[:, None] * (3 * F) + c, b2 + c, tl.load(b1 + units)
    p = pq + row * (6 * F) + c
    terms += row * (TERMS * F) + units
    if tl.program_id(0) % ACROSS < P:
        ss_hi, ss_lo = weights(w, 3 * F * F)
        sv_hi, sv_lo = weights(w + 2 * F, 3 * F * F)
        n_hi, n_lo = rows_of(next_w1, BN, N, ACROSS, F * N)
        b_ss, b_sv = tl.load(bias), tl.load(bias + 2 * F)
        ss_hi, ss_lo, sv_hi, sv_lo, n_hi, n_lo = together(ss_hi, ss_lo, sv_hi, sv_lo, n_hi, n_lo)
        previous_kernel()
        h = load_sum(terms, F, TERMS)
        own = tl.load(s + row * F + c)
        p_0, p_1, p_2 = load_vector(p, 2 * F)
        q_0, q_1, q_2 = load_vector(p + F, 2 * F)
        h, own, p_0, p_1, p_2, q_0, q_1, q_2 = together(h, own, p_0, p_1, p_2, q_0, q_1, q_2)
        h += b_h
        hi, lo = unscaled_halves(silu(h))
        a_sv = halves_product(hi, lo, UNSCALE, sv_hi, sv_lo) + b_sv
        a_ss = halves_product(hi, lo, UNSCALE, ss_hi, ss_lo) + b_ss
        value = own + a_ss + a_sv * (p_0 * q_0 + p_1 * q_1 + p_2 * q_2)
        term = next_terms + row * (P * N) + tl.program_id(0) % ACROSS * N + tl.arange(0, N)[None, :]
        tl.store(term, unscaled_product(value, n_hi, n_lo))
        tl.store(gates + row * (2 * F) + F + c, a_sv)
        tl.store(s_out + row * F + c, value)
        if tl.program_id(0) % ACROSS == 0:
            tl.store(slope + row * F + units, silu_slope(h))
    else:  # columns F and up of the weights; q stands F after p
        vv_hi, vv_lo = together(*weights(w, 3 * F * F))
        b_vv = tl.load(bias)
        previous_kernel()
        h = load_sum(terms, F, TERMS)
        q_0, q_1, q_2 = load_vector(p, 2 * F)
        v_0, v_1, v_2 = load_vector(v + row * (3 * F) + c - F, F)
        h, q_0, q_1, q_2, v_0, v_1, v_2 = together(h, q_0, q_1, q_2, v_0, v_1, v_2)
        a_vv = unscaled_product(silu(h + b_h), vv_hi, vv_lo) + b_vv
        tl.store(gates + row * (2 * F) + c - F, a_vv)
        out = v_out + row * (3 * F) + c - F
        tl.store(out, v_0 + a_vv * q_0)
        tl.store(out + F, v_1 + a_vv * q_1)
        tl.store(out + 2 * F, v_2 + a_vv * q_2)


@triton.jit
def update_merged_backward(
    counts, g_s, g, pq, slope, w2, w1, parts, F: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUMMANDS: tl.constexpr
):
    """update_hidden_backward and update_backward: a program has H hidden units, and gives what passes through them. That of the last layer
    is in one with the readout (readout_merged_backward).

    g_s [local, SUMMANDS, F]: dE/ds of the layer's output, to be added up. g [total, 4F]: its last 3F
    columns are dE/dv. parts [local, F / H, 2F]: for every H hidden units what they add to the gradients of s and of the norms.
    """
    ACROSS: tl.constexpr = F // H * (2 * F // BN)
    row, c = place(ACROSS, BM, BN)
    part = tl.program_id(0) % ACROSS // (2 * F // BN)
    k, unit = tl.arange(0, F), part * H + tl.arange(0, H)
    w = w2 + unit[None, :] * (3 * F) + k[:, None]
    ss_hi, ss_lo = weights(w, 3 * F * F)
    sv_hi, sv_lo = weights(w + 2 * F, 3 * F * F)
    to_hi, to_lo = weights(w1 + (c - part * (2 * F)) * F + unit[:, None], 2 * F * F)
    k = k[None, :]
    p_0, p_1, p_2 = load_vector(pq + row * (6 * F) + k, 2 * F)
    q_0, q_1, q_2 = load_vector(pq + row * (6 * F) + F + k, 2 * F)
    factor = tl.load(slope + row * F + unit[None, :])
    p_dot_q = p_0 * q_0 + p_1 * q_1 + p_2 * q_2
    # dE/dv is of two kernels before.
    vv_hi, vv_lo = weights(w + F, 3 * F * F)
    g_0, g_1, g_2 = load_vector(g + row * (4 * F) + F + k, F)
    g_q = g_0 * q_0 + g_1 * q_1 + g_2 * q_2
    factor, g_q, vv_hi, vv_lo, ss_hi, ss_lo, sv_hi, sv_lo, to_hi, to_lo = together(
        factor, g_q, vv_hi, vv_lo, ss_hi, ss_lo, sv_hi, sv_lo, to_hi, to_lo
    )
    previous_kernel()
    g_k = load_sum(g_s + row * (F * SUMMANDS) + k, F, SUMMANDS)
    g_h = unscaled_product(g_q, vv_hi, vv_lo)  # while that is on its way
    g_h += unscaled_product(g_k, ss_hi, ss_lo) + unscaled_product(g_k * p_dot_q, sv_hi, sv_lo)
    tl.store(parts + row * (2 * F * (F // H)) + c, unscaled_product(g_h * factor, to_hi, to_lo))


@triton.jit
def load_mix(pq, gates, row, axis, k, F: tl.constexpr, EPSILON: tl.constexpr):
    """p, q and dnorm/dp of one component of the vectors in columns k, and the gate a_sv."""
    at = pq + row * (6 * F) + k
    p_0, p_1, p_2 = load_vector(at, 2 * F)
    p, q = tl.where(axis == 0, p_0, tl.where(axis == 1, p_1, p_2)), tl.load(at + axis * (2 * F) + F)
    return p, q, p / norm_of(p_0, p_1, p_2, EPSILON), tl.load(gates + row * (2 * F) + F + k)


@triton.jit
def update_mix_merged_backward(
    counts, g_s, g, pq, gates, parts, vu, g_out, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUMMANDS: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, LAST: tl.constexpr, EPSILON: tl.constexpr,
):
    """update_mix_backward from what update_merged_backward gives, of which it adds up dE/ds too: g_out [total, 4F].

    All else is of two kernels before, so that only the norms are left to be waited for; but for the LAST layer, whose gradient is of the
    kernel before.
    """
    next_kernel()
    row, c = place(3 * F // BN, BM, BN)
    axis = tl.program_id(0) % (3 * F // BN) // (F // BN)
    k = tl.arange(0, F)
    w = vu + (c - axis * F) * (2 * F) + k[:, None]
    p_hi, p_lo = weights(w, 2 * F * F)
    q_hi, q_lo = weights(w + F, 2 * F * F)
    k = k[None, :]
    parts += row * (2 * F * PARTS)
    of_norms, of_scalars = parts + F + k, parts + c - axis * F
    p, q, along, a_sv = load_mix(pq, gates, row, axis, k, F, EPSILON)
    of_output, of_own = g_s + row * WIDTH + k, g_s + row * WIDTH + c - axis * F
    if LAST:
        p, q, along, a_sv, p_hi, p_lo, q_hi, q_lo = together(p, q, along, a_sv, p_hi, p_lo, q_hi, q_lo)
        previous_kernel()
        g_dot, own = load_sum(of_output, F, SUMMANDS), load_sum(of_own, F, SUMMANDS)
        through_norms, scalars = load_sum(of_norms, 2 * F, PARTS), load_sum(of_scalars, 2 * F, PARTS)
        through_norms, scalars, g_dot, own = together(through_norms, scalars, g_dot, own)
        g_dot *= a_sv
        value = unscaled_product(g_dot * p, q_hi, q_lo)
    else:
        g_dot, own = load_sum(of_output, F, SUMMANDS) * a_sv, load_sum(of_own, F, SUMMANDS)
        g_q = g_dot * p + tl.load(gates + row * (2 * F) + k) * tl.load(g + row * (4 * F) + (1 + axis) * F + k)
        past = tl.load(g + row * (4 * F) + F + c)
        own, past, g_q, p_hi, p_lo, q_hi, q_lo = together(own, past, g_q, p_hi, p_lo, q_hi, q_lo)
        previous_kernel()
        # What is before the wait takes no longer than what the kernel before does after its own, so this product is not there.
        through_norms, scalars = load_sum(of_norms, 2 * F, PARTS), load_sum(of_scalars, 2 * F, PARTS)
        value = unscaled_product(g_q, q_hi, q_lo) + past
    value += unscaled_product(g_dot * q + along * through_norms, p_hi, p_lo)
    tl.store(g_out + row * (4 * F) + F + c, value)
    if axis == 0:
        tl.store(g_out + row * (4 * F) + c, own + scalars)
