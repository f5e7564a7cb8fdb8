// Dense parts: row-major matrices over the plan's buffers (products by Eigen), activations, and loops over blocks of atoms.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstdint>
#include <exception>

namespace mlff::MLFF_ISA {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Row = Eigen::Matrix<float, 1, Eigen::Dynamic>;
using Stride = Eigen::OuterStride<>;
using MatrixMap = Eigen::Map<Matrix, 0, Stride>;
using ConstMatrixMap = Eigen::Map<const Matrix, 0, Stride>;
using ConstRowMap = Eigen::Map<const Row>;

// Rows of a row-major table; `width` columns out of a row of `stride` numbers.
inline MatrixMap matrix(float *p, int64_t rows, int64_t width, int64_t stride) { return {p, rows, width, Stride(stride)}; }
inline MatrixMap matrix(float *p, int64_t rows, int64_t width) { return matrix(p, rows, width, width); }
inline ConstMatrixMap matrix(const float *p, int64_t rows, int64_t width) { return {p, rows, width, Stride(width)}; }
inline ConstRowMap row(const float *p, int64_t width) { return {p, width}; }

// silu(h) = h sigmoid(h) in place.
template <class M>
void silu(M &h) {
  h.array() *= h.array().logistic();
}

// Multiplies g by the derivative of silu at h.
template <class G, class M>
void times_silu_slope(G &g, const M &h) {
  const Eigen::Array<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> sigmoid = h.array().logistic();
  g.array() *= sigmoid * (1.0f + h.array() * (1.0f - sigmoid));
}

// Calls body(begin, end) for blocks of at most `largest` atoms, in parallel. Each atom's result is written by one block, so
// the outcome does not depend on which thread runs it. An exception (out of memory) leaves the parallel region intact.
template <class Body>
void for_blocks(int64_t n, int64_t largest, int threads, Body &&body) {
  if (n <= 0) return;
  const int64_t block = std::max<int64_t>(1, std::min(largest, (n + threads - 1) / threads));
  const int64_t n_blocks = (n + block - 1) / block;
  std::exception_ptr error;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && n_blocks > 1)
  for (int64_t b = 0; b < n_blocks; ++b) {
    try {
      body(b * block, std::min(n, (b + 1) * block));
    } catch (...) {
#pragma omp critical(mlff_for_blocks)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

constexpr int64_t kDenseBlock = 128;  // atoms of a block: enough rows to hide Eigen's packing of the weights, little enough for L2
constexpr int64_t kEdgeBlock = 8;     // atoms of a block in kernels that walk edges

}  // namespace mlff::MLFF_ISA
