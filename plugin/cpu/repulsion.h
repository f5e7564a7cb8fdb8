// ZBL repulsion of nuclei (python/mlff/repulsion.py has the equations).
#pragma once

#include <cmath>

#include "filter.h"

namespace mlff::MLFF_ISA {

// Half pair energy and its derivative; constants: half prefactor, inverse screening length, radius of the fade-out.
inline double zbl(double d, const double *constants, double &slope) {
  constexpr double coefficient[4] = {0.18175, 0.50986, 0.28022, 0.02817}, exponent[4] = {3.19980, 0.94229, 0.40290, 0.20162};
  const double prefactor = constants[0], inverse_length = constants[1], radius = constants[2];
  double df;
  const double f = envelope(d / radius, df);
  double phi = 0.0, dphi = 0.0;
  for (int k = 0; k < 4; ++k) {
    const double term = coefficient[k] * std::exp(-exponent[k] * inverse_length * d);
    phi += term;
    dphi -= exponent[k] * inverse_length * term;
  }
  slope = prefactor / d * ((dphi - phi / d) * f + phi * df / radius);
  return prefactor * phi / d * f;
}

// Calls body(i, e, energy, slope) for the edges of [begin, end) that are close enough to repel.
template <class Body>
void for_close_pairs(const StageCall &call, int64_t begin, int64_t end, const double *pair_table, Body &&body) {
  const int32_t *species = call.arg<const int32_t>(0), *neighbors = call.arg<const int32_t>(2);
  const int64_t *offsets = call.arg<const int64_t>(1);
  const double *distance = call.arg<const double>(3);
  const int64_t n_species = std::llround(std::sqrt(static_cast<double>(call.dim('P'))));
  for (int64_t i = begin; i < end; ++i)
    for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
      const double *constants = pair_table + 3 * (species[i] * n_species + species[neighbors[e]]);
      if (distance[e] >= constants[2]) continue;
      double slope;
      const double energy = zbl(distance[e], constants, slope);
      body(i, e, energy, slope);
    }
}

inline void repulsion(const StageCall &call) {
  double *atom_energy = call.arg<double>(5);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    for_close_pairs(call, begin, end, call.arg<const double>(4), [&](int64_t i, int64_t, double energy, double) { atom_energy[i] += energy; });
  });
}

inline void repulsion_backward(const StageCall &call) {
  const float *unit = call.arg<const float>(4);
  double *gradient = call.arg<double>(6);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    for_close_pairs(call, begin, end, call.arg<const double>(5), [&](int64_t, int64_t e, double, double slope) {
      for (int x = 0; x < 3; ++x) gradient[3 * e + x] += slope * unit[3 * e + x];
    });
  });
}

}  // namespace mlff::MLFF_ISA
