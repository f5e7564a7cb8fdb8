// The operator mlff::energy_forces, for TorchScript and OpenMM's TorchForce.
//
// It speaks the LibTorch stable ABI only (C functions that keep their meaning from one torch to the next), so that one binary
// serves torch 2.10 and every later one, with or without CUDA. Compile with -DTORCH_TARGET_VERSION=0x020a000000000000.
//
// This is the one place where OpenMM's units (nm, kJ/mol) meet the core's (Angstrom, eV).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "mlff.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double ANGSTROM_PER_NM = 10.0;
constexpr double KJ_PER_MOL_PER_EV = 96.48533212331002;  // e N_A / 1000, exact in the 2019 SI; as in python/mlff/units.py

constexpr int64_t HASH_OFFSET = 40, HASH_END = 72;  // docs/file-format.md

constexpr size_t MAX_MODELS = 8;  // cached at a time; a model in use elsewhere stays alive until its last call returns

[[noreturn]] void fail(const std::string &message) { throw std::runtime_error("mlff: " + message); }

void check(int status) {
  if (status != MLFF_OK) fail(mlff_last_error());
}

std::string shape_of(const Tensor &t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// One simulation: its neighbour list and workspace, and the elements it was set up for.
struct System {
  mlff_system *handle = nullptr;
  std::vector<int32_t> species;

  explicit System(const mlff_model *model) { check(mlff_system_create(model, "cpu", &handle)); }
  ~System() { mlff_system_free(handle); }
  System(const System &) = delete;
  System &operator=(const System &) = delete;
};

// A loaded model and the systems that no call is using. Concurrent calls get a system each; a simulation that runs alone gets
// the one that it used last, whose neighbour list is still good.
class Model {
 public:
  Model(const void *payload, size_t size) { check(mlff_model_load_memory(payload, size, &handle_)); }
  ~Model() {
    idle_.clear();
    mlff_model_free(handle_);
  }
  Model(const Model &) = delete;
  Model &operator=(const Model &) = delete;

  std::unique_ptr<System> acquire(const std::vector<int32_t> &species) {
    std::unique_ptr<System> system;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (size_t k = idle_.size(); k-- > 0 && !system;)
        if (idle_[k]->species == species) {
          system = std::move(idle_[k]);
          idle_.erase(idle_.begin() + static_cast<int64_t>(k));
        }
    }
    if (system) return system;
    system = std::make_unique<System>(handle_);
    const auto n = static_cast<int64_t>(species.size());
    check(mlff_system_set_atoms(system->handle, n, n, species.data()));
    system->species = species;
    return system;
  }

  void release(std::unique_ptr<System> system) {
    constexpr size_t max_idle = 16;
    std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.size() == max_idle) idle_.erase(idle_.begin());
    idle_.push_back(std::move(system));
  }

  std::vector<int32_t> species_of(const std::vector<int64_t> &atomic_numbers, const std::vector<int64_t> &atoms) const {
    std::vector<int32_t> species(atoms.size());
    int64_t last_number = -1;  // neighbours in the list are often of one element
    int32_t last_species = -1;
    for (size_t k = 0; k < atoms.size(); ++k) {
      const int64_t number = atomic_numbers[static_cast<size_t>(atoms[k])];
      if (number != last_number) {
        last_species = number > 0 && number < 1000 ? mlff_model_species_of(handle_, static_cast<int32_t>(number)) : -1;
        last_number = number;
      }
      if (last_species < 0) {
        std::string known;
        for (int32_t s = 0; s < mlff_model_n_species(handle_); ++s)
          known.append(" ").append(std::to_string(mlff_model_atomic_numbers(handle_)[s]));
        fail("atom " + std::to_string(atoms[k]) + " has atomic number " + std::to_string(number) +
             ", which the model does not know; it knows" + known);
      }
      species[k] = last_species;
    }
    return species;
  }

 private:
  mlff_model *handle_ = nullptr;
  std::mutex mutex_;
  std::vector<std::unique_ptr<System>> idle_;  // the last released at the end
};

