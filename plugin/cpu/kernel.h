// Interface between the plan and the kernels of the CPU backend.
//
// A kernel is a function and a signature. The signature is checked once, when a plan is loaded, against the shapes of the
// arguments that the plan names, so that a kernel can trust every pointer and width it is given:
//
//   "x:f32[total,6F] filter:f32[K,3F] offsets:i64[local+1,1] > s_out:f32[local,F]"
//
// One word per argument, in the order of the plan's `args`: name:dtype[rows,width] for buffers and inputs and for
// two-dimensional tensors, name:dtype[width] for one-dimensional tensors. A dimension is a number, a letter with an optional
// factor (F, 3F: bound by its first use and equal everywhere in the stage), a product of two letters (SK), or one of the row counts
// local, total, edges, local+1. Three letters have a meaning: S is the number of elements and P its square (so that a table
// indexed with the species has a row for each), and F, the number of features, is a multiple of 16.
// Arguments after ">" are written: they must be buffers or results, never tensors or read-only inputs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlff {

// One evaluation of one stage.
struct StageCall {
  void *const *args;       // in the signature's order
  const int64_t *letters;  // value of each letter 'A' .. 'Z' of the signature, 0 where unused
  int64_t n_local, n_total, n_edges;
  int threads;  // at least 1

  template <class T> T *arg(int i) const { return static_cast<T *>(args[i]); }
  int64_t dim(char letter) const { return letters[letter - 'A']; }
};

struct Kernel {
  const char *name;
  const char *signature;
  void (*run)(const StageCall &);
};

struct KernelTable {
  const Kernel *kernels;
  int size;
};

// The kernels, compiled for the best instruction set that this processor has.
KernelTable cpu_kernels();

}  // namespace mlff
