// The operator mlff::energy_forces, for TorchScript and OpenMM's TorchForce.
//
// It speaks the LibTorch stable ABI only (C functions that keep their meaning from one torch to the next), so that one binary
// serves torch 2.10 and every later one, with or without CUDA; what is CUDA's alone is looked up at run time. Compile with
// -DTORCH_TARGET_VERSION=0x020a000000000000.
//
// This is the one place where OpenMM's units (nm, kJ/mol) meet the core's (Angstrom, eV).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <dlfcn.h>

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
constexpr double FORCE_UNIT = KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM;

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

// A contiguous one-dimensional int64 tensor on the CPU.
struct Integers {
  Tensor tensor;
  const int64_t *data;
  size_t size;

  Integers(const Tensor &given, const char *name) {
    if (!given.is_cpu() || given.scalar_type() != ScalarType::Long || given.dim() != 1)
      fail(std::string(name) + " must be a one-dimensional int64 tensor on the CPU, got shape " + shape_of(given));
    tensor = torch::stable::contiguous(given);
    data = tensor.const_data_ptr<int64_t>();
    size = static_cast<size_t>(tensor.numel());
  }
  bool equals(const std::vector<int64_t> &other) const {
    return size == other.size() && (size == 0 || std::memcmp(data, other.data(), size * sizeof(int64_t)) == 0);
  }
};

constexpr int CPU = -1;

// Who calls: what two simulations of the same atoms do not have in common.
struct Caller {
  int device;  // index of the GPU, or CPU
  const void *numbers, *indices, *positions;  // addresses; of positions only on a GPU, where an engine keeps them in one place
  bool operator==(const Caller &) const = default;
};

// One simulation: its neighbour list and workspace, and the atoms that it was set up for.
struct System {
  mlff_system *handle = nullptr;
  Caller caller{};
  std::vector<int64_t> numbers, atoms;  // of all atoms; those that the model handles
  bool whole = true;                    // all atoms, `atoms` is empty
  bool captured = false;                // a graph of the caller uses its memory, until nobody knows when

  System(const mlff_model *model, const Caller &caller) : caller(caller) {
    const std::string device = caller.device == CPU ? "cpu" : "cuda:" + std::to_string(caller.device);
    check(mlff_system_create(model, device.c_str(), &handle));
  }
  ~System() {
    if (!captured) mlff_system_free(handle);
  }
  System(const System &) = delete;
  System &operator=(const System &) = delete;

  size_t n_atoms() const { return whole ? numbers.size() : atoms.size(); }
  size_t row(size_t k) const { return whole ? k : static_cast<size_t>(atoms[k]); }
};

// A loaded model and the systems that no call is using. Concurrent calls get a system each, and so do simulations that can be told
// apart: their neighbour lists and graphs stay good.
class Model {
 public:
  Model(const void *payload, size_t size) { check(mlff_model_load_memory(payload, size, &handle_)); }
  ~Model() {
    idle_.clear();
    mlff_model_free(handle_);
  }
  Model(const Model &) = delete;
  Model &operator=(const Model &) = delete;

