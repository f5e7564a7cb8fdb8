#include "system.h"

#include <cmath>

#include "cpu/system.h"
#include "cuda/device.h"
#include "cuda/system.h"

namespace mlff {
namespace {

constexpr int32_t kMaxThreads = 1024;
constexpr int kCpu = -1;

// Index of the GPU, or kCpu.
int parse_device(const std::string &device) {
  if (device == "cpu") return kCpu;
  if (device == "cuda") return 0;
  const std::string number = device.rfind("cuda:", 0) == 0 ? device.substr(5) : "";
  if (number.empty() || number.size() > 4 || number.find_first_not_of("0123456789") != std::string::npos)
    fail(MLFF_ERROR_RESOURCE,
         "there is no device \"%s\"; this build of mlff computes on \"cpu\" and on GPUs: \"cuda\", \"cuda:1\" ...",
         device.substr(0, 80).c_str());
  return std::stoi(number);
}

}  // namespace

std::unique_ptr<System> create_system(std::shared_ptr<const Model> model, const std::string &device) {
  const int ordinal = parse_device(device);
  if (ordinal == kCpu) return std::make_unique<CpuSystem>(std::move(model));
  return std::make_unique<cuda::CudaSystem>(cuda::Device::get(std::move(model), ordinal));
}

void check_device(const Model &model, const std::string &device) {
  if (const int ordinal = parse_device(device); ordinal != kCpu) cuda::check_support(model, ordinal);
}

void System::set_threads(int32_t n_threads) {
  if (n_threads < 0 || n_threads > kMaxThreads)
    fail(MLFF_ERROR_INPUT, "the number of threads must be 0 (the OpenMP default) to %d, got %d", kMaxThreads, n_threads);
  threads_ = n_threads;
}

void System::set_atoms(int64_t n_local, int64_t n_total, const int32_t *species) {
  if (n_local < 0 || n_total < n_local || n_total > INT32_MAX)
    fail(MLFF_ERROR_INPUT, "set_atoms needs 0 <= n_local <= n_total < 2^31, got n_local = %lld and n_total = %lld",
         (long long)n_local, (long long)n_total);
  if (n_total > 0 && !species) fail(MLFF_ERROR_INPUT, "set_atoms needs the species of %lld atoms, got NULL", (long long)n_total);
  const int32_t n_species = int32_t(model_->atomic_numbers.size());
  for (int64_t i = 0; i < n_total; i++)
    if (species[i] < -1 || species[i] >= n_species)
      fail(MLFF_ERROR_INPUT, "atom %lld has species %d; the model's species are 0 to %d, or -1 for an atom to ignore",
           (long long)i, species[i], n_species - 1);
  with_memory(n_total, 0, [&] { species_.reserve(n_total); });
  species_.assign(species, species + n_total);
  n_local_ = n_local, n_total_ = n_total;
  originals_.clear();
  starts_ = {0, n_total};
  foreign_ghosts_ = n_total > n_local;
  has_atoms_ = true;
  evaluated_ = false;
  atoms_changed();
}

void System::set_images(const int32_t *originals) {
  if (n_total_ > 0 && !originals)
    fail(MLFF_ERROR_INPUT, "set_images needs the originals of %lld atoms, got NULL", (long long)n_total_);
  bool foreign = false;
  for (int64_t k = 0; k < n_total_; k++) {
    const int32_t first = originals[k];
    if (first < 0 || first > k || originals[first] != first || species_[first] != species_[k] || (k < n_local_ && first != k))
      fail(MLFF_ERROR_INPUT,
           "atom %lld has the original %d; it must be the first row of the same atom, and of a local atom itself", (long long)k,
           first);
    foreign |= k >= n_local_ && first == k;
  }
  with_memory(n_total_, 0, [&] { originals_.assign(originals, originals + n_total_); });
  foreign_ghosts_ = foreign;
  evaluated_ = false;
}

void System::set_structures(int32_t n_structures, const int64_t *starts) {
  if (!has_atoms_ || n_local_ != n_total_)
    fail(MLFF_ERROR_INPUT, "set_structures comes after set_atoms, in a system without ghosts");
  if (n_structures < 1 || !starts) fail(MLFF_ERROR_INPUT, "set_structures needs one structure or more, got %d", n_structures);
  for (int32_t b = 0; b <= n_structures; b++)
    if (starts[b] < (b ? starts[b - 1] : 0) || starts[b] > n_total_ || (b == 0 && starts[b] != 0) ||
        (b == n_structures && starts[b] != n_total_))
      fail(MLFF_ERROR_INPUT,
           "the starts of the structures must begin with 0, never decrease and end with %lld; starts[%d] is %lld",
           (long long)n_total_, b, (long long)starts[b]);
  with_memory(n_total_, 0, [&] { starts_.assign(starts, starts + n_structures + 1); });
  evaluated_ = false;
  atoms_changed();
}

void System::set_exchange(mlff_exchange_fn exchange, void *user) {
  exchange_ = exchange;
  user_ = user;
}

void System::check_ready(const double *positions) const {
  if (!has_atoms_) fail(MLFF_ERROR_INPUT, "the system has no atoms yet: call set_atoms before computing");
  if (n_total_ > 0 && !positions) fail(MLFF_ERROR_INPUT, "the positions of %lld atoms are needed, got NULL", (long long)n_total_);
  if (all_finite(positions, 3 * n_total_)) return;
  for (int64_t i = 0; i < 3 * n_total_; i++)
    if (!std::isfinite(positions[i]))
      fail(MLFF_ERROR_INPUT, "the position of atom %lld is not finite (%c = %g)", (long long)i / 3, "xyz"[i % 3], positions[i]);
}

void System::check_one_structure(const char *function) const {
  if (n_structures() != 1)
    fail(MLFF_ERROR_INPUT, "%s evaluates one structure, %d were set: call compute_batch", function, n_structures());
}

void System::check_no_ghosts(const char *function) const {
  if (n_total_ != n_local_)
    fail(MLFF_ERROR_INPUT, "%s finds its own images: %lld atoms were set as ghosts, none are allowed", function,
         (long long)(n_total_ - n_local_));
}

void System::check_grade(const mlff_results &results) const {
  if (results.extrapolation_grade && !model_->has_grade())
    fail(MLFF_ERROR_INPUT,
         "%s has no extrapolation grade; `mlff train` fits one: run it again with this mlff, and export the student",
         model_->name.c_str());
}

void System::check_exchange(bool exchanges) const {
  if (foreign_ghosts_ && !exchange_ && exchanges)
    fail(MLFF_ERROR_EXCHANGE, "the system has %lld ghosts, and the model's message layers need their features: call set_exchange",
         (long long)(n_total_ - n_local_));
}

void System::exchange(float *rows, int32_t width) const {
  // Every rank takes part, also one that has no atoms: the others wait for it.
  if (!exchange_) return;
  if (const int rc = exchange_(user_, rows, width))
    fail(MLFF_ERROR_EXCHANGE, "the exchange of ghost features failed: the callback returned %d", rc);
}

void System::no_edges() {
  throw Error(MLFF_ERROR_INPUT,
              "there are no edges: the system has not been evaluated since it was set up, or the last evaluation failed");
}

}  // namespace mlff
