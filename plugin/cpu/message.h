// Message layers (python/mlff/message.py has the equations; docs/kernels.md says why no scatter is needed).
//
// The filter of an edge is never stored: for kLanes channels at a time, the rows of the filter weight stay in registers or L1
// while the neighbours of one atom pass by, and each filter value is used where it is made.
#pragma once

#include <vector>

#include "dense.h"
#include "kernel.h"
#include "simd.h"

namespace mlff::MLFF_ISA {

inline void source_features(const StageCall &call) {
  const int64_t f = call.dim('F');
  float *x = call.arg<float>(6);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    Matrix hidden = matrix(call.arg<const float>(0) + begin * f, n, f) * matrix(call.arg<const float>(2), f, f);
    hidden.rowwise() += row(call.arg<const float>(3), f);
    silu(hidden);
    MatrixMap out = matrix(x + begin * 6 * f, n, 3 * f, 6 * f);
    out.noalias() = hidden * matrix(call.arg<const float>(4), f, 3 * f);
    out.rowwise() += row(call.arg<const float>(5), 3 * f);
    matrix(x + begin * 6 * f + 3 * f, n, 3 * f, 6 * f) = matrix(call.arg<const float>(1) + begin * 3 * f, n, 3 * f);
  });
}

inline void source_features_backward(const StageCall &call) {
  const int64_t f = call.dim('F');
  const float *g_x = call.arg<const float>(0);
  float *g = call.arg<float>(5);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    Matrix hidden = matrix(call.arg<const float>(1) + begin * f, n, f) * matrix(call.arg<const float>(2), f, f);
    hidden.rowwise() += row(call.arg<const float>(3), f);
    const Matrix g_source = matrix(g_x + begin * 6 * f, n, 6 * f).leftCols(3 * f);
    Matrix g_hidden = g_source * matrix(call.arg<const float>(4), f, 3 * f).transpose();
    times_silu_slope(g_hidden, hidden);
    MatrixMap g_block = matrix(g + begin * 4 * f, n, 4 * f);
    g_block.leftCols(f).noalias() += g_hidden * matrix(call.arg<const float>(2), f, f).transpose();
    g_block.rightCols(3 * f) += matrix(g_x + begin * 6 * f, n, 6 * f).rightCols(3 * f);
  });
}

// Filter values of kEdges edges at once, so that a weight that is loaded serves all of them, and a basis value all three blocks.
constexpr int kEdges = kLanes == 16 ? 4 : 2;

// The columns c .. c + kLanes of the three blocks of a filter weight [K, 3F], next to each other: [K, 3, kLanes]. (In place, rows
// 3F apart fall on a few sets of the L1 cache and evict each other.)
inline void pack_filter(const float *weight, int64_t k, int64_t f, int64_t c, std::vector<float> &packed) {
  packed.resize(k * 3 * kLanes);
  for (int64_t r = 0; r < k; ++r)
    for (int part = 0; part < 3; ++part) store(packed.data() + (3 * r + part) * kLanes, load(weight + (3 * r + part) * f + c));
}

