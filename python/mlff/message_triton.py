"""Message layers on the GPU (equations in message.py).

Nothing is scattered: the forward pass sums over the row of the destination, the backward pass over the row of the source,
whose edges are the same pairs seen from the other side. A program takes TILE consecutive rows, one after the other, and a
slice of C channels. Narrow slices keep the registers of a program few, and so many of them at work, which is what hides the
time that the gathers take. With one row, what is known of its edges is loaded, and their filters are made, before the kernel before
has ended.

The atom-wise kernels have the form of dense_triton.py.
"""

import triton
import triton.language as tl

from .dense_triton import UNSCALE, filter_product, place, product, silu, silu_slope, store_hidden, unscaled_product, weights
from .filter_triton import stack
from .launch_triton import finished, next_kernel, previous_kernel, together
from .update_triton import load_mix, load_sum, load_vector, rows_of, store_norms


@triton.jit
def from_moments(m, w, species, embedding, WIDTH: tl.constexpr, SKP: tl.constexpr, BK: tl.constexpr):
    """Moments m [BM, SKP] times weights w [SKP, BN]; plus the embedding [S, BN] of the elements, if it is not None: zero for atoms that
    the model ignores."""
    value = of_element(species, embedding, WIDTH, m.shape[0], w.shape[1])
    for k0 in tl.static_range(0, SKP, BK):
        w_hi, w_lo = weights(w + k0 * WIDTH, WIDTH * SKP)
        value += product(tl.load(m + k0), w_hi, w_lo)
    return value


