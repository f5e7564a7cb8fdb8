"""Update layers on the GPU (equations in update.py).

Programs hold BM rows. The columns are divided among neighbouring programs, BN for each, so that few atoms still occupy many
multiprocessors; what several programs need (the hidden layer) each of them computes again, which is cheaper than another
dependent kernel. Rows beyond the last atom exist, and what is computed there is never read: no load waits for the number of
atoms. EXIT: leave early where all rows are such, for a capacity that exceeds the atoms by many blocks.
"""

import triton
import triton.language as tl

from .dense_triton import halves, halves_product, product, silu, silu_slope

NORM_EPSILON = tl.constexpr(1e-8)  # as in update.py


@triton.jit
def update_mix(
    counts, v, vu, pq, norm, dot, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXIT: tl.constexpr
):
    """p = v V and q = v U (pq: [local, 6F], p first), the norms of p and the products p.q ([local, F])."""
    first = tl.program_id(0) // (F // BN) * BM
    if EXIT:
        if first >= tl.load(counts):
            return
    i = first + tl.arange(0, BM)
    row = i.to(tl.int64)[:, None]
    c = tl.program_id(0) % (F // BN) * BN + tl.arange(0, BN)[None, :]
    square = tl.full([BM, BN], NORM_EPSILON, tl.float32)
    p_dot_q = tl.zeros([BM, BN], tl.float32)
    for axis in tl.static_range(3):
        p = tl.zeros([BM, BN], tl.float32)
        q = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, F, BK):
            k = k0 + tl.arange(0, BK)
            hi, lo, scale = halves(tl.load(v + row * (3 * F) + axis * F + k[None, :]))
            w = vu + k[:, None] * (2 * F) + c
            p += halves_product(hi, lo, w, 2 * F * F) * scale
            q += halves_product(hi, lo, w + F, 2 * F * F) * scale
        tl.store(pq + row * (6 * F) + axis * F + c, p)
        tl.store(pq + row * (6 * F) + (3 + axis) * F + c, q)
        square += p * p
        p_dot_q += p * q
    tl.store(norm + row * F + c, tl.sqrt(square))
    tl.store(dot + row * F + c, p_dot_q)


