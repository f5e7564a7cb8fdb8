"""Message layers on the GPU (equations in message.py).

Nothing is scattered: the forward pass sums over the row of the destination, the backward pass over the row of the source,
whose edges are the same pairs seen from the other side. A program takes TILE consecutive rows, one after the other, and a
slice of C channels. Narrow slices keep the registers of a program few, and so many of them at work, which is what hides the
time that the gathers take.
"""

import triton
import triton.language as tl

from .dense_triton import filter_product, halves, halves_product, product, silu, silu_slope
from .update_triton import NORM_EPSILON


@triton.jit
def message_first(
    counts, moments, species, embedding, q_s, q_v, q_vu, s, v, pq, norm, dot, F: tl.constexpr, SKP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EXIT: tl.constexpr,
):
    """First message layer from its moments, and with it the mixing p = v V, q = v U of the update that follows.

    q_vu [SKP, 2F] is q_v @ vu, so that p and q come from the moments too: one kernel less.
    """
    first = tl.program_id(0) // (F // BN) * BM
    if EXIT:
        if first >= tl.load(counts):
            return
    i = first + tl.arange(0, BM)
    row = i.to(tl.int64)[:, None]
    c = tl.program_id(0) % (F // BN) * BN + tl.arange(0, BN)[None, :]
    z = tl.load(species + i)[:, None]
    value = tl.load(embedding + tl.maximum(z, 0) * F + c)
    value = tl.where(z >= 0, value, 0.0)
    for k0 in range(0, SKP, BK):
        k = k0 + tl.arange(0, BK)
        value += product(tl.load(moments + row * (4 * SKP) + k[None, :]), q_s + k[:, None] * F + c, SKP * F)
    tl.store(s + row * F + c, value)
    square = tl.full([BM, BN], NORM_EPSILON, tl.float32)
    p_dot_q = tl.zeros([BM, BN], tl.float32)
    for axis in tl.static_range(3):
        value = tl.zeros([BM, BN], tl.float32)
        p = tl.zeros([BM, BN], tl.float32)
        q = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, SKP, BK):
            k = k0 + tl.arange(0, BK)
            hi, lo, scale = halves(tl.load(moments + row * (4 * SKP) + (1 + axis) * SKP + k[None, :]))
            value += halves_product(hi, lo, q_v + k[:, None] * F + c, SKP * F) * scale
            p += halves_product(hi, lo, q_vu + k[:, None] * (2 * F) + c, SKP * 2 * F) * scale
            q += halves_product(hi, lo, q_vu + k[:, None] * (2 * F) + F + c, SKP * 2 * F) * scale
        tl.store(v + row * (3 * F) + axis * F + c, value)
        tl.store(pq + row * (6 * F) + axis * F + c, p)
        tl.store(pq + row * (6 * F) + (3 + axis) * F + c, q)
        square += p * p
        p_dot_q += p * q
    tl.store(norm + row * F + c, tl.sqrt(square))
    tl.store(dot + row * F + c, p_dot_q)


