"""Products of features with weights on the GPU, by tensor cores of halves and yet to float32 accuracy.

A number is kept as two halves, hi + lo, which together have 22 bits, and a product is hi hi + hi lo + lo hi with float32
sums: the float32 product but for 2^-22 of the largest terms (Markidis et al., NVIDIA Tensor Core Programmability, Performance
& Precision, 2018). That takes half the time of the same trick with TF32, and the weights are split when the file is written.
Halves have a narrow range, so

- a weight is stored times HALVES_SCALE, hi above lo ([2 K, N]),
- all gradients between readout and edges are times GRADIENT_SCALE, and
- a block of a row of features or gradients, of which nothing is known beforehand, is divided by a power of two near its
  largest number.

For few atoms the last takes too long. There a feature or gradient beyond 65504 becomes NaN, and so do all energies or forces that it
has part in: the backend sees that and evaluates again with the kernels for many atoms. The radial basis is bounded and needs no scale of its own.

Every kernel of an atom-wise layer is one product: a program has BM rows and BN columns, loads its weights before it waits for the
kernel before (launch_triton.py), and then its rows. Programs next to each other share the rows. Rows beyond the last atom exist,
and what is computed there is never read: no load waits for the number of atoms. EXIT: leave early where all rows are such, for a
capacity that exceeds the atoms by many blocks.

For few atoms every kernel costs more than its products, so that two products that follow each other are in one kernel (named merged). Forward a
program multiplies the columns that it has made with the rows of the next weight that belong to them, and the kernel that reads these terms
adds them up in a fixed order: nobody needs all columns. Backward a program has H hidden units and all that passes through them, and gives a
part of the result, which is added up likewise.

For many atoms, the gradient of a hidden layer has three blocks of columns of the second weight to sum over. Each is a product of other programs,
and the kernel that reads them adds them up: g_hidden [local, 3F].
"""

import triton
import triton.language as tl

from .launch_triton import at_once
from .plan import GRADIENT_SCALE, HALVES_SCALE

UNSCALE = tl.constexpr(1.0 / HALVES_SCALE)
GRADIENT = tl.constexpr(GRADIENT_SCALE)


@triton.jit
def silu(h):
    return h * tl.sigmoid(h)


@triton.jit
def silu_slope(h):
    g = tl.sigmoid(h)
    return g * (1.0 + h * (1.0 - g))


@triton.jit
def store_hidden(active, slope, at, h):
    """What is kept of a hidden layer h: silu(h) for the next product, the derivative for the backward pass."""
    tl.store(active + at, silu(h))
    tl.store(slope + at, silu_slope(h))


@triton.jit
def place(ACROSS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows [BM, 1] and columns [1, BN] of this program, of which ACROSS share the rows."""
    row = tl.program_id(0) // ACROSS * BM + tl.arange(0, BM)
    return row.to(tl.int64)[:, None], (tl.program_id(0) % ACROSS * BN + tl.arange(0, BN))[None, :]


@triton.jit
def halves(a):
    """hi, lo [BM, K] of the rows of a divided by powers of two, and what their products are to be multiplied by."""
    largest = tl.max(tl.abs(a), 1, keep_dims=True)
    exponent = tl.minimum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 253)
    a *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    hi = a.to(tl.float16)
    return hi, (a - hi.to(tl.float32)).to(tl.float16), (exponent << 23).to(tl.float32, bitcast=True) * UNSCALE


@triton.jit
def unscaled_halves(a):
    """hi, lo [BM, K] of numbers up to 65504, to 22 bits or 3e-8."""
    hi = a.to(tl.float16)
    return at_once(hi, (a - hi.to(tl.float32)).to(tl.float16))


@triton.jit
def weights(w, LO: tl.constexpr):
    """hi, lo of the weights [K, BN] at w, whose lo parts are LO further on."""
    return tl.load(w), tl.load(w + LO)


@triton.jit
def halves_product(hi, lo, scale, w_hi, w_lo):
    """Product of what :func:`halves` and :func:`weights` give."""
    if hi.shape[0] > 16:
        return tl.dot(hi, w_hi, tl.dot(hi, w_lo, tl.dot(lo, w_hi))) * scale
    # For few atoms three sums of their own: none waits for another, and the compiler does not chain what is scaled first.
    return tl.dot(hi, w_hi) * scale + (tl.dot(hi, w_lo) * scale + tl.dot(lo, w_hi) * scale)


@triton.jit
def product(a, w_hi, w_lo):
    """a @ weight for float32 a [BM, K]."""
    hi, lo, scale = halves(a)
    return halves_product(hi, lo, scale, w_hi, w_lo)


@triton.jit
def unscaled_product(a, w_hi, w_lo):
    """product for few atoms, of numbers that :func:`unscaled_halves` can take."""
    hi, lo = unscaled_halves(a)
    return halves_product(hi, lo, UNSCALE, w_hi, w_lo)


@triton.jit
def filter_product(hi, lo, w_hi, w_lo, BE: tl.constexpr, C: tl.constexpr):
    """Rows of the basis [BE, KB], as pairs of halves, times a filter weight whose columns are in the order of plan.filter_columns.

    The result is in the order of the channels, and HALVES_SCALE times too large.
    """
    f = tl.dot(hi, w_hi, tl.dot(hi, w_lo, tl.dot(lo, w_hi)))
    return tl.reshape(tl.permute(tl.reshape(f, (BE, C // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (BE, C))