@triton.jit
def update(
    counts, s, v, pq, norm, dot, w1, b1, w2, b2, s_out, v_out, hidden, gates, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr, EXIT: tl.constexpr, LAST: tl.constexpr,
):
    """New features: s_out [local, F] and v_out [local, 3F].

    Keeps the hidden layer before its activation (hidden [local, F]) and a_vv, a_sv (gates [local, 2F]) for the backward pass.
    In the LAST layer nobody reads the vectors.
    """
    first = tl.program_id(0) // (F // BN) * BM
    if EXIT:
        if first >= tl.load(counts):
            return
    i = first + tl.arange(0, BM)
    row = i.to(tl.int64)[:, None]
    f = tl.arange(0, F)
    h = tl.zeros([BM, F], tl.float32) + tl.load(b1 + f)[None, :]
    for k0 in range(0, F, BK):
        k = k0 + tl.arange(0, BK)
        w = w1 + k[:, None] * F + f[None, :]
        h += product(tl.load(s + row * F + k[None, :]), w, 2 * F * F)
        h += product(tl.load(norm + row * F + k[None, :]), w + F * F, 2 * F * F)
    if tl.program_id(0) % (F // BN) == 0:
        tl.store(hidden + row * F + f[None, :], h)
    hi, lo, scale = halves(silu(h))
    for c0 in range(0, BN, BC):
        c = tl.program_id(0) % (F // BN) * BN + c0 + tl.arange(0, BC)
        w = w2 + f[:, None] * (3 * F) + c[None, :]
        bias = b2 + c
        c = c[None, :]
        a_ss = halves_product(hi, lo, w, 3 * F * F) * scale + tl.load(bias)[None, :]
        a_sv = halves_product(hi, lo, w + 2 * F, 3 * F * F) * scale + tl.load(bias + 2 * F)[None, :]
        value = tl.load(s + row * F + c) + a_ss
        value += a_sv * tl.load(dot + row * F + c)
        tl.store(s_out + row * F + c, value)
        tl.store(gates + row * (2 * F) + F + c, a_sv)
        if not LAST:
            a_vv = halves_product(hi, lo, w + F, 3 * F * F) * scale + tl.load(bias + F)[None, :]
            tl.store(gates + row * (2 * F) + c, a_vv)
            for axis in tl.static_range(3):
                q = tl.load(pq + row * (6 * F) + (3 + axis) * F + c)
                value = tl.load(v + row * (3 * F) + axis * F + c) + a_vv * q
                tl.store(v_out + row * (3 * F) + axis * F + c, value)


@triton.jit
def update_backward(
    counts, g, pq, hidden, gates, w1, w2, g_out, g_pq, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr, EXIT: tl.constexpr, LAST: tl.constexpr,
):
    """dE/ds of the layer's input into the first F columns of g_out [total, 4F], and dE/dp, dE/dq into g_pq [local, 6F].

    g: gradients with respect to the output, [total, 4F]; in the LAST layer those of the vectors are zero and are not read.
    """
    first = tl.program_id(0) // (F // BN) * BM
    if EXIT:
        if first >= tl.load(counts):
            return
    i = first + tl.arange(0, BM)
    row = i.to(tl.int64)[:, None]
    f = tl.arange(0, F)
    g_h = tl.zeros([BM, F], tl.float32)
    for k0 in range(0, F, BK):
        k = (k0 + tl.arange(0, BK))[None, :]
        w = w2 + f[None, :] * (3 * F) + (k0 + tl.arange(0, BK))[:, None]
        g_s = tl.load(g + row * (4 * F) + k)
        g_h += product(g_s, w, 3 * F * F)
        p_dot_q = tl.zeros([BM, BK], tl.float32)
        g_vv = tl.zeros([BM, BK], tl.float32)
        for axis in tl.static_range(3):
            q = tl.load(pq + row * (6 * F) + (3 + axis) * F + k)
            p_dot_q += tl.load(pq + row * (6 * F) + axis * F + k) * q
            if not LAST:
                g_vv += tl.load(g + row * (4 * F) + (1 + axis) * F + k) * q
        g_h += product(g_s * p_dot_q, w + 2 * F, 3 * F * F)
        if not LAST:
            g_h += product(g_vv, w + F, 3 * F * F)
    hi, lo, scale = halves(g_h * silu_slope(tl.load(hidden + row * F + f[None, :])))
    for c0 in range(0, BN, BC):
        c = tl.program_id(0) % (F // BN) * BN + c0 + tl.arange(0, BC)
        w = w1 + c[None, :] * F + f[:, None]
        c = c[None, :]
        g_s = tl.load(g + row * (4 * F) + c)
        tl.store(g_out + row * (4 * F) + c, g_s + halves_product(hi, lo, w, 2 * F * F) * scale)
        g_norm = halves_product(hi, lo, w + F * F, 2 * F * F) * scale
        square = tl.full([BM, BC], NORM_EPSILON, tl.float32)
        for axis in tl.static_range(3):
            p = tl.load(pq + row * (6 * F) + axis * F + c)
            square += p * p
        g_norm = g_norm / tl.sqrt(square)
        g_dot = g_s * tl.load(gates + row * (2 * F) + F + c)
        for axis in tl.static_range(3):
            p = tl.load(pq + row * (6 * F) + axis * F + c)
            q = tl.load(pq + row * (6 * F) + (3 + axis) * F + c)
            g_q = g_dot * p
            if not LAST:
                a_vv = tl.load(gates + row * (2 * F) + c)
                g_q += a_vv * tl.load(g + row * (4 * F) + (1 + axis) * F + c)
            tl.store(g_pq + row * (6 * F) + axis * F + c, g_dot * q + g_norm * p)
            tl.store(g_pq + row * (6 * F) + (3 + axis) * F + c, g_q)


@triton.jit
def update_mix_backward(
    counts, g, g_pq, vu, g_out, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXIT: tl.constexpr,
    LAST: tl.constexpr,
):
    """dE/dv of the layer's input, into the last 3F columns of g_out [total, 4F]."""
    first = tl.program_id(0) // (F // BN) * BM
    if EXIT:
        if first >= tl.load(counts):
            return
    i = first + tl.arange(0, BM)
    row = i.to(tl.int64)[:, None]
    c = tl.program_id(0) % (F // BN) * BN + tl.arange(0, BN)[None, :]
    for axis in tl.static_range(3):
        g_v = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, F, BK):
            k = k0 + tl.arange(0, BK)
            a = g_pq + row * (6 * F) + axis * F + k[None, :]
            w = vu + c * (2 * F) + k[:, None]
            g_v += product(tl.load(a), w, 2 * F * F) + product(tl.load(a + 3 * F), w + F, 2 * F * F)
        if not LAST:
            g_v += tl.load(g + row * (4 * F) + (1 + axis) * F + c)
        tl.store(g_out + row * (4 * F) + (1 + axis) * F + c, g_v)
