// One simulation with a model: what every backend keeps and checks. cpu/system.h and cuda/system.h evaluate.
#pragma once

#include <bit>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "error.h"
#include "mlff.h"
#include "model.h"

namespace mlff {

// The functions of mlff.h, whose documentation holds here; they throw Error instead of returning a status.
class System {
 public:
  virtual ~System() = default;
  System(const System &) = delete;
  System &operator=(const System &) = delete;

  void set_threads(int32_t n_threads);
  void set_atoms(int64_t n_local, int64_t n_total, const int32_t *species);
  void set_images(const int32_t *originals);
  void set_structures(int32_t n_structures, const int64_t *starts);
  void set_exchange(mlff_exchange_fn exchange, void *user);
  virtual void set_neighbors(const int64_t *offsets, const int32_t *neighbors) = 0;
  virtual void compute(const double *positions, const mlff_results &results) = 0;
  virtual void compute_periodic(const double *positions, const double *cell, const int32_t *pbc, const mlff_results &results) = 0;
  virtual void compute_batch(const double *positions, const double *cells, const int32_t *pbcs, const mlff_results &results) = 0;
  virtual void compute_device(const mlff_device_arrays &arrays) = 0;
  virtual void edges(int64_t *n_edges, int32_t *centers, int32_t *neighbors, double *vectors) const = 0;
  virtual size_t bytes() const = 0;

 protected:
  explicit System(std::shared_ptr<const Model> model) : model_(std::move(model)) {}
  virtual void atoms_changed() = 0;  // after a call that changes what the protected members say of the atoms

  void check_ready(const double *positions) const;
  void check_one_structure(const char *function) const;
  void check_no_ghosts(const char *function) const;
  void check_grade(const mlff_results &results) const;  // that the model has what is wanted
  void check_exchange(bool exchanges) const;  // that ghosts have their features, if the stages to be run exchange any
  void exchange(float *rows, int32_t width) const;
  [[noreturn]] static void no_edges();
  int32_t n_structures() const { return int32_t(starts_.size()) - 1; }

  const std::shared_ptr<const Model> model_;
  int32_t threads_ = 0;
  int64_t n_local_ = 0, n_total_ = 0;
  bool has_atoms_ = false;  // whether set_atoms has been called
  bool evaluated_ = false;  // whether the edges are those of a successful evaluation
  std::vector<int32_t> species_;
  std::vector<int32_t> originals_;     // as set by set_images; empty: no row is an image
  std::vector<int64_t> starts_{0, 0};  // first row of each structure, and the end
  bool foreign_ghosts_ = false;        // whether there are ghosts that are not images
  mlff_exchange_fn exchange_ = nullptr;
  void *user_ = nullptr;
};

// Devices are "cpu", "cuda" (the first GPU) and "cuda:N". Throw Error(MLFF_ERROR_RESOURCE) for others, and for a GPU that is not
// there or that the model has no code for.
std::unique_ptr<System> create_system(std::shared_ptr<const Model> model, const std::string &device);
void check_device(const Model &model, const std::string &device);

// Turns a failed allocation into an error that names the size of the system.
template <class Body>
void with_memory(int64_t n_atoms, const int64_t &n_edges, Body &&body) {
  try {
    body();
  } catch (const std::bad_alloc &) {
    fail(MLFF_ERROR_RESOURCE, "out of memory for %lld atoms and %lld edges; use a smaller system or more ranks",
         (long long)n_atoms, (long long)n_edges);
  }
}

// Whether all numbers are finite: in integers, which compilers turn into vector instructions.
inline bool all_finite(const double *x, int64_t n) {
  constexpr uint64_t exponent = uint64_t(0x7ff) << 52;
  uint64_t bad = 0;
  for (int64_t k = 0; k < n; k++) bad |= uint64_t((std::bit_cast<uint64_t>(x[k]) & exponent) == exponent);
  return !bad;
}

constexpr double kCoincident = 1e-6;  // Angstrom, below which two atoms have no direction between them
[[noreturn]] inline void fail_coincident(int64_t i, int64_t j) {
  fail(MLFF_ERROR_INPUT, "atoms %lld and %lld are at the same place (closer than %g Angstrom); move one of them", (long long)i,
       (long long)j, kCoincident);
}

}  // namespace mlff
