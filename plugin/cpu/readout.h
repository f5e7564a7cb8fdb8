// Atomic energies and their gradient (python/mlff/readout.py has the equations).
#pragma once

#include "dense.h"
#include "kernel.h"

namespace mlff::MLFF_ISA {

inline Matrix readout_hidden(const StageCall &call, int64_t begin, int64_t end) {
  const int64_t f = call.dim('F'), m = call.dim('M');
  Matrix hidden = matrix(call.arg<const float>(0) + begin * f, end - begin, f) * matrix(call.arg<const float>(2), f, m);
  hidden.rowwise() += row(call.arg<const float>(3), m);
  return hidden;
}

inline void readout(const StageCall &call) {
  const int32_t *species = call.arg<const int32_t>(1);
  const float bias = *call.arg<const float>(5);
  const double *shift = call.arg<const double>(6);
  double *atom_energy = call.arg<double>(7);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    Matrix hidden = readout_hidden(call, begin, end);
    silu(hidden);
    const Eigen::VectorXf energy = hidden * row(call.arg<const float>(4), call.dim('M')).transpose();
    for (int64_t i = begin; i < end; ++i)
      if (species[i] >= 0) atom_energy[i] += static_cast<double>(energy[i - begin] + bias) + shift[species[i]];
  });
}

// Starts g = [dE/ds, dE/dv] of the last layer: dE/dv = 0, and nothing for atoms that the model ignores.
inline void readout_backward(const StageCall &call) {
  const int32_t *species = call.arg<const int32_t>(1);
  const int64_t f = call.dim('F'), m = call.dim('M');
  float *g = call.arg<float>(5);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    const Matrix hidden = readout_hidden(call, begin, end);
    Matrix g_hidden = row(call.arg<const float>(4), m).replicate(end - begin, 1);
    times_silu_slope(g_hidden, hidden);
    const Matrix g_s = g_hidden * matrix(call.arg<const float>(2), f, m).transpose();
    for (int64_t i = begin; i < end; ++i) {
      std::fill_n(g + i * 4 * f, 4 * f, 0.0f);
      if (species[i] >= 0) std::copy_n(g_s.data() + (i - begin) * f, f, g + i * 4 * f);
    }
  });
}

}  // namespace mlff::MLFF_ISA