// Models by the hash of their content, the last used at the end. The core verifies the hash when it loads.
std::shared_ptr<Model> model_of(const Tensor &payload) {
  if (!payload.is_cpu() || payload.scalar_type() != ScalarType::Byte || payload.dim() != 1 || !payload.is_contiguous())
    fail("the payload must be a contiguous one-dimensional uint8 tensor on the CPU, got shape " + shape_of(payload));
  const auto *bytes = static_cast<const uint8_t *>(payload.const_data_ptr());
  const auto size = static_cast<size_t>(payload.numel());
  using Hash = std::array<uint8_t, HASH_END - HASH_OFFSET>;
  struct Cache {
    std::mutex mutex;
    std::vector<std::pair<Hash, std::shared_ptr<Model>>> models;
  };
  static Cache &cache = *new Cache;  // never destroyed: threads may still compute while the process exits

  std::lock_guard<std::mutex> lock(cache.mutex);
  Hash hash{};
  if (size >= HASH_END) std::memcpy(hash.data(), bytes + HASH_OFFSET, hash.size());
  for (size_t k = cache.models.size(); k-- > 0;)
    if (cache.models[k].first == hash) {
      std::rotate(cache.models.begin() + static_cast<int64_t>(k), cache.models.begin() + static_cast<int64_t>(k) + 1,
                  cache.models.end());
      return cache.models.back().second;
    }
  auto model = std::make_shared<Model>(bytes, size);
  if (cache.models.size() == MAX_MODELS) cache.models.erase(cache.models.begin());
  cache.models.emplace_back(hash, model);
  return model;
}

template <class T>
std::vector<double> scaled(const Tensor &t, double factor) {
  const T *x = t.const_data_ptr<T>();
  std::vector<double> out(static_cast<size_t>(t.numel()));
  for (size_t k = 0; k < out.size(); ++k) out[k] = factor * static_cast<double>(x[k]);
  return out;
}

// Lengths of the tensor [rows, 3] in nm, as Angstrom.
std::vector<double> lengths(const Tensor &given, const char *name) {
  if (!given.is_cpu())
    fail(std::string(name) +
         " are on a GPU, where this operator does not run yet; use OpenMM's CPU or Reference platform, move them to the "
         "CPU, or export the model with --portable");
  const ScalarType dtype = given.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) fail(std::string(name) + " must be float32 or float64");
  const Tensor t = torch::stable::contiguous(given);
  return dtype == ScalarType::Float ? scaled<float>(t, ANGSTROM_PER_NM) : scaled<double>(t, ANGSTROM_PER_NM);
}

std::vector<int64_t> integers(const Tensor &given, const char *name) {
  if (!given.is_cpu() || given.scalar_type() != ScalarType::Long || given.dim() != 1)
    fail(std::string(name) + " must be a one-dimensional int64 tensor on the CPU, got shape " + shape_of(given));
  const Tensor t = torch::stable::contiguous(given);
  const int64_t *x = t.const_data_ptr<int64_t>();
  return {x, x + t.numel()};
}

// The atoms that the model handles, checked: all, or those of `indices`.
std::vector<int64_t> selected(const std::optional<Tensor> &indices, int64_t n_atoms) {
  std::vector<int64_t> atoms;
  if (!indices) {
    atoms.resize(static_cast<size_t>(n_atoms));
    for (int64_t k = 0; k < n_atoms; ++k) atoms[static_cast<size_t>(k)] = k;
    return atoms;
  }
  atoms = integers(*indices, "indices");
  std::vector<bool> seen(static_cast<size_t>(n_atoms), false);
  for (const int64_t k : atoms) {
    if (k < 0 || k >= n_atoms)
      fail("index " + std::to_string(k) + " in indices is outside the system of " + std::to_string(n_atoms) + " atoms");
    if (seen[static_cast<size_t>(k)]) fail("atom " + std::to_string(k) + " is listed twice in indices");
    seen[static_cast<size_t>(k)] = true;
  }
  return atoms;
}

template <class T>
void scatter(Tensor &forces, const std::vector<int64_t> &atoms, const std::vector<double> &values) {
  constexpr double factor = KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM;
  T *out = forces.mutable_data_ptr<T>();
  for (size_t k = 0; k < atoms.size(); ++k)
    for (size_t a = 0; a < 3; ++a) out[3 * static_cast<size_t>(atoms[k]) + a] = static_cast<T>(factor * values[3 * k + a]);
}