// out[part][q] = sum_k rows[q k] packed[k, part]: q counts edges, and rows past the last edge repeat it.
inline void filter_values(const float *rows, int n, const float *packed, int64_t k, Vec out[3][kEdges]) {
  const float *edge[kEdges];
  for (int q = 0; q < kEdges; ++q) edge[q] = rows + std::min(q, n - 1) * k;
  Vec sums[3][kEdges] = {};
  for (int64_t r = 0; r < k; ++r) {
    const Vec w0 = load(packed + 3 * r * kLanes), w1 = load(packed + (3 * r + 1) * kLanes), w2 = load(packed + (3 * r + 2) * kLanes);
#pragma GCC unroll 4
    for (int q = 0; q < kEdges; ++q) {
      const float b = edge[q][r];
      sums[0][q] += b * w0;
      sums[1][q] += b * w1;
      sums[2][q] += b * w2;
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kEdges; ++q) out[0][q] = sums[0][q], out[1][q] = sums[1][q], out[2][q] = sums[2][q];
}

inline void message(const StageCall &call) {
  const int64_t f = call.dim('F'), k = call.dim('K');
  const float *x = call.arg<const float>(0), *s = call.arg<const float>(1), *filter = call.arg<const float>(2);
  const int64_t *offsets = call.arg<const int64_t>(3);
  const int32_t *neighbors = call.arg<const int32_t>(4);
  const float *unit = call.arg<const float>(5), *basis = call.arg<const float>(6);
  float *s_out = call.arg<float>(7), *v_out = call.arg<float>(8);
  for_blocks(call.n_local, kEdgeBlock, call.threads, [&](int64_t begin, int64_t end) {
    std::vector<float> packed;
    for (int64_t c = 0; c < f; c += kLanes) {
      pack_filter(filter, k, f, c, packed);
      for (int64_t i = begin; i < end; ++i) {
        const float *own = x + i * 6 * f + 3 * f + c;
        Vec sum_s = load(s + i * f + c);
        Vec sum_v[3] = {load(own), load(own + f), load(own + 2 * f)};
        for (int64_t e = offsets[i]; e < offsets[i + 1]; e += kEdges) {
          const int n = static_cast<int>(std::min<int64_t>(kEdges, offsets[i + 1] - e));
          Vec w[3][kEdges];
          filter_values(basis + e * k, n, packed.data(), k, w);
          for (int q = 0; q < n; ++q) {
            const float *x_j = x + neighbors[e + q] * 6 * f + c, *u = unit + 3 * (e + q);
            const Vec m_vs = w[1][q] * load(x_j + f), m_vv = w[2][q] * load(x_j + 2 * f);
            sum_s += w[0][q] * load(x_j);
            for (int a = 0; a < 3; ++a) sum_v[a] += u[a] * m_vs + m_vv * load(x_j + (3 + a) * f);
          }
        }
        store(s_out + i * f + c, sum_s);
        for (int a = 0; a < 3; ++a) store(v_out + (3 * i + a) * f + c, sum_v[a]);
      }
    }
  });
}

// Gradient with respect to r = d u from those with respect to d and u, added to `gradient` with a sign.
inline void add_edge_gradient(double g_d, const double *g_u, const float *u, double d, double sign, double *gradient) {
  const double radial = g_d - (g_u[0] * u[0] + g_u[1] * u[1] + g_u[2] * u[2]) / d;
  for (int a = 0; a < 3; ++a) gradient[a] += sign * (radial * u[a] + g_u[a] / d);
}

inline void message_backward(const StageCall &call) {
  const int64_t f = call.dim('F'), k = call.dim('K');
  const float *g = call.arg<const float>(0), *x = call.arg<const float>(1), *filter = call.arg<const float>(2);
  const int64_t *offsets = call.arg<const int64_t>(3);
  const int32_t *neighbors = call.arg<const int32_t>(4);
  const float *unit = call.arg<const float>(5);
  const double *distance = call.arg<const double>(6);
  const float *basis = call.arg<const float>(7), *slope = call.arg<const float>(8);
  float *g_x = call.arg<float>(9);
  double *gradient = call.arg<double>(10);
  for_blocks(call.n_local, kEdgeBlock, call.threads, [&](int64_t begin, int64_t end) {
    const int64_t first = offsets[begin], last = offsets[end];
    std::vector<float> packed, sums(4 * kLanes * (last - first));  // per edge dE/dd and dE/du, not yet summed over the lanes
    for (int64_t c = 0; c < f; c += kLanes) {
      pack_filter(filter, k, f, c, packed);
      for (int64_t j = begin; j < end; ++j) {
        const float *x_j = x + j * 6 * f + c;
        const Vec x_s = load(x_j), x_vs = load(x_j + f), x_vv = load(x_j + 2 * f);
        const Vec v[3] = {load(x_j + 3 * f), load(x_j + 4 * f), load(x_j + 5 * f)};
        Vec g_s{}, g_vs{}, g_vv{}, g_v[3] = {};
        for (int64_t e = offsets[j]; e < offsets[j + 1]; e += kEdges) {
          const int n = static_cast<int>(std::min<int64_t>(kEdges, offsets[j + 1] - e));
          Vec w[3][kEdges], dw[3][kEdges];
          filter_values(basis + e * k, n, packed.data(), k, w);
          filter_values(slope + e * k, n, packed.data(), k, dw);
          for (int q = 0; q < n; ++q) {
            // The edge from source j to destination i: the unit vector of this row's edge (j, i), reversed.
            const float *g_i = g + neighbors[e + q] * 4 * f + c, *u = unit + 3 * (e + q);
            const Vec g_i_s = load(g_i), g_i_v[3] = {load(g_i + f), load(g_i + 2 * f), load(g_i + 3 * f)};
            const Vec m_vs = -(u[0] * g_i_v[0] + u[1] * g_i_v[1] + u[2] * g_i_v[2]);
            const Vec m_vv = v[0] * g_i_v[0] + v[1] * g_i_v[1] + v[2] * g_i_v[2];
            g_s += g_i_s * w[0][q];
            g_vs += m_vs * w[1][q];
            g_vv += m_vv * w[2][q];
            const Vec back = x_vv * w[2][q], along = x_vs * w[1][q];
            float *edge = sums.data() + 4 * kLanes * (e + q - first);
            store(edge, load(edge) + g_i_s * x_s * dw[0][q] + m_vs * x_vs * dw[1][q] + m_vv * x_vv * dw[2][q]);
            for (int a = 0; a < 3; ++a) {
              g_v[a] += back * g_i_v[a];
              store(edge + (a + 1) * kLanes, load(edge + (a + 1) * kLanes) + along * g_i_v[a]);
            }
          }
        }
        float *out = g_x + j * 6 * f + c;
        store(out, g_s), store(out + f, g_vs), store(out + 2 * f, g_vv);
        for (int a = 0; a < 3; ++a) store(out + (3 + a) * f, g_v[a]);
      }
    }
    for (int64_t e = first; e < last; ++e) {
      const float *edge = sums.data() + 4 * kLanes * (e - first), *u = unit + 3 * e;
      const float reversed[3] = {-u[0], -u[1], -u[2]};
      const double g_u[3] = {sum(load(edge + kLanes)), sum(load(edge + 2 * kLanes)), sum(load(edge + 3 * kLanes))};
      add_edge_gradient(sum(load(edge)), g_u, reversed, distance[e], -1.0, gradient + 3 * e);
    }
  });
}

// Moments of the first layer: rows of the basis summed per element, times 1 and the three components of u.
// scalar: [SK], vectors: [3, SK], both zero at the start.
inline void add_moments(const float *basis, const float *u, int64_t k, int64_t n_columns, float *scalar, float *vectors) {
  for (int64_t n = 0; n < k; ++n) {
    const float b = basis[n];
    scalar[n] += b;
    vectors[n] += u[0] * b;
    vectors[n_columns + n] += u[1] * b;
    vectors[2 * n_columns + n] += u[2] * b;
  }
}

inline void message_first(const StageCall &call) {
  const int64_t f = call.dim('F'), k = call.dim('K'), columns = call.dim('S') * k;
  const float *embedding = call.arg<const float>(0);
  const int32_t *species = call.arg<const int32_t>(3), *neighbors = call.arg<const int32_t>(5);
  const int64_t *offsets = call.arg<const int64_t>(4);
  const float *unit = call.arg<const float>(6), *basis = call.arg<const float>(7);
  float *s = call.arg<float>(8), *v = call.arg<float>(9);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    Matrix scalar = Matrix::Zero(n, columns), vectors = Matrix::Zero(3 * n, columns);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
        const int64_t column = species[neighbors[e]] * k;
        add_moments(basis + e * k, unit + 3 * e, k, columns, scalar.data() + (i - begin) * columns + column,
                    vectors.data() + 3 * (i - begin) * columns + column);
      }
    MatrixMap s_block = matrix(s + begin * f, n, f);
    s_block.noalias() = scalar * matrix(call.arg<const float>(1), columns, f);
    for (int64_t i = begin; i < end; ++i)
      if (species[i] >= 0) s_block.row(i - begin) += row(embedding + species[i] * f, f);
    matrix(v + 3 * begin * f, 3 * n, f).noalias() = vectors * matrix(call.arg<const float>(2), columns, f);
  });
}

