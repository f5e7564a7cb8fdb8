// Radial basis times the cutoff function (python/mlff/filter.py has the equations).
#pragma once

#include <cmath>

#include "dense.h"
#include "kernel.h"

namespace mlff::MLFF_ISA {

// Polynomial envelope f(x) and df/dx on [0, 1], zero beyond.
inline double envelope(double x, double &slope) {
  if (x >= 1.0) return slope = 0.0;
  const double x5 = x * x * x * x * x;
  slope = x5 * (-168.0 + x * (336.0 - 168.0 * x));
  return 1.0 + x5 * x * (-28.0 + x * (48.0 - 21.0 * x));
}

// Cosine cutoff f(x) and df/dx on [0, 1], zero beyond.
inline double cosine_cutoff(double x, double &slope) {
  if (x >= 1.0) return slope = 0.0;
  const double half = 0.5 * M_PI * (1.0 - x), sine = std::sin(half);
  slope = -M_PI * sine * std::cos(half);
  return sine * sine;
}

// Bessel functions.
template <double (*CutoffFunction)(double, double &)> void radial_basis(const StageCall &call) {
  const double *distance = call.arg<const double>(0);
  const double cutoff = *call.arg<const double>(1);
  const int64_t k = call.dim('K');
  float *basis = call.arg<float>(2), *slope = call.arg<float>(3);
  for_blocks(call.n_edges, 256, call.threads, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const double d = distance[e], inverse = 1.0 / d, w = M_PI / cutoff;
      double df;
      const double f = CutoffFunction(d / cutoff, df);
      df /= cutoff;
      // sin(n w d) and cos(n w d) by the three-term recurrence in n, in double: its error grows with n only.
      double sine = std::sin(w * d), cosine = std::cos(w * d), sine_before = 0.0, cosine_before = 1.0;
      const double twice = 2.0 * cosine;
      float *b = basis + e * k, *db = slope + e * k;
      for (int64_t n = 1; n < k; ++n) {
        const double s = sine * inverse;
        b[n - 1] = static_cast<float>(s * f);
        db[n - 1] = static_cast<float>((n * w * cosine - s) * inverse * f + s * df);
        const double sine_next = twice * sine - sine_before, cosine_next = twice * cosine - cosine_before;
        sine_before = sine, cosine_before = cosine;
        sine = sine_next, cosine = cosine_next;
      }
      b[k - 1] = static_cast<float>(f);
      db[k - 1] = static_cast<float>(df);
    }
  });
}

// Gaussians: rows of centre and inverse width, of which that of the bias has the inverse width zero.
template <double (*CutoffFunction)(double, double &)> void radial_basis_gaussian(const StageCall &call) {
  const double *distance = call.arg<const double>(0), *gaussians = call.arg<const double>(2);
  const double cutoff = *call.arg<const double>(1);
  const int64_t k = call.dim('K');
  float *basis = call.arg<float>(3), *slope = call.arg<float>(4);
  for_blocks(call.n_edges, 256, call.threads, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      double df;
      const double f = CutoffFunction(distance[e] / cutoff, df);
      df /= cutoff;
      for (int64_t n = 0; n < k; ++n) {
        const double steepness = gaussians[2 * n + 1], x = (distance[e] - gaussians[2 * n]) * steepness, bell = std::exp(-0.5 * x * x);
        basis[e * k + n] = static_cast<float>(bell * f);
        slope[e * k + n] = static_cast<float>(bell * (df - x * steepness * f));
      }
    }
  });
}

}  // namespace mlff::MLFF_ISA
