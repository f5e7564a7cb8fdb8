// One simulation with a model on the CPU: atoms, neighbour list, workspace, and the evaluation of the plan.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "memory.h"
#include "mlff.h"
#include "model.h"
#include "neighbors.h"

namespace mlff {

// The functions of mlff.h, whose documentation holds here; they throw Error instead of returning a status.
class System {
 public:
  System(std::shared_ptr<const Model> model, const std::string &device);

  void set_threads(int32_t n_threads);
  void set_atoms(int64_t n_local, int64_t n_total, const int32_t *species);
  void set_images(const int32_t *originals);
  void set_neighbors(const int64_t *offsets, const int32_t *neighbors);
  void set_exchange(mlff_exchange_fn exchange, void *user);
  void compute(const double *positions, const mlff_results &results);
  void compute_periodic(const double *positions, const double *cell, const int32_t *pbc, const mlff_results &results);
  void edges(int64_t *n_edges, int32_t *centers, int32_t *neighbors, double *vectors) const;
  size_t bytes() const;

 private:
  void check_ready(const double *positions) const;
  // Own pair list with a skin, searched again when an atom has moved half the skin or the cell has changed.
  const PairList &find(const double *positions, const Cell &cell, int threads);
  void evaluate(const double *positions, const PairList &pairs, const Cell *cell, const mlff_results &results, int threads);
  // Makes those of the pairs that are closer than the cutoff the edges of this evaluation.
  void select_edges(const double *positions, const PairList &pairs, const Cell *cell, int threads);
  void run_stages(bool backward, int threads);
  void *pointer(const Argument &argument) const;
  void collect_energy(const mlff_results &results) const;
  void collect_gradient(const mlff_results &results, int threads);

  std::shared_ptr<const Model> model_;
  int32_t threads_ = 0;
  int64_t n_local_ = 0, n_total_ = 0, n_edges_ = 0;
  bool has_atoms_ = false;  // whether set_atoms has been called
  bool evaluated_ = false;  // whether the edges are those of a successful evaluation
  std::vector<int32_t> species_;
  std::vector<int32_t> originals_;  // as set by set_images; empty: no row is an image
  bool foreign_ghosts_ = false;     // whether there are ghosts that are not images
  mlff_exchange_fn exchange_ = nullptr;
  void *user_ = nullptr;

  std::optional<PairList> given_, found_;
  std::vector<double> found_positions_;
  Cell found_cell_;

  // Inputs and results of the plan, by edge and by atom.
  Scratch<int64_t> offsets_, kept_;
  Scratch<int32_t> neighbors_;
  Scratch<double> distance_, vectors_, atom_energy_, gradient_, partial_;
  Scratch<float> unit_;
  std::vector<Scratch<std::byte>> buffers_;
};

}  // namespace mlff
