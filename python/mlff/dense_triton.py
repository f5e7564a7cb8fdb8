"""Products of features with weights on the GPU, by tensor cores of halves and yet to float32 accuracy.

A number is kept as two halves, hi + lo, which together have 22 bits, and a product is hi hi + hi lo + lo hi with float32
sums: the float32 product but for 2^-22 of the largest terms (Markidis et al., NVIDIA Tensor Core Programmability, Performance
& Precision, 2018). That takes half the time of the same trick with TF32, and the weights are split when the file is written.
Halves have a narrow range, so

- a weight is stored times HALVES_SCALE, hi above lo ([2 K, N]), and
- a block of a row of features or gradients, of which nothing is known beforehand, is divided by a power of two near its
  largest number.

The radial basis is bounded and needs no scale of its own.
"""

import triton
import triton.language as tl

from .plan import HALVES_SCALE

_UNSCALE = tl.constexpr(1.0 / HALVES_SCALE)


@triton.jit
def silu(h):
    return h * tl.sigmoid(h)


@triton.jit
def silu_slope(h):
    g = tl.sigmoid(h)
    return g * (1.0 + h * (1.0 - g))


@triton.jit
def halves(a):
    """hi, lo [BM, BK] of the rows of a divided by a power of two, and that power over HALVES_SCALE [BM, 1]."""
    largest = tl.max(tl.abs(a), 1, keep_dims=True)
    exponent = tl.minimum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 253)
    a *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    hi = a.to(tl.float16)
    return hi, (a - hi.to(tl.float32)).to(tl.float16), (exponent << 23).to(tl.float32, bitcast=True) * _UNSCALE


@triton.jit
def halves_product(hi, lo, w, LO: tl.constexpr):
    """Product of pairs of halves with the weights [BK, BN] at w, whose lo parts are LO further on."""
    w_hi = tl.load(w)
    return tl.dot(hi, w_hi, tl.dot(hi, tl.load(w + LO), tl.dot(lo, w_hi)))


@triton.jit
def product(a, w, LO: tl.constexpr):
    """a @ weight for float32 a [BM, BK]."""
    hi, lo, scale = halves(a)
    return halves_product(hi, lo, w, LO) * scale


@triton.jit
def filter_product(hi, lo, w_hi, w_lo):
    """Rows of the basis, as pairs of halves, times a filter weight that has been loaded."""
    return tl.dot(hi, w_hi, tl.dot(hi, w_lo, tl.dot(lo, w_hi))) * _UNSCALE
