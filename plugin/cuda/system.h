// The system on a GPU (docs/cuda.md): arrays with capacities in one block of device memory, and the evaluation as replayed graphs.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "../neighbors.h"
#include "../system.h"
#include "device.h"

namespace mlff::cuda {

// Rows that the arrays have room for. Launches cover all of them; kernels look at `counts` for the true numbers.
struct Capacity {
  int64_t local = 0, total = 0, structures = 0, edges = 0, candidates = 0;  // edges, candidates: per row
  bool operator==(const Capacity &) const = default;
  int64_t bins() const;
  int64_t rows(Rows rows) const;
};

constexpr int kMaxRounds = 6;  // evaluations until all capacities are large enough: candidates can grow before edges do

inline double images_in(const int32_t *n) { return (2.0 * n[0] + 1) * (2.0 * n[1] + 1) * (2.0 * n[2] + 1); }

class CudaSystem : public System {
 public:
  explicit CudaSystem(std::shared_ptr<Device> device);

  void set_neighbors(const int64_t *offsets, const int32_t *neighbors) override;
  void compute(const double *positions, const mlff_results &results) override;
  void compute_periodic(const double *positions, const double *cell, const int32_t *pbc, const mlff_results &results) override;
  void compute_batch(const double *positions, const double *cells, const int32_t *pbcs, const mlff_results &results) override;
  void compute_device(const mlff_device_arrays &arrays) override;
  void edges(int64_t *n_edges, int32_t *centers, int32_t *neighbors, double *vectors) const override;
  size_t bytes() const override;

 private:
  // What is to be run.
  struct Setup {
    bool dense, backward, pieces;  // pieces: cut at the exchanges
    int schedule;
    bool arrays = false;  // atoms of the caller that are on the GPU
    bool operator==(const Setup &) const = default;
  };
  using Callers = std::array<DevicePointer, kCallers>;
  struct Graphs {
    Setup setup;
    Capacity capacity;
    Callers caller;                 // null pointers but for Setup::arrays
    std::vector<GraphExec> pieces;  // empty: a piece without launches
    std::vector<int> exchanges;     // arrays, one after each piece but the last
  };
  // What a stream of the caller can capture: that which has been evaluated before.
  struct Warm {
    Setup setup;
    bool is_double, box, energy, forces;
    double length_unit, energy_unit;
    bool operator==(const Warm &) const = default;
  };

  void atoms_changed() override;
  void set_boxes(const std::vector<Cell> &cells);
  bool fits_dense(int64_t n, double images) const;
  Setup choose(bool dense, bool backward) const;
  std::vector<const Stage *> stages(const Setup &setup) const;  // those that run

  // Makes room; where capacities change, all arrays become zero and must be filled again.
  void make_room(const Setup &setup, int64_t dense_candidates, StreamHandle stream);
  void detach();  // from what the caller has captured: the next evaluation uses other memory
  size_t place(const Capacity &capacity, std::vector<size_t> &offsets) const;
  void allocate(size_t size);
  DevicePointer pointer(int array) const { return arena_.get() + offsets_[size_t(array)]; }
  void put(Input input, const void *data, size_t bytes, StreamHandle stream);  // unless the device holds the same
  void upload(const Setup &setup, StreamHandle stream);

  // overlap: the kernel before is one of the plan, and this one may start before that has ended.
  void launch(const Stage &stage, StreamHandle stream, bool overlap, const Callers &caller);
  void launch(std::span<const Stage *const> stages, StreamHandle stream, const Callers &caller = {});
  // Without pieces where the caller's pointers are new: they may never come back, and to make a graph takes as long as several evaluations.
  Graphs &graphs(const Setup &setup, const Callers &caller);
  bool run(const Setup &setup, StreamHandle stream, const Callers &caller = {});  // false: more room is needed, nothing was exchanged
  bool exchange_rows(const Graphs &graphs, size_t number, StreamHandle stream);  // likewise
  bool must_repeat(const int32_t *flags, const Setup &setup);  // throws if the flags tell of bad input
  void evaluate(const double *positions, Setup setup, const mlff_results &results);
  void evaluate_nothing(const Setup &setup, const mlff_results &results) const;
  const int32_t *fetch(const mlff_results &results);  // into results_; returns the flags
  void deliver(const mlff_results &results) const;

  void check_arrays(const mlff_device_arrays &arrays) const;
  bool set_caller_atoms(const mlff_device_arrays &arrays, bool may_change);
  void read_box(const mlff_device_arrays &arrays, StreamHandle stream);

  const std::shared_ptr<Device> device_;
  const Plan &plan_;
  Stream stream_;

  Capacity capacity_;
  int64_t edge_capacity_ = 0, list_candidates_ = 0;  // what growth has asked for
  DeviceBuffer arena_;
  std::vector<DeviceBuffer> retired_;             // graphs that the caller captured still use them
  bool captured_ = false;                         // whether the caller has captured launches that use arena_
  std::vector<size_t> offsets_, result_offsets_;  // of arrays in arena_, of results in results_
  std::vector<Graphs> graphs_;                    // the last used at the end

  std::vector<double> boxes_;
  std::vector<int32_t> images_;
  int64_t dense_candidates_ = 0;  // needed for boxes_
  std::array<std::vector<std::byte>, kInputs> mirrors_;
  bool atoms_dirty_ = true, rebuild_ = true;
  bool clean_ = false;  // whether the last evaluation ended, and so cleared the flags
  bool dense_ = false;  // whether the last evaluation used the dense search
  bool wide_ = false;   // whether these atoms have met numbers beyond what kernels for few atoms can take

  std::vector<int32_t> caller_atoms_;
  int64_t caller_rows_ = -1;
  std::optional<Warm> warm_;

  PinnedBuffer positions_, results_, exchanged_;
};

}  // namespace mlff::cuda
