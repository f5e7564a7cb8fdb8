// Extrapolation grades (python/mlff/extrapolation.py has the equation).
#pragma once

#include <algorithm>
#include <cmath>

#include "dense.h"
#include "kernel.h"

namespace mlff::MLFF_ISA {

inline void extrapolation(const StageCall &call) {
  const int64_t f = call.dim('F'), d = call.dim('D'), k = call.dim('K');
  const float *s = call.arg<const float>(0);
  const int32_t *species = call.arg<const int32_t>(1);
  double *grade = call.arg<double>(4);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    Row x(d);
    for (int64_t i = begin; i < end; ++i) {
      grade[i] = 0.0;
      if (species[i] < 0) continue;
      x.noalias() = row(s + i * f, f) * matrix(call.arg<const float>(2) + species[i] * f * d, f, d);
      const float *environments = call.arg<const float>(3) + species[i] * k * d;
      float least = (row(environments, d) - x).squaredNorm();
      for (int64_t n = 1; n < k; n++) least = std::min(least, (row(environments + n * d, d) - x).squaredNorm());
      grade[i] = std::sqrt(static_cast<double>(least));
    }
  });
}

}  // namespace mlff::MLFF_ISA
