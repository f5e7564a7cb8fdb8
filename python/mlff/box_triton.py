"""Boxes on the GPU (docs/cuda.md): cell vectors and the rows of the inverse, zero for directions that are not periodic."""

import triton
import triton.language as tl


@triton.jit
def box_row(array, b, k):
    """Three numbers from k on of the 18 of box b."""
    p = array + b.to(tl.int64) * 18 + k
    return tl.load(p), tl.load(p + 1), tl.load(p + 2)


@triton.jit
def _cross(a0, a1, a2, b0, b1, b2):
    return a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0


@triton.jit
def _filled(a0, a1, a2, b0, b1, b2, c0, c1, c2):
    """a, or if it is zero a unit vector orthogonal to b and c, any of which may be zero too."""
    t0, t1, t2 = _cross(b0, b1, b2, c0, c1, c2)
    s0, s1, s2 = b0 + c0, b1 + c1, b2 + c2
    none = t0 * t0 + t1 * t1 + t2 * t2 == 0  # b or c is zero: the other one times the axis furthest from it
    x = (tl.abs(s0) <= tl.abs(s1)) & (tl.abs(s0) <= tl.abs(s2))
    y = tl.abs(s1) <= tl.abs(s2)
    t0 = tl.where(none, tl.where(x, 0.0 * s0, tl.where(y, -s2, s1)), t0)
    t1 = tl.where(none, tl.where(x, s2, tl.where(y, 0.0 * s0, -s0)), t1)
    t2 = tl.where(none, tl.where(x, -s1, tl.where(y, s0, 0.0 * s0)), t2)
    square = t0 * t0 + t1 * t1 + t2 * t2
    t0 = tl.where(square == 0, 1.0, t0)
    scale = 1.0 / tl.sqrt(tl.where(square == 0, 1.0, square))
    zero = (a0 == 0) & (a1 == 0) & (a2 == 0)
    return tl.where(zero, t0 * scale, a0), tl.where(zero, t1 * scale, a1), tl.where(zero, t2 * scale, a2)


@triton.jit
def inverse_rows(a0, a1, a2, b0, b1, b2, c0, c1, c2):
    """Rows of the inverse of a cell whose vectors a, b, c may be zero: those stand for orthogonal unit vectors."""
    a0, a1, a2 = _filled(a0, a1, a2, b0, b1, b2, c0, c1, c2)
    b0, b1, b2 = _filled(b0, b1, b2, c0, c1, c2, a0, a1, a2)
    c0, c1, c2 = _filled(c0, c1, c2, a0, a1, a2, b0, b1, b2)
    u0, u1, u2 = _cross(b0, b1, b2, c0, c1, c2)
    v0, v1, v2 = _cross(c0, c1, c2, a0, a1, a2)
    w0, w1, w2 = _cross(a0, a1, a2, b0, b1, b2)
    s = 1.0 / (a0 * u0 + a1 * u1 + a2 * u2)
    return u0 * s, u1 * s, u2 * s, v0 * s, v1 * s, v2 * s, w0 * s, w1 * s, w2 * s
