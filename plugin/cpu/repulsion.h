// Short range: the network is switched off, nuclei repel each other by ZBL (python/mlff/repulsion.py has the equations).
#pragma once

#include <cmath>

#include "dense.h"
#include "kernel.h"

namespace mlff::MLFF_ISA {

// What is left of the network at a distance below the radius, and its derivative.
inline double network_share(double d, double radius, double &slope) {
  const double width = 0.2 * radius, t = std::min(1.0, (radius - d) / width), rest = 1.0 - t;
  slope = 140.0 * t * t * t * rest * rest * rest / width;
  return 1.0 - t * t * t * t * (35.0 - t * (84.0 - t * (70.0 - 20.0 * t)));
}

// Half pair energy and its derivative; constants: half prefactor, inverse screening length, radius.
inline double zbl(double d, const double *constants, double &slope) {
  constexpr double coefficient[4] = {0.18175, 0.50986, 0.28022, 0.02817}, exponent[4] = {3.19980, 0.94229, 0.40290, 0.20162};
  const double prefactor = constants[0], inverse_length = constants[1];
  double dw;
  const double rest = 1.0 - network_share(d, constants[2], dw);
  double phi = 0.0, dphi = 0.0;
  for (int k = 0; k < 4; ++k) {
    const double term = coefficient[k] * std::exp(-exponent[k] * inverse_length * d);
    phi += term;
    dphi -= exponent[k] * inverse_length * term;
  }
  slope = prefactor / d * ((dphi - phi / d) * rest - phi * dw);
  return prefactor * phi / d * rest;
}

// Calls body(i, e, distance, constants) for the edges of atoms [begin, end) that are shorter than their radius.
template <class Body>
void for_close_pairs(const StageCall &call, int64_t begin, int64_t end, const double *pair_table, Body &&body) {
  const int32_t *species = call.arg<const int32_t>(0), *neighbors = call.arg<const int32_t>(2);
  const int64_t *offsets = call.arg<const int64_t>(1);
  const double *distance = call.arg<const double>(3);
  const int64_t n_species = std::llround(std::sqrt(static_cast<double>(call.dim('P'))));
  for (int64_t i = begin; i < end; ++i)
    for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
      const double *constants = pair_table + 3 * (species[i] * n_species + species[neighbors[e]]);
      if (distance[e] < constants[2]) body(i, e, distance[e], constants);
    }
}

inline void switch_basis(const StageCall &call) {
  const int64_t k = call.dim('K');
  float *basis = call.arg<float>(5), *slope = call.arg<float>(6);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    for_close_pairs(call, begin, end, call.arg<const double>(4), [&](int64_t, int64_t e, double d, const double *constants) {
      double dw;
      const double w = network_share(d, constants[2], dw);
      for (int64_t n = e * k; n < (e + 1) * k; ++n) {
        slope[n] = static_cast<float>(w * slope[n] + dw * basis[n]);
        basis[n] = static_cast<float>(w * basis[n]);
      }
    });
  });
}

inline void repulsion(const StageCall &call) {
  double *atom_energy = call.arg<double>(5);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    for_close_pairs(call, begin, end, call.arg<const double>(4), [&](int64_t i, int64_t, double d, const double *constants) {
      double slope;
      atom_energy[i] += zbl(d, constants, slope);
    });
  });
}

inline void repulsion_backward(const StageCall &call) {
  const float *unit = call.arg<const float>(4);
  double *gradient = call.arg<double>(6);
  for_blocks(call.n_local, kDenseBlock, call.threads, [&](int64_t begin, int64_t end) {
    for_close_pairs(call, begin, end, call.arg<const double>(5), [&](int64_t, int64_t e, double d, const double *constants) {
      double slope;
      zbl(d, constants, slope);
      for (int x = 0; x < 3; ++x) gradient[3 * e + x] += slope * unit[3 * e + x];
    });
  });
}

}  // namespace mlff::MLFF_ISA