@triton.jit
def source_features(
    counts, s, v, w1, b1, w2, b2, x, x_vv, hidden, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr, EXIT: tl.constexpr,
):
    """What atoms send, x [total, 5F]: x_s, x_vs and the three components of x_vv v, so that a neighbour reads five numbers a
    channel and not six.

    Keeps x_vv [local, F] and the hidden layer before its activation, hidden [local, F], for the backward pass.
    """
    first = tl.program_id(0) // (F // BN) * BM
    if EXIT:
        if first >= tl.load(counts):
            return
    row = (first + tl.arange(0, BM)).to(tl.int64)[:, None]
    f = tl.arange(0, F)
    h = tl.zeros([BM, F], tl.float32) + tl.load(b1 + f)[None, :]
    for k0 in range(0, F, BK):
        k = k0 + tl.arange(0, BK)
        h += product(tl.load(s + row * F + k[None, :]), w1 + k[:, None] * F + f[None, :], F * F)
    if tl.program_id(0) % (F // BN) == 0:
        tl.store(hidden + row * F + f[None, :], h)
    hi, lo, scale = halves(silu(h))
    for c0 in range(0, BN, BC):
        c = tl.program_id(0) % (F // BN) * BN + c0 + tl.arange(0, BC)
        w = w2 + f[:, None] * (3 * F) + c[None, :]
        bias = b2 + c
        c = c[None, :]
        out = x + row * (5 * F) + c
        tl.store(out, halves_product(hi, lo, w, 3 * F * F) * scale + tl.load(bias)[None, :])
        tl.store(out + F, halves_product(hi, lo, w + F, 3 * F * F) * scale + tl.load(bias + F)[None, :])
        value = halves_product(hi, lo, w + 2 * F, 3 * F * F) * scale + tl.load(bias + 2 * F)[None, :]
        tl.store(x_vv + row * F + c, value)
        for axis in tl.static_range(3):
            tl.store(out + (2 + axis) * F, value * tl.load(v + row * (3 * F) + axis * F + c))


@triton.jit
def source_features_backward(
    counts, g, g_x, hidden, w1, w2, g_out, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    EXIT: tl.constexpr,
):
    """dE/ds before the message layer, into the first F columns of g_out: that past the layer (g), and that through g_x
    [local, 3F]."""
    first = tl.program_id(0) // (F // BN) * BM
    if EXIT:
        if first >= tl.load(counts):
            return
    i = first + tl.arange(0, BM)
    row = i.to(tl.int64)[:, None]
    f = tl.arange(0, F)
    g_h = tl.zeros([BM, F], tl.float32)
    for k0 in range(0, 3 * F, BK):
        k = k0 + tl.arange(0, BK)
        g_h += product(tl.load(g_x + row * (3 * F) + k[None, :]), w2 + f[None, :] * (3 * F) + k[:, None], 3 * F * F)
    hi, lo, scale = halves(g_h * silu_slope(tl.load(hidden + row * F + f[None, :])))
    for c0 in range(0, BN, BC):
        c = tl.program_id(0) % (F // BN) * BN + c0 + tl.arange(0, BC)
        g_s = tl.load(g + row * (4 * F) + c[None, :])
        g_s += halves_product(hi, lo, w1 + c[None, :] * F + f[:, None], F * F) * scale
        tl.store(g_out + row * (4 * F) + c[None, :], g_s)


@triton.jit
def filter_weights(filter, k, c, F: tl.constexpr, KB: tl.constexpr):
    """Columns c of the three blocks of a filter [2 KB, 3F], each [KB, C]: their hi parts, then their lo parts."""
    w = filter + k[:, None] * (3 * F) + c[None, :]
    rest = w + KB * (3 * F)
    return tl.load(w), tl.load(w + F), tl.load(w + 2 * F), tl.load(rest), tl.load(rest + F), tl.load(rest + 2 * F)


@triton.jit
def message(
    counts, x, s, v, filter, edge_count, neighbors, geometry, basis, s_out, v_out, edge_capacity, F: tl.constexpr, KB: tl.constexpr,
    TILE: tl.constexpr, C: tl.constexpr, BE: tl.constexpr,
):
    """Sums of messages, added to the atoms' own features: s_out [local, F] and v_out [local, 3F].

    x: [total, 5F], what atoms send: x_s, x_vs and the three components of x_vv v. filter: f16 [2 KB, 3F], the halves hi and
    below them lo.
    """
    n = tl.load(counts)
    first = tl.program_id(0) // (F // C) * TILE
    c = tl.program_id(0) % (F // C) * C + tl.arange(0, C)
    k = tl.arange(0, KB)
    w_s, w_vs, w_vv, r_s, r_vs, r_vv = filter_weights(filter, k, c, F, KB)
    zero = tl.zeros([BE, C], tl.float32)
    for step in range(0, tl.minimum(TILE, n - first)):
        i = first + step
        count = tl.load(edge_count + i)
        row = i.to(tl.int64)
        sum_s, sum_0, sum_1, sum_2 = zero, zero, zero, zero
        for start in range(0, count, BE):
            place = start + tl.arange(0, BE)
            inside = place < count
            e = row * edge_capacity + place
            j = tl.load(neighbors + e, mask=inside, other=0).to(tl.int64)
            at = e[:, None] * (2 * KB) + k[None, :]
            b = tl.load(basis + at, mask=inside[:, None], other=0.0)
            b_lo = tl.load(basis + at + KB, mask=inside[:, None], other=0.0)
            u_0 = tl.load(geometry + e * 4)[:, None]
            u_1 = tl.load(geometry + e * 4 + 1)[:, None]
            u_2 = tl.load(geometry + e * 4 + 2)[:, None]
            x_j = x + j[:, None] * (5 * F) + c[None, :]
            sum_s += filter_product(b, b_lo, w_s, r_s) * tl.load(x_j)
            m_vs = filter_product(b, b_lo, w_vs, r_vs) * tl.load(x_j + F)
            f_vv = filter_product(b, b_lo, w_vv, r_vv)
            sum_0 += u_0 * m_vs + f_vv * tl.load(x_j + 2 * F)
            sum_1 += u_1 * m_vs + f_vv * tl.load(x_j + 3 * F)
            sum_2 += u_2 * m_vs + f_vv * tl.load(x_j + 4 * F)
        own, out = v + row * (3 * F) + c, v_out + row * (3 * F) + c
        tl.store(s_out + row * F + c, tl.load(s + row * F + c) + tl.sum(sum_s, 0))
        tl.store(out, tl.load(own) + tl.sum(sum_0, 0))
        tl.store(out + F, tl.load(own + F) + tl.sum(sum_1, 0))
        tl.store(out + 2 * F, tl.load(own + 2 * F) + tl.sum(sum_2, 0))


@triton.jit
def message_backward(
    counts, g, x, x_vv, v, filter, edge_count, neighbors, geometry, basis, slope, g_x, g_out, pair_gradient, edge_capacity,
    F: tl.constexpr, KB: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, ADD: tl.constexpr,
):
    """Gradient of what row j sent: g_x [local, 3F], dE/dv in the last 3F columns of g_out [total, 4F], and that of the geometry.

    An edge of row j stands here for the message that goes the other way, from j to its neighbour i, whose unit vector is the
    opposite one. The sums over i are those of g_s w_s, -(u.g_v) w_vs and g_v w_vv; from the last follow both dE/dv_j (times
    x_vv) and dE/dx_vv (times v_j). pair_gradient: f32 [edges, F / C, 4], for each slice of channels dE/dd and dE/du with
    respect to d and u of the edge as row j has it, so that its sum over layers has one meaning. ADD: to what the layer above
    has written.
    """
    n = tl.load(counts)
    first = tl.program_id(0) // (F // C) * TILE
    slice = tl.program_id(0) % (F // C)
    c = slice * C + tl.arange(0, C)
    k = tl.arange(0, KB)
    w_s, w_vs, w_vv, r_s, r_vs, r_vv = filter_weights(filter, k, c, F, KB)
    zero = tl.zeros([BE, C], tl.float32)
    for step in range(0, tl.minimum(TILE, n - first)):
        j = first + step
        count = tl.load(edge_count + j)
        row = j.to(tl.int64)
        own = x + row * (5 * F) + c
        x_s, x_vs = tl.load(own)[None, :], tl.load(own + F)[None, :]
        x_0, x_1, x_2 = tl.load(own + 2 * F)[None, :], tl.load(own + 3 * F)[None, :], tl.load(own + 4 * F)[None, :]
        g_s, g_vs, g_0, g_1, g_2 = zero, zero, zero, zero, zero
        for start in range(0, count, BE):
            place = start + tl.arange(0, BE)
            inside = place < count
            e = row * edge_capacity + place
            i = tl.load(neighbors + e, mask=inside, other=0).to(tl.int64)
            at = e[:, None] * (2 * KB) + k[None, :]
            b = tl.load(basis + at, mask=inside[:, None], other=0.0)
            b_lo = tl.load(basis + at + KB, mask=inside[:, None], other=0.0)
            db = tl.load(slope + at, mask=inside[:, None], other=0.0)
            db_lo = tl.load(slope + at + KB, mask=inside[:, None], other=0.0)
            u_0 = tl.load(geometry + e * 4)[:, None]
            u_1 = tl.load(geometry + e * 4 + 1)[:, None]
            u_2 = tl.load(geometry + e * 4 + 2)[:, None]
            g_i = g + i[:, None] * (4 * F) + c[None, :]
            g_is, g_i0, g_i1, g_i2 = tl.load(g_i), tl.load(g_i + F), tl.load(g_i + 2 * F), tl.load(g_i + 3 * F)
            g_s += g_is * filter_product(b, b_lo, w_s, r_s)
            g_d = g_is * x_s * filter_product(db, db_lo, w_s, r_s)
            along = -(u_0 * g_i0 + u_1 * g_i1 + u_2 * g_i2)
            f = filter_product(b, b_lo, w_vs, r_vs)
            g_vs += along * f
            g_u = -x_vs * f
            d_0, d_1, d_2 = tl.sum(g_u * g_i0, 1), tl.sum(g_u * g_i1, 1), tl.sum(g_u * g_i2, 1)
            g_d += along * x_vs * filter_product(db, db_lo, w_vs, r_vs)
            f = filter_product(b, b_lo, w_vv, r_vv)
            g_0 += f * g_i0
            g_1 += f * g_i1
            g_2 += f * g_i2
            g_d += (x_0 * g_i0 + x_1 * g_i1 + x_2 * g_i2) * filter_product(db, db_lo, w_vv, r_vv)
            d_d = tl.sum(g_d, 1)
            out = pair_gradient + e * (4 * (F // C)) + 4 * slice
            if ADD:
                d_d += tl.load(out, mask=inside, other=0.0)
                d_0 += tl.load(out + 1, mask=inside, other=0.0)
                d_1 += tl.load(out + 2, mask=inside, other=0.0)
                d_2 += tl.load(out + 3, mask=inside, other=0.0)
            tl.store(out, d_d, mask=inside)
            tl.store(out + 1, d_0, mask=inside)
            tl.store(out + 2, d_1, mask=inside)
            tl.store(out + 3, d_2, mask=inside)
        sum_0, sum_1, sum_2 = tl.sum(g_0, 0), tl.sum(g_1, 0), tl.sum(g_2, 0)
        v_j, out_x = v + row * (3 * F) + c, g_x + row * (3 * F) + c
        tl.store(out_x, tl.sum(g_s, 0))
        tl.store(out_x + F, tl.sum(g_vs, 0))
        tl.store(out_x + 2 * F, sum_0 * tl.load(v_j) + sum_1 * tl.load(v_j + F) + sum_2 * tl.load(v_j + 2 * F))
        past = row * (4 * F) + F + c
        factor = tl.load(x_vv + row * F + c)
        tl.store(g_out + past, tl.load(g + past) + factor * sum_0)
        tl.store(g_out + past + F, tl.load(g + past + F) + factor * sum_1)
        tl.store(g_out + past + 2 * F, tl.load(g + past + 2 * F) + factor * sum_2)


@triton.jit
def message_first_backward(
    counts, g, g_v, g_pq, q_s, q_v, q_vu, g_moments, F: tl.constexpr, SKP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EXIT: tl.constexpr, ONLY: tl.constexpr,
):
    """Gradient [local, 4 SKP] with respect to the moments, which p and q of the first update depend on too.

    g: its first F columns are dE/ds of the layer's output. g_v: its last 3F columns are dE/dv past the update, zero if this
    is the ONLY layer.
    """
    first = tl.program_id(0) // (SKP // BN) * BM
    if EXIT:
        if first >= tl.load(counts):
            return
    i = first + tl.arange(0, BM)
    row = i.to(tl.int64)[:, None]
    m = tl.program_id(0) % (SKP // BN) * BN + tl.arange(0, BN)[None, :]
    value = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, F, BK):
        k = k0 + tl.arange(0, BK)
        value += product(tl.load(g + row * (4 * F) + k[None, :]), q_s + m * F + k[:, None], SKP * F)
    tl.store(g_moments + row * (4 * SKP) + m, value)
    for axis in tl.static_range(3):
        value = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, F, BK):
            k = k0 + tl.arange(0, BK)
            a = g_pq + row * (6 * F) + axis * F + k[None, :]
            w = q_vu + m * (2 * F) + k[:, None]
            value += product(tl.load(a), w, SKP * 2 * F) + product(tl.load(a + 3 * F), w + F, SKP * 2 * F)
            if not ONLY:
                value += product(tl.load(g_v + row * (4 * F) + (1 + axis) * F + k[None, :]), q_v + m * F + k[:, None], SKP * F)
        tl.store(g_moments + row * (4 * SKP) + (1 + axis) * SKP + m, value)


@triton.jit
def edge_gradient(
    counts, species, edge_count, neighbors, geometry, basis, slope, g_moments, pair_gradient, repulsion_slope, gradient, edge_capacity,
    K: tl.constexpr, KB: tl.constexpr, SKP: tl.constexpr, SLICES: tl.constexpr, BE: tl.constexpr,
):
    """gradient f32 [edges, 4]: dE/dr of every edge of local rows: first layer, repulsion, and what message_backward collected.

    SLICES: of pair_gradient, 0 if there is one message layer only.
    """
    i = tl.program_id(0)
    if i >= tl.load(counts):
        return
    n = tl.load(edge_count + i)
    k = tl.arange(0, KB)
    for start in range(0, n, BE):
        place = start + tl.arange(0, BE)
        inside = place < n
        e = i.to(tl.int64) * edge_capacity + place
        z = tl.load(species + tl.load(neighbors + e, mask=inside, other=0), mask=inside, other=0)
        mask = inside[:, None] & (k < K)[None, :]
        halves = e[:, None] * (2 * KB) + k[None, :]
        b = tl.load(basis + halves, mask=mask, other=0.0).to(tl.float32)
        b += tl.load(basis + halves + KB, mask=mask, other=0.0).to(tl.float32)
        db = tl.load(slope + halves, mask=mask, other=0.0).to(tl.float32)
        db += tl.load(slope + halves + KB, mask=mask, other=0.0).to(tl.float32)
        m = g_moments + i.to(tl.int64) * (4 * SKP) + (z * K)[:, None] + k[None, :]
        m_1 = tl.load(m + SKP, mask=mask, other=0.0)
        m_2 = tl.load(m + 2 * SKP, mask=mask, other=0.0)
        m_3 = tl.load(m + 3 * SKP, mask=mask, other=0.0)
        u_0 = tl.load(geometry + e * 4, mask=inside, other=0.0)
        u_1 = tl.load(geometry + e * 4 + 1, mask=inside, other=0.0)
        u_2 = tl.load(geometry + e * 4 + 2, mask=inside, other=0.0)
        d = tl.load(geometry + e * 4 + 3, mask=inside, other=1.0)
        total = tl.load(m, mask=mask, other=0.0) + u_0[:, None] * m_1 + u_1[:, None] * m_2 + u_2[:, None] * m_3
        g_d = tl.sum(db * total, 1) + tl.load(repulsion_slope + e, mask=inside, other=0.0)
        g_0, g_1, g_2 = tl.sum(b * m_1, 1), tl.sum(b * m_2, 1), tl.sum(b * m_3, 1)
        if SLICES > 0:
            slices = tl.arange(0, 4 * SLICES)
            parts = tl.load(pair_gradient + e[:, None] * (4 * SLICES) + slices[None, :], mask=inside[:, None], other=0.0)
            which = (slices % 4)[None, :]
            g_d += tl.sum(tl.where(which == 0, parts, 0.0), 1)
            g_0 += tl.sum(tl.where(which == 1, parts, 0.0), 1)
            g_1 += tl.sum(tl.where(which == 2, parts, 0.0), 1)
            g_2 += tl.sum(tl.where(which == 3, parts, 0.0), 1)
        radial = g_d - (g_0 * u_0 + g_1 * u_1 + g_2 * u_2) / d
        tl.store(gradient + e * 4, radial * u_0 + g_0 / d, mask=inside)
        tl.store(gradient + e * 4 + 1, radial * u_1 + g_1 / d, mask=inside)
        tl.store(gradient + e * 4 + 2, radial * u_2 + g_2 / d, mask=inside)