// Energy and forces of a system in OpenMM's units.
//   payload         uint8 [bytes]: the content of a model file
//   atomic_numbers  int64 [n] of every atom of the system; those of atoms outside `indices` mean nothing
//   indices         int64 [m] atoms that the model handles, none for all
//   positions       float32 or float64 [n, 3] in nm
//   box             [3, 3] in nm, rows are the box vectors; none for no periodicity
// Returns the energy in kJ/mol, a float64 scalar, and the forces [n, 3] in kJ/mol/nm, in the dtype of positions and zero for atoms
// outside `indices`. As many threads as torch.get_num_threads().
std::tuple<Tensor, Tensor> energy_forces(const Tensor &payload, const std::optional<Tensor> &atomic_numbers,
                                         const std::optional<Tensor> &indices, const Tensor &positions,
                                         const std::optional<Tensor> &box) {
  if (!atomic_numbers)
    fail(
        "the model file has no elements baked in, and TorchForce passes positions only; export it with 'mlff-export --structure "
        "FILE', or use "
        "mlff.openmm.create_force(model, topology)");
  if (positions.dim() != 2 || positions.size(1) != 3) fail("positions must have the shape [n, 3], got " + shape_of(positions));
  if (box && (box->dim() != 2 || box->size(0) != 3 || box->size(1) != 3))
    fail("the box must have the shape [3, 3], got " + shape_of(*box));
  const int64_t n_atoms = positions.size(0);
  const std::vector<int64_t> numbers = integers(*atomic_numbers, "atomic_numbers");
  if (static_cast<int64_t>(numbers.size()) != n_atoms)
    fail("the system has " + std::to_string(n_atoms) + " atoms, but the model file was written for " +
         std::to_string(numbers.size()) +
         "; export it for this system with 'mlff-export --structure FILE' or mlff.openmm.create_force(model, topology)");

  const std::vector<int64_t> atoms = selected(indices, n_atoms);
  const std::vector<double> all = lengths(positions, "positions");
  std::vector<double> x(3 * atoms.size()), f(3 * atoms.size());
  for (size_t k = 0; k < atoms.size(); ++k) std::copy_n(&all[3 * static_cast<size_t>(atoms[k])], 3, &x[3 * k]);
  const std::vector<double> cell = box ? lengths(*box, "box vectors") : std::vector<double>();
  constexpr int32_t periodic[3] = {1, 1, 1};

  double energy = 0.0;
  mlff_results results{};
  results.energy = &energy;
  results.forces = f.data();
  const std::shared_ptr<Model> model = model_of(payload);
  std::unique_ptr<System> system = model->acquire(model->species_of(numbers, atoms));
  check(mlff_system_set_threads(system->handle, static_cast<int32_t>(torch::stable::get_num_threads())));
  const int status =
      mlff_system_compute_periodic(system->handle, x.data(), box ? cell.data() : nullptr, box ? periodic : nullptr, &results);
  const std::string error = status == MLFF_OK ? "" : mlff_last_error();
  model->release(std::move(system));
  if (status != MLFF_OK) fail(error);

  const std::array<int64_t, 2> shape{n_atoms, 3};
  Tensor forces = torch::stable::new_zeros(positions, shape);
  if (positions.scalar_type() == ScalarType::Float)
    scatter<float>(forces, atoms, f);
  else
    scatter<double>(forces, atoms, f);
  Tensor total = torch::stable::new_empty(positions, torch::headeronly::IntHeaderOnlyArrayRef(), ScalarType::Double);
  *total.mutable_data_ptr<double>() = KJ_PER_MOL_PER_EV * energy;
  return {total, forces};
}

}  // namespace

STABLE_TORCH_LIBRARY(mlff, m) {
  m.def(
      "energy_forces(Tensor payload, Tensor? atomic_numbers, Tensor? indices, Tensor positions, Tensor? box) -> (Tensor energy, "
      "Tensor "
      "forces)");
}

// For every device, so that a tensor on an unexpected one meets the message above and not a dispatcher error.
STABLE_TORCH_LIBRARY_IMPL(mlff, CompositeExplicitAutograd, m) { m.impl("energy_forces", TORCH_BOX(&energy_forces)); }
