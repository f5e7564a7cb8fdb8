// The plan of a model file for one backend (docs/file-format.md): buffers and stages, checked against the kernels' signatures
// (cpu/kernel.h), so that executing it needs no more checks. A plan is data from an untrusted file.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernel.h"
#include "payload.h"

namespace mlff {

enum class Rows { local, total, edges, local_plus_1 };

// Arrays that the backend provides, in this order.
enum class Input { species, offsets, neighbors, distance, unit, atom_energy, gradient, grade };
constexpr int kInputs = 8;

struct Buffer {
  std::string name;
  DType dtype;
  Rows rows;
  int64_t width;
  bool forward;  // needed when only the energy is wanted
};

// What one argument of a stage points to.
struct Argument {
  enum Kind { buffer, tensor, input } kind;
  int index;               // of the buffer or input
  const Tensor *constant;  // the tensor
};

struct Stage {
  const Kernel *kernel;  // nullptr: exchange the ghost rows of the only argument, a buffer
  bool backward;
  std::vector<Argument> args;
  std::array<int64_t, 26> letters;  // dimensions of the signature, see StageCall
};

struct Plan {
  std::vector<Buffer> buffers;
  std::vector<Stage> stages;            // forward stages come first
  std::vector<Stage> grade;             // of extrapolation grades, after the stages; empty for a file without
  bool exchanges(bool backward) const;  // whether the forward stages, or those of both passes, contain an exchange
  int32_t max_exchange_width = 0;
};

// Fields of the header's JSON, for parsers of plans; `where` begins the message of the Error(MLFF_ERROR_FILE) that they throw.
constexpr int64_t kMaxWidth = 1 << 16;  // of a buffer
const std::string &string_field(const nlohmann::json &entry, const char *key, const std::string &where);
const nlohmann::json &list_field(const nlohmann::json &entry, const char *key, const std::string &where);
std::vector<std::string> names_field(const nlohmann::json &entry, const char *key, const std::string &where);
int64_t number_field(const nlohmann::json &entry, const char *key, int64_t least, int64_t most, const std::string &where);

// The plan of payload.header["plans"][backend], its tensors resolved to those of the payload (which must outlive it).
// Throws Error(MLFF_ERROR_FILE), naming the stage; `name` is what messages call the file.
Plan parse_plan(const Payload &payload, const std::string &backend, const KernelTable &kernels, int n_species,
                const std::string &name);

}  // namespace mlff
