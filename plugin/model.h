// A loaded model file: the payload, what every backend needs from its header, and the plans of the backends. Immutable.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/plan.h"
#include "payload.h"
#include "plan.h"

namespace mlff {

// A structure of the file with the results that it must give.
struct Reference {
  std::string name;
  int64_t n;
  const int32_t *atomic_numbers, *pbc;
  const double *positions, *cell, *energy, *forces;
};

struct Model {
  // Throws Error(MLFF_ERROR_FILE) if the header, the references or the plan are not as docs/file-format.md says.
  Model(Payload payload, const KernelTable &kernels, const std::string &name);
  Model(const Model &) = delete;
  Model &operator=(const Model &) = delete;

  int32_t species_of(int32_t atomic_number) const;

  int32_t max_exchange_width() const;
  bool has_grade() const { return !plan.grade.empty(); }  // and then the plan of every backend has it

  const std::string name;  // what messages call the file
  Payload payload;
  double cutoff;
  std::vector<int32_t> atomic_numbers;  // by species index
  std::vector<Reference> references;
  Plan plan;                            // of the CPU backend
  std::optional<cuda::Plan> cuda_plan;  // a file may do without
};

// Evaluates the references; see mlff_model_self_check.
void self_check(std::shared_ptr<const Model> model, const std::string &device, double &max_energy_error_per_atom,
                double &max_force_error);

}  // namespace mlff
