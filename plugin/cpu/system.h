// The system on the CPU: neighbour list, workspace, and the evaluation of the plan.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "../memory.h"
#include "../neighbors.h"
#include "../system.h"

namespace mlff {

class CpuSystem : public System {
 public:
  explicit CpuSystem(std::shared_ptr<const Model> model);

  void set_neighbors(const int64_t *offsets, const int32_t *neighbors) override;
  void compute(const double *positions, const mlff_results &results) override;
  void compute_periodic(const double *positions, const double *cell, const int32_t *pbc, const mlff_results &results) override;
  void compute_batch(const double *positions, const double *cells, const int32_t *pbcs, const mlff_results &results) override;
  void compute_device(const mlff_device_arrays &arrays) override;
  void edges(int64_t *n_edges, int32_t *centers, int32_t *neighbors, double *vectors) const override;
  size_t bytes() const override;

 private:
  void atoms_changed() override;
  // Own pair list with a skin, searched again when an atom has moved half the skin or the cell has changed.
  const PairList &find(const double *positions, const Cell &cell, int threads);
  void evaluate(const double *positions, const PairList &pairs, const Cell *cell, const mlff_results &results, int threads);
  // Makes those of the pairs that are closer than the cutoff the edges of this evaluation.
  void select_edges(const double *positions, const PairList &pairs, const Cell *cell, int threads);
  void run_stages(const std::vector<Stage> &stages, bool backward, int threads);
  void *pointer(const Argument &argument) const;
  void collect_energy(const mlff_results &results) const;
  void collect_gradient(const mlff_results &results, int threads);

  int64_t n_edges_ = 0;
  std::optional<PairList> given_, found_;
  std::vector<double> found_positions_;
  Cell found_cell_;
  std::unique_ptr<CpuSystem> single_;  // evaluates the structures of a batch one after the other

  // Inputs and results of the plan, by edge and by atom.
  Scratch<int64_t> offsets_, kept_;
  Scratch<int32_t> neighbors_;
  Scratch<double> distance_, vectors_, atom_energy_, gradient_, grade_, partial_;
  Scratch<float> unit_;
  std::vector<Scratch<std::byte>> buffers_;
};

}  // namespace mlff