  std::unique_ptr<System> acquire(const Caller &caller, const Integers &numbers, const std::optional<Integers> &indices,
                                  bool capturing) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const size_t k = find(caller, numbers, indices, capturing);
      if (k < idle_.size()) {
        std::unique_ptr<System> system = std::move(idle_[k]);
        idle_.erase(idle_.begin() + static_cast<int64_t>(k));
        system->caller = caller;
        return system;
      }
    }
    if (capturing) fail("the stream is capturing: call once before capturing, with the same tensors");
    auto system = std::make_unique<System>(handle_, caller);
    system->numbers.assign(numbers.data, numbers.data + numbers.size);
    system->whole = !indices;
    if (indices) {
      system->atoms.assign(indices->data, indices->data + indices->size);
      check_indices(system->atoms, numbers.size);
    }
    const std::vector<int32_t> species = species_of(*system);
    const auto n = static_cast<int64_t>(species.size());
    check(mlff_system_set_atoms(system->handle, n, n, species.data()));
    return system;
  }

  void release(std::unique_ptr<System> system) {
    constexpr size_t max_idle = 16;
    std::lock_guard<std::mutex> lock(mutex_);
    const auto free = std::count_if(idle_.begin(), idle_.end(), [](const auto &s) { return !s->captured; });
    if (static_cast<size_t>(free) >= max_idle)
      idle_.erase(std::find_if(idle_.begin(), idle_.end(), [](const auto &s) { return !s->captured; }));
    idle_.push_back(std::move(system));
  }

 private:
  // The idle system to use, or the end: the caller's own; else, where some of these atoms are idle already and one more would
  // take too much memory, the one that was used least recently.
  size_t find(const Caller &caller, const Integers &numbers, const std::optional<Integers> &indices, bool capturing) const {
    constexpr size_t max_alike = 4, max_bytes = size_t(1) << 30;
    size_t alike = 0, bytes = 0, oldest = idle_.size(), newest = idle_.size();
    for (size_t k = idle_.size(); k-- > 0;) {
      const System &s = *idle_[k];
      if (s.caller.device != caller.device || s.whole == indices.has_value() || !numbers.equals(s.numbers)) continue;
      if (indices && !indices->equals(s.atoms)) continue;
      if (s.caller == caller) return k;
      if (s.captured) continue;  // graphs of somebody else may be running
      if (newest == idle_.size()) newest = k;
      oldest = k;
      alike++;
      bytes += mlff_system_bytes(s.handle);
    }
    if (capturing) return newest;  // none can be made now
    return alike >= max_alike || bytes > max_bytes ? oldest : idle_.size();
  }

  static void check_indices(const std::vector<int64_t> &atoms, size_t n_atoms) {
    std::vector<bool> seen(n_atoms, false);
    for (const int64_t k : atoms) {
      if (k < 0 || static_cast<size_t>(k) >= n_atoms)
        fail("index " + std::to_string(k) + " in indices is outside the system of " + std::to_string(n_atoms) + " atoms");
      if (seen[static_cast<size_t>(k)]) fail("atom " + std::to_string(k) + " is listed twice in indices");
      seen[static_cast<size_t>(k)] = true;
    }
  }

  std::vector<int32_t> species_of(const System &system) const {
    std::vector<int32_t> species(system.n_atoms());
    int64_t last_number = -1;  // neighbours in the list are often of one element
    int32_t last_species = -1;
    for (size_t k = 0; k < species.size(); ++k) {
      const int64_t number = system.numbers[system.row(k)];
      if (number != last_number) {
        last_species = number > 0 && number < 1000 ? mlff_model_species_of(handle_, static_cast<int32_t>(number)) : -1;
        last_number = number;
      }
      if (last_species < 0) {
        std::string known;
        for (int32_t s = 0; s < mlff_model_n_species(handle_); ++s)
          known.append(" ").append(std::to_string(mlff_model_atomic_numbers(handle_)[s]));
        fail("atom " + std::to_string(system.row(k)) + " has atomic number " + std::to_string(number) +
             ", which the model does not know; it knows" + known);
      }
      species[k] = last_species;
    }
    return species;
  }

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

// ---- on the CPU -------------------------------------------------------------------------------------------------------

// Lengths of the tensor [rows, 3] in nm, as Angstrom.
std::vector<double> lengths(const Tensor &given) {
  const Tensor t = torch::stable::contiguous(given);
  std::vector<double> out(static_cast<size_t>(t.numel()));
  const auto scale = [&](const auto *x) {
    for (size_t k = 0; k < out.size(); ++k) out[k] = ANGSTROM_PER_NM * static_cast<double>(x[k]);
  };
  if (t.scalar_type() == ScalarType::Float)
    scale(t.const_data_ptr<float>());
  else
    scale(t.const_data_ptr<double>());
  return out;
}

template <class T>
void scatter(Tensor &forces, const System &system, const std::vector<double> &values) {
  T *out = forces.mutable_data_ptr<T>();
  for (size_t k = 0; k < system.n_atoms(); ++k)
    for (size_t a = 0; a < 3; ++a) out[3 * system.row(k) + a] = static_cast<T>(FORCE_UNIT * values[3 * k + a]);
}

