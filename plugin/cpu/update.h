// Update layer (python/mlff/update.py has the equations).
#pragma once

#include "dense.h"
#include "kernel.h"

namespace mlff::MLFF_ISA {

// Forward; keeps p = v V and q = v U side by side, the norm of p, the hidden layer before its activation, and a = (a_ss, a_vv,
// a_sv) for the backward pass.
inline void update(const StageCall &call) {
  const int64_t f = call.dim('F');
  const float *s = call.arg<const float>(0), *v = call.arg<const float>(1);
  const float epsilon = *call.arg<const float>(7);
  float *s_out = call.arg<float>(8), *v_out = call.arg<float>(9);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    MatrixMap pq = matrix(call.arg<float>(10) + begin * 6 * f, 3 * n, 2 * f), norm = matrix(call.arg<float>(11) + begin * f, n, f);
    MatrixMap hidden = matrix(call.arg<float>(12) + begin * f, n, f), a = matrix(call.arg<float>(13) + begin * 3 * f, n, 3 * f);
    pq.noalias() = matrix(v + begin * 3 * f, 3 * n, f) * matrix(call.arg<const float>(2), f, 2 * f);
    for (int64_t i = 0; i < n; ++i) norm.row(i) = (pq.block(3 * i, 0, 3, f).colwise().squaredNorm().array() + epsilon).sqrt();
    hidden.noalias() = matrix(s + begin * f, n, f) * matrix(call.arg<const float>(3), f, f);
    hidden.noalias() += norm * matrix(call.arg<const float>(3) + f * f, f, f);
    hidden.rowwise() += row(call.arg<const float>(4), f);
    Matrix activated = hidden;
    silu(activated);
    a.noalias() = activated * matrix(call.arg<const float>(5), f, 3 * f);
    a.rowwise() += row(call.arg<const float>(6), 3 * f);
    for (int64_t i = begin; i < end; ++i) {
      const float *ai = a.data() + (i - begin) * 3 * f, *pqi = pq.data() + (i - begin) * 6 * f;
      for (int64_t c = 0; c < f; ++c) {
        const float dot = pqi[c] * pqi[f + c] + pqi[2 * f + c] * pqi[3 * f + c] + pqi[4 * f + c] * pqi[5 * f + c];
        s_out[i * f + c] = s[i * f + c] + ai[c] + ai[2 * f + c] * dot;
        for (int x = 0; x < 3; ++x) v_out[(3 * i + x) * f + c] = v[(3 * i + x) * f + c] + ai[f + c] * pqi[(2 * x + 1) * f + c];
      }
    }
  });
}

// Changes g = [dE/ds, dE/dv] from the outputs to the inputs of the layer, in place.
inline void update_backward(const StageCall &call) {
  const int64_t f = call.dim('F');
  const float *vu = call.arg<const float>(0), *w1 = call.arg<const float>(1), *w2 = call.arg<const float>(2);
  float *g_all = call.arg<float>(7);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    const float *pq_all = call.arg<const float>(3) + begin * 6 * f, *norm_all = call.arg<const float>(4) + begin * f;
    const float *a_all = call.arg<const float>(6) + begin * 3 * f;
    Matrix g_a(n, 3 * f), g_hidden(n, f), g_context(n, 2 * f), g_pq(3 * n, 2 * f);
    for (int64_t i = 0; i < n; ++i) {
      const float *g_s = g_all + (begin + i) * 4 * f, *g_v = g_s + f, *pq = pq_all + i * 6 * f;
      float *out = g_a.data() + i * 3 * f;
      for (int64_t c = 0; c < f; ++c) {
        const float p0 = pq[c], q0 = pq[f + c], p1 = pq[2 * f + c], q1 = pq[3 * f + c], p2 = pq[4 * f + c], q2 = pq[5 * f + c];
        out[c] = g_s[c];
        out[f + c] = g_v[c] * q0 + g_v[f + c] * q1 + g_v[2 * f + c] * q2;
        out[2 * f + c] = g_s[c] * (p0 * q0 + p1 * q1 + p2 * q2);
      }
    }
    g_hidden.noalias() = g_a * matrix(w2, f, 3 * f).transpose();
    times_silu_slope(g_hidden, matrix(call.arg<const float>(5) + begin * f, n, f));
    g_context.noalias() = g_hidden * matrix(w1, 2 * f, f).transpose();
    for (int64_t i = 0; i < n; ++i) {
      float *g_s = g_all + (begin + i) * 4 * f, *g_v = g_s + f;
      const float *pq = pq_all + i * 6 * f, *a = a_all + i * 3 * f, *norm = norm_all + i * f, *g_c = g_context.data() + i * 2 * f;
      float *out = g_pq.data() + i * 6 * f;
      for (int64_t c = 0; c < f; ++c) {
        const float g_dot = g_s[c] * a[2 * f + c], g_norm = g_c[f + c] / norm[c], a_vv = a[f + c];
        for (int x = 0; x < 3; ++x) {
          const float p = pq[2 * x * f + c], q = pq[(2 * x + 1) * f + c];
          out[2 * x * f + c] = g_dot * q + g_norm * p;
          out[(2 * x + 1) * f + c] = g_dot * p + g_v[x * f + c] * a_vv;
        }
        g_s[c] += g_c[c];
      }
    }
    const Matrix g_v = g_pq * matrix(vu, f, 2 * f).transpose();
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < 3 * f; ++c) g_all[(begin + i) * 4 * f + f + c] += g_v.data()[i * 3 * f + c];
  });
}

}  // namespace mlff::MLFF_ISA