inline void message_first_backward(const StageCall &call) {
  const int64_t f = call.dim('F'), k = call.dim('K'), columns = call.dim('S') * k;
  const float *g = call.arg<const float>(0);
  const int32_t *species = call.arg<const int32_t>(3), *neighbors = call.arg<const int32_t>(5);
  const int64_t *offsets = call.arg<const int64_t>(4);
  const float *unit = call.arg<const float>(6);
  const double *distance = call.arg<const double>(7);
  const float *basis = call.arg<const float>(8), *slope = call.arg<const float>(9);
  double *gradient = call.arg<double>(10);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    Matrix g_s(n, f), g_v(3 * n, f);
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(g + (begin + i) * 4 * f, f, g_s.data() + i * f);
      std::copy_n(g + (begin + i) * 4 * f + f, 3 * f, g_v.data() + 3 * i * f);
    }
    const Matrix scalar = g_s * matrix(call.arg<const float>(1), columns, f).transpose();
    const Matrix vectors = g_v * matrix(call.arg<const float>(2), columns, f).transpose();
    for (int64_t i = begin; i < end; ++i)
      for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
        const int64_t column = species[neighbors[e]] * k;
        const float *m = scalar.data() + (i - begin) * columns + column, *mv = vectors.data() + 3 * (i - begin) * columns + column;
        const float *b = basis + e * k, *db = slope + e * k, *u = unit + 3 * e;
        float g_d = 0, g_u[3] = {};
        for (int64_t r = 0; r < k; ++r) {
          const float m0 = mv[r], m1 = mv[columns + r], m2 = mv[2 * columns + r];
          g_d += db[r] * (m[r] + u[0] * m0 + u[1] * m1 + u[2] * m2);
          g_u[0] += b[r] * m0, g_u[1] += b[r] * m1, g_u[2] += b[r] * m2;
        }
        const double g_unit[3] = {g_u[0], g_u[1], g_u[2]};
        add_edge_gradient(g_d, g_unit, u, distance[e], 1.0, gradient + 3 * e);
      }
  });
}

}  // namespace mlff::MLFF_ISA