@triton.jit
def of_element(species, embedding, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    value = tl.zeros([BM, BN], tl.float32)
    if embedding is not None:
        element = tl.load(species)
        value += tl.where(element >= 0, tl.load(embedding + tl.maximum(element, 0) * WIDTH), 0.0)
    return value


@triton.jit
def message_first(
    counts, moments, species, embedding, q_s, q_vpq, s, v, pq, F: tl.constexpr, SKP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EXIT: tl.constexpr,
):
    """First message layer from its moments, and with it the mixing p = v V, q = v U of the update that follows.

    q_vpq [SKP, 3F] is q_v beside q_v @ vu, so that p and q come from the moments too: one kernel less. A program has columns of
    the scalars, or of v, p or q of one component.
    """
    ACROSS: tl.constexpr = 10 * F // BN
    row, c = place(ACROSS, BM, BN)
    axis = (tl.program_id(0) % ACROSS + 2 * F // BN) // (3 * F // BN) - 1  # -1: scalars
    n = tl.load(counts)
    k = tl.arange(0, BK)
    m = moments + row * (4 * SKP) + k[None, :]
    previous_kernel()
    if EXIT:
        if tl.program_id(0) // ACROSS * BM >= n:
            return
    if axis < 0:
        value = from_moments(m, q_s + k[:, None] * F + c, species + row, embedding + c, F, SKP, BK)
        tl.store(s + row * F + c, value)
    else:
        is_v = (tl.program_id(0) % ACROSS + 2 * F // BN) % (3 * F // BN) < F // BN
        c -= F + axis * (3 * F)  # of v, p and q
        value = from_moments(m + (1 + axis) * SKP, q_vpq + k[:, None] * (3 * F) + c, None, None, 3 * F, SKP, BK)
        tl.store(tl.where(is_v, v + row * (3 * F) + axis * F, pq + row * (6 * F) + axis * (2 * F) - F) + c, value)


@triton.jit
def moment_weights(w, WIDTH: tl.constexpr, SKP: tl.constexpr, BK: tl.constexpr):
    """Blocks of weights [SKP, BN], each [BK, BN], all of which are there before a kernel waits: hi parts, lo parts."""
    hi, lo = (), ()
    for k0 in tl.static_range(0, SKP, BK):
        w_hi, w_lo = together(*weights(w + k0 * WIDTH, WIDTH * SKP))
        hi, lo = hi + (w_hi,), lo + (w_lo,)
    return hi, lo


@triton.jit
def moment_rows(m, SKP: tl.constexpr, BK: tl.constexpr):
    """Blocks of moments [BM, SKP], each [BM, BK]."""
    rows = ()
    for k0 in tl.static_range(0, SKP, BK):
        rows = rows + (tl.load(m + k0),)
    return rows


@triton.jit
def moment_product(value, rows, hi, lo):
    """Blocks of moments times blocks of weights, added to a value."""
    for k in tl.static_range(len(rows)):
        value += unscaled_product(rows[k], hi[k], lo[k])
    return value


@triton.jit
def message_first_merged(
    counts, moments, species, embedding, q_s, q_vpq, s, v, pq, embedding_hidden, q_hidden, w1, terms, F: tl.constexpr, SKP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EPSILON: tl.constexpr,
):
    """message_first, and the terms of the hidden layer of the update that update_mix_merged makes for other layers. That of the scalars is made
    of embedding_hidden [S, F] and q_hidden [SKP, F], the embedding and q_s times the weight.

    A program has columns of the scalars or of their term, of one component of v or q, or of all components of p and the term of their norms.
    """
    P: tl.constexpr = F // BN
    row, c = place(9 * P, BM, BN)
    block = tl.program_id(0) % (9 * P)
    k = tl.arange(0, BK)
    m = moments + row * (4 * SKP) + k[None, :]
    terms += row * ((1 + P) * F)
    zero = tl.zeros([BM, BN], tl.float32)
    if block < P:
        w_hi, w_lo = moment_weights(q_vpq + k[:, None] * (3 * F) + F + c, 3 * F, SKP, BK)
        n_hi, n_lo = together(*rows_of(w1 + F * F, BN, F, 9 * P, 2 * F * F))
        previous_kernel()
        m_0, m_1, m_2 = moment_rows(m + SKP, SKP, BK), moment_rows(m + 2 * SKP, SKP, BK), moment_rows(m + 3 * SKP, SKP, BK)
        p_0, p_1, p_2 = moment_product(zero, m_0, w_hi, w_lo), moment_product(zero, m_1, w_hi, w_lo), moment_product(zero, m_2, w_hi, w_lo)
        store_norms(pq + row * (6 * F) + c, terms + (1 + block) * F + tl.arange(0, F)[None, :], p_0, p_1, p_2, n_hi, n_lo, F, EPSILON)
    elif block < 7 * P:
        axis, is_v = (block // P - 1) % 3, block < 4 * P
        c -= block // P * F
        hi, lo = moment_weights(q_vpq + k[:, None] * (3 * F) + tl.where(is_v, c, 2 * F + c), 3 * F, SKP, BK)
        previous_kernel()
        value = moment_product(zero, moment_rows(m + (1 + axis) * SKP, SKP, BK), hi, lo)
        tl.store(tl.where(is_v, v + row * (3 * F) + axis * F, pq + row * (6 * F) + (2 * axis + 1) * F) + c, value)
    else:
        is_s = block < 8 * P
        c -= block // P * F
        hi, lo = moment_weights(tl.where(is_s, q_s, q_hidden) + k[:, None] * F + c, F, SKP, BK)
        previous_kernel()
        m_s, value = moment_rows(m, SKP, BK), of_element(species + row, tl.where(is_s, embedding, embedding_hidden) + c, F, BM, BN)
        value = moment_product(value, m_s, hi, lo)
        tl.store(tl.where(is_s, s + row * F, terms) + c, value)


@triton.jit
def source_hidden(counts, s, w1, b1, active, slope, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXIT: tl.constexpr):
    """The hidden layer: active [local, F], and the slope of the activation for the backward pass."""
    row, c = place(F // BN, BM, BN)
    k = tl.arange(0, F)
    w_hi, w_lo = weights(w1 + k[:, None] * F + c, F * F)
    bias, n = tl.load(b1 + c), tl.load(counts)
    previous_kernel()
    if EXIT:
        if tl.program_id(0) // (F // BN) * BM >= n:
            return
    store_hidden(active, slope, row * F + c, product(tl.load(s + row * F + k[None, :]), w_hi, w_lo) + bias)


@triton.jit
def source_features(
    counts, active, v, w2, b2, x, x_vv, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXIT: tl.constexpr
):
    """What atoms send, x [total, 5F]: x_s, x_vs and the three components of x_vv v, so that a neighbour reads five numbers a
    channel and not six. Keeps x_vv [local, F] for the backward pass. A program has columns of one of the three."""
    row, c = place(3 * F // BN, BM, BN)
    is_vv = tl.program_id(0) % (3 * F // BN) >= 2 * F // BN
    k = tl.arange(0, F)
    w_hi, w_lo = weights(w2 + k[:, None] * (3 * F) + c, 3 * F * F)
    bias, n = tl.load(b2 + c), tl.load(counts)
    previous_kernel()
    if EXIT:
        if tl.program_id(0) // (3 * F // BN) * BM >= n:
            return
    value = product(tl.load(active + row * F + k[None, :]), w_hi, w_lo) + bias
    out = x + row * (5 * F) + c
    if is_vv:
        v_0, v_1, v_2 = load_vector(v + row * (3 * F) - 2 * F + c, F)
        tl.store(x_vv + row * F - 2 * F + c, value)
        tl.store(out, value * v_0)
        tl.store(out + F, value * v_1)
        tl.store(out + 2 * F, value * v_2)
    else:
        tl.store(out, value)


@triton.jit
def source_hidden_backward(counts, g_x, w2, g_hidden, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXIT: tl.constexpr):
    """Gradient of the hidden layer after its activation, g_hidden [local, 3F], whose three blocks are to be added up, from that of
    what was sent, g_x [local, 3F]."""
    row, c = place(3 * F // BN, BM, BN)
    k, part = tl.arange(0, F), tl.program_id(0) % (3 * F // BN) // (F // BN)
    w_hi, w_lo = weights(w2 + (c - part * F) * (3 * F) + part * F + k[:, None], 3 * F * F)
    n = tl.load(counts)
    previous_kernel()
    if EXIT:
        if tl.program_id(0) // (3 * F // BN) * BM >= n:
            return
    tl.store(g_hidden + row * (3 * F) + c, product(tl.load(g_x + row * (3 * F) + part * F + k[None, :]), w_hi, w_lo))


@triton.jit
def source_features_backward(
    counts, g, slope, g_hidden, w1, g_out, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXIT: tl.constexpr
):
    """dE/ds before the message layer, into the first F columns of g_out: that past the layer (g), and that through g_hidden."""
    row, c = place(F // BN, BM, BN)
    k = tl.arange(0, F)
    w_hi, w_lo = weights(w1 + c * F + k[:, None], F * F)
    factor, g_s, n = tl.load(slope + row * F + k[None, :]), tl.load(g + row * (4 * F) + c), tl.load(counts)
    previous_kernel()
    if EXIT:
        if tl.program_id(0) // (F // BN) * BM >= n:
            return
    g_h = load_sum(g_hidden + row * (3 * F) + k[None, :], F, 3)
    tl.store(g_out + row * (4 * F) + c, g_s + product(g_h * factor, w_hi, w_lo))


@triton.jit
def source_merged(
    counts, terms, v, b1, w2, b2, slope, x, x_vv, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TERMS: tl.constexpr
):
    """source_features from the terms [local, TERMS, F] of the hidden layer, which update_merged has made."""
    next_kernel()
    ACROSS: tl.constexpr = 3 * F // BN
    row, c = place(ACROSS, BM, BN)
    k = tl.arange(0, F)
    w_hi, w_lo = weights(w2 + k[:, None] * (3 * F) + c, 3 * F * F)
    k = k[None, :]
    of_units, bias = tl.load(b1 + k), tl.load(b2 + c)
    w_hi, w_lo = together(w_hi, w_lo)
    previous_kernel()
    part = tl.program_id(0) % ACROSS // (F // BN)
    # Loaded by all, so that those who need them do not wait for them at the end.
    v_0, v_1, v_2 = load_vector(v + row * (3 * F) + c - part * F, F)
    h, v_0, v_1, v_2 = together(load_sum(terms + row * (TERMS * F) + k, F, TERMS), v_0, v_1, v_2)
    h += of_units
    value = unscaled_product(silu(h), w_hi, w_lo) + bias
    out = x + row * (5 * F) + c
    if part == 2:
        tl.store(x_vv + row * F - 2 * F + c, value)
        tl.store(out, value * v_0)
        tl.store(out + F, value * v_1)
        tl.store(out + 2 * F, value * v_2)
    else:
        tl.store(out, value)
    if tl.program_id(0) % ACROSS == 0:
        tl.store(slope + row * F + k, silu_slope(h))


@triton.jit
def source_merged_backward(
    counts, g, g_x, slope, w2, w1, parts, F: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """source_hidden_backward and source_features_backward: a program has H hidden units.

    parts [local, F / H, F]: dE/ds before the message layer, F / H numbers to add up; the first of them has that past the layer (g).
    """
    ACROSS: tl.constexpr = F // H * (F // BN)
    row, c = place(ACROSS, BM, BN)
    part = tl.program_id(0) % ACROSS // (F // BN)
    k, unit = tl.arange(0, F), part * H + tl.arange(0, H)
    w = w2 + unit[None, :] * (3 * F) + k[:, None]
    hi_0, lo_0 = weights(w, 3 * F * F)
    hi_1, lo_1 = weights(w + F, 3 * F * F)
    hi_2, lo_2 = weights(w + 2 * F, 3 * F * F)
    to_hi, to_lo = weights(w1 + (c - part * F) * F + unit[:, None], F * F)
    factor = tl.load(slope + row * F + unit[None, :])
    past = tl.load(g + row * (4 * F) + c - part * F)
    factor, past, hi_0, lo_0, hi_1, lo_1, hi_2, lo_2, to_hi, to_lo = together(factor, past, hi_0, lo_0, hi_1, lo_1, hi_2, lo_2, to_hi, to_lo)
    previous_kernel()
    g_0, g_1, g_2 = load_vector(g_x + row * (3 * F) + k[None, :], F)
    g_h = unscaled_product(g_0, hi_0, lo_0) + unscaled_product(g_1, hi_1, lo_1) + unscaled_product(g_2, hi_2, lo_2)
    tl.store(parts + row * (F * (F // H)) + c, tl.where(part == 0, past, 0.0) + unscaled_product(g_h * factor, to_hi, to_lo))


@triton.jit
def filter_weights(filter, k, c, F: tl.constexpr, KB: tl.constexpr):
    """Columns c of the three blocks of a filter [2 KB, 3F], each [KB, C]: their hi parts, then their lo parts."""
    w = filter + k[:, None] * (3 * F) + c[None, :]
    rest = w + KB * (3 * F)
    return tl.load(w), tl.load(w + F), tl.load(w + 2 * F), tl.load(rest), tl.load(rest + F), tl.load(rest + 2 * F)


@triton.jit
def load_neighbors(neighbors, row, start, limit, edge_capacity, BE: tl.constexpr):
    """Neighbours [BE] of a row from place start on; zero beyond the limit."""
    place = start + tl.arange(0, BE)
    return tl.load(neighbors + row * edge_capacity + place, mask=place < limit, other=0).to(tl.int64)


@triton.jit
def row_edges(row, start, limit, geometry, basis, edge_capacity, KB: tl.constexpr, BE: tl.constexpr):
    """Of the BE edges of a row from start on: the basis [BE, KB] (hi, lo) and unit vectors [BE, 1]; zero beyond the limit."""
    place = start + tl.arange(0, BE)[:, None]
    inside = place < limit
    e = row * edge_capacity + place
    at = basis + e * (2 * KB) + tl.arange(0, KB)[None, :]
    b, b_lo = tl.load(at, mask=inside, other=0.0), tl.load(at + KB, mask=inside, other=0.0)
    u = geometry + e * 4
    return b, b_lo, tl.load(u, mask=inside, other=0.0), tl.load(u + 1, mask=inside, other=0.0), tl.load(u + 2, mask=inside, other=0.0)


@triton.jit
def only(start, count, rows, BE: tl.constexpr):
    """Numbers [BE] or rows [BE, ..] of a block of edges, zero beyond the count, where they have been loaded without waiting for it."""
    inside = start + tl.arange(0, BE) < count
    kept = ()
    for k in tl.static_range(len(rows)):
        kept = kept + (tl.where(inside if len(rows[k].shape) == 1 else inside[:, None], rows[k], 0),)
    return kept


@triton.jit
def message_filters(b, b_lo, filters, C: tl.constexpr, BE: tl.constexpr):
    """f_s, f_vs and f_vv of edges from their basis, and what filter_weights gives."""
    w_s, w_vs, w_vv, r_s, r_vs, r_vv = filters
    return filter_product(b, b_lo, w_s, r_s, BE, C), filter_product(b, b_lo, w_vs, r_vs, BE, C), filter_product(b, b_lo, w_vv, r_vv, BE, C)


@triton.jit
def message_sums(sums, x, c, j, u_0, u_1, u_2, made, F: tl.constexpr):
    """The sums (scalars, three components) with the messages of some edges added: what their neighbours j send times the filters ``made``."""
    sum_s, sum_0, sum_1, sum_2 = sums
    f_s, f_vs, f_vv = made
    x_j = x + j[:, None] * (5 * F) + c[None, :]
    x_s, x_vs, x_0, x_1, x_2 = tl.load(x_j), tl.load(x_j + F), tl.load(x_j + 2 * F), tl.load(x_j + 3 * F), tl.load(x_j + 4 * F)
    m_vs = f_vs * x_vs
    return sum_s + f_s * x_s, sum_0 + (u_0 * m_vs + f_vv * x_0), sum_1 + (u_1 * m_vs + f_vv * x_1), sum_2 + (u_2 * m_vs + f_vv * x_2)


@triton.jit
def message(
    counts, x, s, v, filter, edge_count, neighbors, geometry, basis, s_out, v_out, edge_capacity, F: tl.constexpr, KB: tl.constexpr,
    TILE: tl.constexpr, C: tl.constexpr, BE: tl.constexpr,
):
    """Sums of messages, added to the atoms' own features: s_out [local, F] and v_out [local, 3F].

    x: [total, 5F], what atoms send: x_s, x_vs and the three components of x_vv v. filter: f16 [2 KB, 3F], the halves hi and
    below them lo, with columns in the order of plan.filter_columns.
    """
    n = tl.load(counts)
    first = tl.program_id(0) // (F // C) * TILE
    c = tl.program_id(0) % (F // C) * C + tl.arange(0, C)
    filters = filter_weights(filter, tl.arange(0, KB), c, F, KB)
    zero = tl.zeros([BE, C], tl.float32)
    if TILE > 1:
        previous_kernel()
    for step in range(0, 1 if TILE == 1 else tl.minimum(TILE, n - first)):
        i = first + step
        count = tl.load(edge_count + i)
        if TILE == 1:
            count = tl.where(i < n, count, 0)
        row = i.to(tl.int64)
        if TILE > 1:
            own_s = tl.load(s + row * F + c)
            own_0, own_1, own_2 = load_vector(v + row * (3 * F) + c, F)
        sums = (zero, zero, zero, zero)
        start = 0
        if TILE == 1:  # two blocks of edges are ready when the kernel before has ended, and their gathers go together
            j = load_neighbors(neighbors, row, 0, edge_capacity, edge_capacity, BE)
            j_next = load_neighbors(neighbors, row, BE, edge_capacity, edge_capacity, BE)
            ahead = load_neighbors(neighbors, row, 2 * BE, edge_capacity, edge_capacity, BE)
            b, b_lo, u_0, u_1, u_2 = row_edges(row, 0, edge_capacity, geometry, basis, edge_capacity, KB, BE)
            b_next, b_lo_next, u_3, u_4, u_5 = row_edges(row, BE, edge_capacity, geometry, basis, edge_capacity, KB, BE)
            b, b_lo, u_0, u_1, u_2, b_next, b_lo_next, u_3, u_4, u_5 = together(b, b_lo, u_0, u_1, u_2, b_next, b_lo_next, u_3, u_4, u_5)
            filters = together(*filters)
            j, b, b_lo = only(0, count, (j, b, b_lo), BE)
            j_next, b_next, b_lo_next = only(BE, count, (j_next, b_next, b_lo_next), BE)
            (ahead,) = only(2 * BE, count, (ahead,), BE)
            f_s, f_vs, f_vv = message_filters(b, b_lo, filters, C, BE)
            f_s_next, f_vs_next, f_vv_next = message_filters(b_next, b_lo_next, filters, C, BE)
            f_s, f_vs, f_vv, f_s_next, f_vs_next, f_vv_next = finished(f_s, f_vs, f_vv, f_s_next, f_vs_next, f_vv_next)
            previous_kernel()
            own_s = tl.load(s + row * F + c)  # of the update, which may be at work above: source_merged lets this kernel start early
            own_0, own_1, own_2 = load_vector(v + row * (3 * F) + c, F)
            sums = message_sums(sums, x, c, j, u_0, u_1, u_2, (f_s, f_vs, f_vv), F)
            sums = message_sums(sums, x, c, j_next, u_3, u_4, u_5, (f_s_next, f_vs_next, f_vv_next), F)
            start = 2 * BE
        for at in range(start, count, BE):
            if TILE == 1:
                j, ahead = ahead, load_neighbors(neighbors, row, at + BE, count, edge_capacity, BE)
            else:  # other programs hide the latency, and every register counts
                j = load_neighbors(neighbors, row, at, count, edge_capacity, BE)
            b, b_lo, u_0, u_1, u_2 = row_edges(row, at, count, geometry, basis, edge_capacity, KB, BE)
            sums = message_sums(sums, x, c, j, u_0, u_1, u_2, message_filters(b, b_lo, filters, C, BE), F)
        sum_s, sum_0, sum_1, sum_2 = sums
        out = v_out + row * (3 * F) + c
        tl.store(s_out + row * F + c, own_s + tl.sum(sum_s, 0) * UNSCALE)
        tl.store(out, own_0 + tl.sum(sum_0, 0) * UNSCALE)
        tl.store(out + F, own_1 + tl.sum(sum_1, 0) * UNSCALE)
        tl.store(out + 2 * F, own_2 + tl.sum(sum_2, 0) * UNSCALE)
    previous_kernel()


@triton.jit
def slope_edges(row, start, limit, geometry, basis, slope, edge_capacity, KB: tl.constexpr, BE: tl.constexpr):
    """Of the BE edges of a row from start on: places [BE], the basis and its slope [BE, KB] (hi, lo each) and unit vectors."""
    place = start + tl.arange(0, BE)
    inside = place < limit
    e = row * edge_capacity + place
    at = e[:, None] * (2 * KB) + tl.arange(0, KB)[None, :]
    b, b_lo = tl.load(basis + at, mask=inside[:, None], other=0.0), tl.load(basis + at + KB, mask=inside[:, None], other=0.0)
    db, db_lo = tl.load(slope + at, mask=inside[:, None], other=0.0), tl.load(slope + at + KB, mask=inside[:, None], other=0.0)
    u = geometry + e * 4
    return e, inside, b, b_lo, db, db_lo, tl.load(u)[:, None], tl.load(u + 1)[:, None], tl.load(u + 2)[:, None]


@triton.jit
def message_gradients(
    pair_gradient, sums, own, i, edges, ready, filters, g, c, slice, F: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, ADD: tl.constexpr,
):
    """sums with the gradients of some messages added, and the gradients of their edges written.

    sums: of g_s w_s, -(u.g_v) w_vs and g_v w_vv. own: what the row sent. i: neighbours [BE]. edges: what slope_edges gives. ready: the
    filters and their slopes, if they have been made; where they take too many registers they are made one by one (None).
    """
    g_s, g_vs, g_0, g_1, g_2 = sums
    x_s, x_vs, x_0, x_1, x_2 = own
    e, inside, b, b_lo, db, db_lo, u_0, u_1, u_2 = edges
    w_s, w_vs, w_vv, r_s, r_vs, r_vv = filters
    g_i = g + i[:, None] * (4 * F) + c[None, :]
    g_is, g_i0, g_i1, g_i2 = tl.load(g_i), tl.load(g_i + F), tl.load(g_i + 2 * F), tl.load(g_i + 3 * F)
    g_s += g_is * (filter_product(b, b_lo, w_s, r_s, BE, C) if ready is None else ready[0])
    g_d = g_is * x_s * (filter_product(db, db_lo, w_s, r_s, BE, C) if ready is None else ready[1])
    along = -(u_0 * g_i0 + u_1 * g_i1 + u_2 * g_i2)
    f = filter_product(b, b_lo, w_vs, r_vs, BE, C) if ready is None else ready[2]
    g_vs += along * f
    g_u = -x_vs * f
    d_0, d_1, d_2 = tl.sum(g_u * g_i0, 1) * UNSCALE, tl.sum(g_u * g_i1, 1) * UNSCALE, tl.sum(g_u * g_i2, 1) * UNSCALE
    g_d += along * x_vs * (filter_product(db, db_lo, w_vs, r_vs, BE, C) if ready is None else ready[3])
    f = filter_product(b, b_lo, w_vv, r_vv, BE, C) if ready is None else ready[4]
    g_0 += f * g_i0
    g_1 += f * g_i1
    g_2 += f * g_i2
    g_d += (x_0 * g_i0 + x_1 * g_i1 + x_2 * g_i2) * (filter_product(db, db_lo, w_vv, r_vv, BE, C) if ready is None else ready[5])
    d_d = tl.sum(g_d, 1) * UNSCALE
    out = pair_gradient + (e * (4 * (F // C)) + 4 * slice)[:, None] + tl.arange(0, 4)[None, :]
    values = tl.reshape(stack((d_d, d_0, d_1, d_2)), (BE, 4))
    if ADD:
        values += tl.load(out, mask=inside[:, None], other=0.0)
    tl.store(out, values, mask=inside[:, None])
    return g_s, g_vs, g_0, g_1, g_2


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
    filters = filter_weights(filter, tl.arange(0, KB), c, F, KB)
    zero = tl.zeros([BE, C], tl.float32)
    if TILE > 1:
        previous_kernel()
    for step in range(0, 1 if TILE == 1 else tl.minimum(TILE, n - first)):
        j = first + step
        count = tl.load(edge_count + j)
        if TILE == 1:
            count = tl.where(j < n, count, 0)
        row = j.to(tl.int64)
        sent = x + row * (5 * F) + c
        x_0, x_1, x_2 = load_vector(sent + 2 * F, F)
        own = (tl.load(sent)[None, :], tl.load(sent + F)[None, :], x_0[None, :], x_1[None, :], x_2[None, :])
        sums = (zero, zero, zero, zero, zero)
        if TILE > 1:
            ahead = load_neighbors(neighbors, row, 0, count, edge_capacity, BE)
        past = row * (4 * F) + F + c
        start = 0
        if TILE == 1:  # the first block is ready when the kernel before has ended
            i = load_neighbors(neighbors, row, 0, edge_capacity, edge_capacity, BE)
            ahead = load_neighbors(neighbors, row, BE, edge_capacity, edge_capacity, BE)
            e, inside, b, b_lo, db, db_lo, u_0, u_1, u_2 = slope_edges(row, 0, edge_capacity, geometry, basis, slope, edge_capacity, KB, BE)
            b, b_lo, db, db_lo, u_0, u_1, u_2 = together(b, b_lo, db, db_lo, u_0, u_1, u_2)
            filters = together(*filters)
            inside = tl.arange(0, BE) < count
            i, b, b_lo, db, db_lo = only(0, count, (i, b, b_lo, db, db_lo), BE)
            (ahead,) = only(BE, count, (ahead,), BE)
            w_s, w_vs, w_vv, r_s, r_vs, r_vv = filters
            ready = finished(
                filter_product(b, b_lo, w_s, r_s, BE, C), filter_product(db, db_lo, w_s, r_s, BE, C),
                filter_product(b, b_lo, w_vs, r_vs, BE, C), filter_product(db, db_lo, w_vs, r_vs, BE, C),
                filter_product(b, b_lo, w_vv, r_vv, BE, C), filter_product(db, db_lo, w_vv, r_vv, BE, C),
            )
            v_0, v_1, v_2 = load_vector(v + row * (3 * F) + c, F)
            factor = tl.load(x_vv + row * F + c)
            previous_kernel()
            past_0, past_1, past_2 = load_vector(g + past, F)
            edges = (e, inside, b, b_lo, db, db_lo, u_0, u_1, u_2)
            sums = message_gradients(pair_gradient, sums, own, i, edges, ready, filters, g, c, slice, F, C, BE, ADD)
            start = BE
        for at in range(start, count, BE):
            i, ahead = ahead, load_neighbors(neighbors, row, at + BE, count, edge_capacity, BE)
            edges = slope_edges(row, at, count, geometry, basis, slope, edge_capacity, KB, BE)
            sums = message_gradients(pair_gradient, sums, own, i, edges, None, filters, g, c, slice, F, C, BE, ADD)
        if TILE > 1:
            v_0, v_1, v_2 = load_vector(v + row * (3 * F) + c, F)
            factor = tl.load(x_vv + row * F + c)
            past_0, past_1, past_2 = load_vector(g + past, F)
        g_s, g_vs, g_0, g_1, g_2 = sums
        sum_0, sum_1, sum_2 = tl.sum(g_0, 0) * UNSCALE, tl.sum(g_1, 0) * UNSCALE, tl.sum(g_2, 0) * UNSCALE
        of_x = sum_0 * v_0 + sum_1 * v_1 + sum_2 * v_2
        # In one store, as what is written of an edge: each on its own would go through shared memory, and in parts of what L2 keeps together.
        values = stack((tl.sum(g_s, 0) * UNSCALE, tl.sum(g_vs, 0) * UNSCALE, of_x, past_0 + factor * sum_0, past_1 + factor * sum_1,
                        past_2 + factor * sum_2, of_x, of_x))
        part, c_k = tl.arange(0, 8)[None, :], c[:, None]
        out = tl.where(part < 3, g_x + row * (3 * F) + part * F, g_out + row * (4 * F) + (part - 2) * F) + c_k
        tl.store(out, tl.reshape(values, (C, 8)), mask=(part < 6) & (c_k < F))
    previous_kernel()


@triton.jit
def message_first_backward(
    counts, g, g_v, g_pq, q_s, q_vpq, g_moments, F: tl.constexpr, SKP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EXIT: tl.constexpr, ONLY: tl.constexpr,
):
    """Gradient [local, 4 SKP] with respect to the moments, which p and q of the first update depend on too.

    g: its first F columns are dE/ds of the layer's output. g_v: its last 3F columns are dE/dv past the update, zero if this
    is the ONLY layer.
    """
    ACROSS: tl.constexpr = 4 * SKP // BN
    row, c = place(ACROSS, BM, BN)
    axis = tl.program_id(0) % ACROSS // (SKP // BN) - 1  # -1: of the scalars
    n = tl.load(counts)
    k = tl.arange(0, F)
    m = c - (1 + axis) * SKP
    if axis < 0:
        w_hi, w_lo = weights(q_s + m * F + k[:, None], SKP * F)
        previous_kernel()
        if EXIT:
            if tl.program_id(0) // ACROSS * BM >= n:
                return
        value = product(tl.load(g + row * (4 * F) + k[None, :]), w_hi, w_lo)
    else:
        w = q_vpq + m * (3 * F) + k[:, None]
        value = tl.zeros([BM, BN], tl.float32)
        if not ONLY:
            w_hi, w_lo = weights(w, SKP * 3 * F)
            value += product(tl.load(g_v + row * (4 * F) + (1 + axis) * F + k[None, :]), w_hi, w_lo)
        p_hi, p_lo = weights(w + F, SKP * 3 * F)
        q_hi, q_lo = weights(w + 2 * F, SKP * 3 * F)
        previous_kernel()
        if EXIT:
            if tl.program_id(0) // ACROSS * BM >= n:
                return
        a = g_pq + row * (6 * F) + axis * (2 * F) + k[None, :]
        a_p, a_q = tl.load(a), tl.load(a + F)
        value += product(a_p, p_hi, p_lo) + product(a_q, q_hi, q_lo)
    tl.store(g_moments + row * (4 * SKP) + c, value)


@triton.jit
def message_first_merged_backward(
    counts, g_s, g, pq, gates, parts, q_s, q_vpq, g_moments, F: tl.constexpr, SKP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SUMMANDS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ONLY: tl.constexpr, EPSILON: tl.constexpr,
):
    """message_first_backward from what update_merged_backward gives, as update_mix_merged_backward."""
    next_kernel()
    ACROSS: tl.constexpr = 4 * SKP // BN
    row, c = place(ACROSS, BM, BN)
    block = tl.program_id(0) % ACROSS // (SKP // BN)
    of_scalars, axis = block == 0, tl.maximum(block - 1, 0)
    down, k = tl.arange(0, F)[:, None], tl.arange(0, F)[None, :]
    m = c - block * SKP
    w = q_vpq + m * (3 * F) + down
    # Scalars are their own p, times one and not dnorm/dp; there is nothing of q and v.
    width = tl.where(of_scalars, F, 3 * F)
    p_hi, p_lo = weights(tl.where(of_scalars, q_s, q_vpq + F) + m * width + down, SKP * width)
    q_hi, q_lo = weights(w + 2 * F, SKP * 3 * F)
    p, q, along, a_sv = load_mix(pq, gates, row, axis, k, F, EPSILON)
    q, along = tl.where(of_scalars, 1.0, q * a_sv), tl.where(of_scalars, 1.0, along)
    p = tl.where(of_scalars, 0.0, p * a_sv)
    of_output = g_s + row * WIDTH + k
    through = parts + row * (2 * F * PARTS) + tl.where(of_scalars, 0, F) + k
    if ONLY:  # the gradient of the features is of the kernel before
        p, q, along, p_hi, p_lo, q_hi, q_lo = together(p, q, along, p_hi, p_lo, q_hi, q_lo)
        previous_kernel()
        g, g_through = load_sum(of_output, F, SUMMANDS), load_sum(through, 2 * F, PARTS)
        value = unscaled_product(g * p, q_hi, q_lo)
        g_p = g * q
    else:
        g_p = load_sum(of_output, F, SUMMANDS)
        w_hi, w_lo = weights(w, SKP * 3 * F)
        past = tl.where(of_scalars, 0.0, tl.load(g + row * (4 * F) + (1 + axis) * F + k))
        g_q, g_p = g_p * p + tl.load(gates + row * (2 * F) + k) * past, g_p * q
        past, g_q, g_p, along, p_hi, p_lo, q_hi, q_lo, w_hi, w_lo = together(past, g_q, g_p, along, p_hi, p_lo, q_hi, q_lo, w_hi, w_lo)
        previous_kernel()
        g_through = load_sum(through, 2 * F, PARTS)
        value = unscaled_product(g_q, q_hi, q_lo) + unscaled_product(past, w_hi, w_lo)  # while that is on its way
    value += unscaled_product(g_p + along * g_through, p_hi, p_lo)
    tl.store(g_moments + row * (4 * SKP) + c, value)