int on_cpu(const System &system, const Tensor &positions, const std::optional<Tensor> &box, Tensor &energy, Tensor &forces) {
  const std::vector<double> cell = box ? lengths(*box) : std::vector<double>();
  constexpr int32_t periodic[3] = {1, 1, 1};
  std::vector<double> x = lengths(positions), f(3 * system.n_atoms());
  if (!system.whole) {
    std::vector<double> chosen(f.size());
    for (size_t k = 0; k < system.n_atoms(); ++k) std::copy_n(&x[3 * system.row(k)], 3, &chosen[3 * k]);
    x = std::move(chosen);
  }
  mlff_results results{};
  results.energy = energy.mutable_data_ptr<double>();
  results.forces = f.data();
  check(mlff_system_set_threads(system.handle, static_cast<int32_t>(torch::stable::get_num_threads())));
  const int status =
      mlff_system_compute_periodic(system.handle, x.data(), box ? cell.data() : nullptr, box ? periodic : nullptr, &results);
  if (status != MLFF_OK) return status;
  *results.energy *= KJ_PER_MOL_PER_EV;
  if (positions.scalar_type() == ScalarType::Float)
    scatter<float>(forces, system, f);
  else
    scatter<double>(forces, system, f);
  return status;
}

// ---- on a GPU ---------------------------------------------------------------------------------------------------------

// A function of a library that torch has opened: it need not be among those that this one sees, and torch for CPUs has none.
template <class Function>
Function symbol_of(const char *library, const char *name) {
  void *found = dlsym(RTLD_DEFAULT, name);
  if (!found)
    if (void *handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(handle, name);
  return reinterpret_cast<Function>(found);
}

void *current_stream(int device) {
  using Get = AOTITorchError (*)(int32_t, void **);
  static const Get get = symbol_of<Get>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  void *stream = nullptr;
  if (!get || get(device, &stream) != AOTI_TORCH_SUCCESS)
    fail("this torch does not tell its current CUDA stream; mlff needs torch 2.10 or newer for CUDA");
  return stream;
}

bool is_capturing(void *stream) {
  using Ask = int (*)(void *, int *);
  static const Ask ask = symbol_of<Ask>("libcuda.so.1", "cuStreamIsCapturing");
  int status = 0;
  return stream && ask && ask(stream, &status) == 0 && status != 0;  // the default stream cannot capture
}

int on_gpu(const System &system, const Tensor &given, std::optional<Tensor> box, void *stream, Tensor &energy, Tensor &forces) {
  const Tensor positions = torch::stable::contiguous(given);
  if (box && !(box->is_cuda() && box->get_device_index() == positions.get_device_index() &&
               box->scalar_type() == positions.scalar_type()))
    box = torch::stable::to(*box, positions.scalar_type(), std::nullopt, positions.device());
  if (box) box = torch::stable::contiguous(*box);

  mlff_device_arrays arrays{};
  arrays.stream = stream;
  arrays.is_double = positions.scalar_type() == ScalarType::Double;
  arrays.n_rows = positions.size(0);
  arrays.positions = positions.const_data_ptr();
  arrays.atoms = system.whole ? nullptr : system.atoms.data();
  arrays.box = box ? box->const_data_ptr() : nullptr;
  arrays.length_unit = ANGSTROM_PER_NM;
  arrays.energy_unit = KJ_PER_MOL_PER_EV;
  arrays.energy = energy.mutable_data_ptr<double>();
  arrays.forces = forces.mutable_data_ptr();
  return mlff_system_compute_device(system.handle, &arrays);
}

// -----------------------------------------------------------------------------------------------------------------------

void check_lengths(const Tensor &t, const char *name) {
  const ScalarType dtype = t.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) fail(std::string(name) + " must be float32 or float64");
  if (!t.is_cpu() && !t.is_cuda()) fail(std::string(name) + " must be on the CPU or on a GPU of NVIDIA");
}

