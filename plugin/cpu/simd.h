// Vectors of the instruction set that this translation unit is compiled for, through GCC's and Clang's vector extension.
#pragma once

#include <cstdint>

namespace mlff::MLFF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Features are a multiple of 16, so rows divide into vectors, but they need not be aligned.
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float *p) { return *reinterpret_cast<const UnalignedVec *>(p); }
inline void store(float *p, Vec v) { *reinterpret_cast<UnalignedVec *>(p) = v; }

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

}  // namespace mlff::MLFF_ISA
