// The plan of a model file for the CUDA backend (docs/cuda.md): arrays, kernels with their machine code, and stages. It comes from
// an untrusted file: every name, type, number and index is checked here, so that executing it needs no more checks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../payload.h"

namespace mlff::cuda {

enum class Rows { local, total, edges, candidates, structures, structures_plus_1, bins, one };

// Arrays that the backend provides, in this order. The results lie next to each other, so that one copy brings those that are
// wanted.
enum Input {
  kStatus,
  kEnergies,
  kVirials,
  kForces,
  kAtomEnergy,
  kAtomVirial,
  kGrade,
  kPositions,
  kCounts,
  kElements,
  kStructure,
  kStarts,
  kBoxes,
  kImages,
  kRebuild,
  kFlags,
  kCallerAtoms,
  kUnits,
  kInputs
};

struct Array {
  std::string name;
  DType dtype;
  Rows rows;
  int64_t width;
};

enum Scalar { kEdgeCapacity, kCandidateCapacity, kScalars };

// Device pointers of the caller of mlff_system_compute_device: those that are not given, and all with arrays of the host, are null.
enum Caller { kCallerPositions, kCallerBox, kCallerEnergy, kCallerForces, kCallers };

struct Argument {
  enum Kind { array, tensor, scalar, caller } kind;
  int index;
};

constexpr size_t kMaxArguments = 200;  // of a kernel

enum class Pass { forward, backward, energy };

struct Stage {
  int kernel;  // index, or -1: exchange the ghost rows of the only argument, an array
  Pass pass;
  std::vector<Argument> args;
  Rows grid_rows;
  int64_t rows_per_block, programs_per_block;

  bool runs(bool backward) const { return pass == Pass::forward || (pass == Pass::backward) == backward; }
};
using Stages = std::vector<Stage>;

struct Kernel {
  std::string name, entry;
  int warps;
  int carveout = -1;                                             // percent of a multiprocessor's memory that is shared memory, or -1
  std::vector<std::string> args;                                 // "f32*", "i32"
  std::map<std::string, std::pair<const Tensor *, int>> images;  // by architecture: machine code, and bytes of shared memory
};

struct Schedule {
  int64_t max_rows;
  Stages stages;
};

struct Plan {
  std::vector<Array> arrays;  // the inputs, then the buffers of the plan
  std::vector<const Tensor *> tensors;
  std::vector<Kernel> kernels;
  Stages dense, list;
  bool dense_takes_callers = false;        // the dense search reads the caller's arrays on the device itself
  std::vector<Schedule> schedules;
  Stages imports;                          // of the caller's arrays on the device, before a search that does not read them itself
  Stages grade;                            // of extrapolation grades, after an evaluation; empty for a file without
  std::vector<std::string> architectures;  // of all kernels: "sm_90" ..., "ptx"
  std::vector<std::string> overlapping;    // those of them whose kernels wait by themselves for the kernel before
  int32_t max_exchange_width = 0;

  int find(const std::string &name) const;  // index of an array, or -1
  int schedule(int64_t n_total) const;
};

// payload.header["plans"]["cuda"], which must exist. Tensors are those of the payload, which must outlive the plan.
// Throws Error(MLFF_ERROR_FILE); `name` is what messages call the file.
Plan parse_plan(const Payload &payload, const std::string &name);

}  // namespace mlff::cuda