// Energy and forces of a system in OpenMM's units, on the device of the positions. On a GPU it works in torch's current stream.
//   payload         uint8 [bytes], on the CPU: the content of a model file
//   atomic_numbers  int64 [n] of every atom of the system, on the CPU; those of atoms outside `indices` mean nothing
//   indices         int64 [m] atoms that the model handles, on the CPU; none for all
//   positions       float32 or float64 [n, 3] in nm
//   box             [3, 3] in nm, rows are the box vectors; none for no periodicity
// Returns the energy in kJ/mol, a float64 scalar, and the forces [n, 3] in kJ/mol/nm, in the dtype of positions and zero for atoms
// outside `indices`. On the CPU as many threads as torch.get_num_threads().
std::tuple<Tensor, Tensor> energy_forces(const Tensor &payload, const std::optional<Tensor> &atomic_numbers,
                                         const std::optional<Tensor> &indices, const Tensor &positions,
                                         const std::optional<Tensor> &box) {
  if (!atomic_numbers)
    fail(
        "the model file has no elements baked in, and TorchForce passes positions only; export it with 'mlff-export --structure "
        "FILE', or use "
        "mlff.openmm.create_force(model, topology)");
  if (positions.dim() != 2 || positions.size(1) != 3) fail("positions must have the shape [n, 3], got " + shape_of(positions));
  check_lengths(positions, "positions");
  if (box) {
    if (box->dim() != 2 || box->size(0) != 3 || box->size(1) != 3)
      fail("the box must have the shape [3, 3], got " + shape_of(*box));
    check_lengths(*box, "box vectors");
    if (positions.is_cpu() && !box->is_cpu()) fail("box vectors must be on the CPU, where the positions are");
  }
  const int64_t n_atoms = positions.size(0);
  const Integers numbers(*atomic_numbers, "atomic_numbers");
  std::optional<Integers> atoms;
  if (indices) atoms.emplace(*indices, "indices");
  if (static_cast<int64_t>(numbers.size) != n_atoms)
    fail("the system has " + std::to_string(n_atoms) + " atoms, but the model file was written for " +
         std::to_string(numbers.size) +
         "; export it for this system with 'mlff-export --structure FILE' or mlff.openmm.create_force(model, topology)");

  const bool gpu = positions.is_cuda();
  const int device = gpu ? static_cast<int>(positions.get_device_index()) : CPU;
  void *stream = gpu ? current_stream(device) : nullptr;
  const Caller caller{device, numbers.data, atoms ? atoms->data : nullptr, gpu ? positions.const_data_ptr() : nullptr};
  const std::shared_ptr<Model> model = model_of(payload);
  const bool capturing = gpu && is_capturing(stream);
  std::unique_ptr<System> system = model->acquire(caller, numbers, atoms, capturing);

  const std::array<int64_t, 2> shape{n_atoms, 3};
  Tensor energy = torch::stable::new_empty(positions, torch::headeronly::IntHeaderOnlyArrayRef(), ScalarType::Double);
  Tensor forces = system->whole ? torch::stable::new_empty(positions, shape) : torch::stable::new_zeros(positions, shape);
  const int status = gpu ? on_gpu(*system, positions, box, stream, energy, forces)
                         : on_cpu(*system, positions, box, energy, forces);
  const std::string error = status == MLFF_OK ? "" : mlff_last_error();
  system->captured |= capturing && status == MLFF_OK;
  model->release(std::move(system));
  if (status != MLFF_OK) fail(error);
  return {energy, forces};
}

}  // namespace

STABLE_TORCH_LIBRARY(mlff, m) {
  m.def(
      "energy_forces(Tensor payload, Tensor? atomic_numbers, Tensor? indices, Tensor positions, Tensor? box)"
      " -> (Tensor energy, Tensor forces)");
}

// For every device: the operator looks at the positions.
STABLE_TORCH_LIBRARY_IMPL(mlff, CompositeExplicitAutograd, m) { m.impl("energy_forces", TORCH_BOX(&energy_forces)); }
