#include "cpu/system.h"

#include <algorithm>
#include <cmath>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "error.h"

namespace mlff {
namespace {

constexpr double kSkin = 1.0;         // Angstrom, of the core's own pair lists

int default_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// x_j + shift - x_i, computed so that the reverse pair gives the same vector reversed, to the last bit.
inline std::array<double, 3> edge_vector(const double *positions, const PairList &pairs, const Cell *cell, int64_t i,
                                         int64_t pair) {
  const int64_t j = pairs.neighbors[pair];
  std::array<double, 3> r;
  for (int a = 0; a < 3; a++) {
    r[a] = positions[3 * j + a] - positions[3 * i + a];
    if (cell) {
      const auto &shift = pairs.shifts[pair];
      r[a] += shift[0] * cell->vectors[0][a] + shift[1] * cell->vectors[1][a] + shift[2] * cell->vectors[2][a];
    }
  }
  return r;
}

inline double length(const std::array<double, 3> &r) { return std::sqrt(r[0] * r[0] + r[1] * r[1] + r[2] * r[2]); }

}  // namespace

CpuSystem::CpuSystem(std::shared_ptr<const Model> model) : System(std::move(model)), buffers_(model_->plan.buffers.size()) {}

void CpuSystem::atoms_changed() { given_.reset(), found_.reset(); }

void CpuSystem::set_neighbors(const int64_t *offsets, const int32_t *neighbors) {
  if (!offsets && n_local_ > 0) fail(MLFF_ERROR_INPUT, "set_neighbors needs offsets, got NULL");
  int64_t n = 0;
  for (int64_t i = 0; i < n_local_; i++) {
    if (offsets[0] != 0 || offsets[i + 1] < offsets[i])
      fail(MLFF_ERROR_INPUT, "the offsets of the neighbour list must start at 0 and never decrease; they do at atom %lld",
           (long long)i);
    n = offsets[i + 1];
  }
  if (n > 0 && !neighbors) fail(MLFF_ERROR_INPUT, "set_neighbors needs %lld neighbours, got NULL", (long long)n);
  for (int64_t i = 0; i < n_local_; i++)
    for (int64_t e = offsets[i]; e < offsets[i + 1]; e++)
      if (neighbors[e] < 0 || neighbors[e] >= n_total_ || neighbors[e] == i)
        fail(MLFF_ERROR_INPUT, "atom %lld has the neighbour %d; neighbours must be other atoms, 0 to %lld", (long long)i,
             neighbors[e], (long long)n_total_ - 1);
  given_.reset();
  evaluated_ = false;
  with_memory(n_total_, n, [&] {
    PairList list;
    list.offsets.assign(1, 0);
    if (n_local_ > 0) list.offsets.assign(offsets, offsets + n_local_ + 1);
    if (n > 0) list.neighbors.assign(neighbors, neighbors + n);
    given_ = std::move(list);
  });
}

void CpuSystem::compute(const double *positions, const mlff_results &results) {
  evaluated_ = false;
  check_ready(positions);
  check_one_structure("compute");
  if (!given_) fail(MLFF_ERROR_INPUT, "compute needs a neighbour list: call set_neighbors after set_atoms");
  const int threads = threads_ ? threads_ : default_threads();
  with_memory(n_total_, n_edges_, [&] { evaluate(positions, *given_, nullptr, results, threads); });
}

void CpuSystem::compute_periodic(const double *positions, const double *cell, const int32_t *pbc, const mlff_results &results) {
  evaluated_ = false;
  check_ready(positions);
  check_no_ghosts("compute_periodic");
  check_one_structure("compute_periodic");
  const Cell box = make_cell(cell, pbc, model_->cutoff);
  const int threads = threads_ ? threads_ : default_threads();
  with_memory(n_total_, n_edges_, [&] { evaluate(positions, find(positions, box, threads), &box, results, threads); });
}

void CpuSystem::compute_batch(const double *positions, const double *cells, const int32_t *pbcs, const mlff_results &results) {
  evaluated_ = false;
  check_ready(positions);
  check_no_ghosts("compute_batch");
  if (!single_) single_ = std::make_unique<CpuSystem>(model_);
  single_->threads_ = threads_;
  for (int32_t b = 0; b < n_structures(); b++) {
    const int64_t start = starts_[b], n = starts_[b + 1] - start;
    const auto at = [](double *p, int64_t offset) { return p ? p + offset : nullptr; };
    const mlff_results part{at(results.energy, b), at(results.atom_energy, start), at(results.forces, 3 * start),
                            at(results.virial, 6 * b), at(results.atom_virial, 6 * start),
                            at(results.extrapolation_grade, start)};
    try {
      single_->set_atoms(n, n, species_.data() + start);
      single_->compute_periodic(positions + 3 * start, cells ? cells + 9 * b : nullptr, pbcs ? pbcs + 3 * b : nullptr, part);
    } catch (const Error &e) {
      fail(e.status, "structure %d, which begins with atom %lld: %s", b, (long long)start, e.what());
    }
  }
}

void CpuSystem::compute_device(const mlff_device_arrays &) {
  fail(MLFF_ERROR_INPUT, "compute_device needs a system on a GPU; this one is on the device \"cpu\"");
}

const PairList &CpuSystem::find(const double *positions, const Cell &cell, int threads) {
  bool reuse = found_ && found_cell_ == cell;
  for (int64_t i = 0; reuse && i < n_total_; i++) {
    double moved = 0.0;
    for (int a = 0; a < 3; a++) moved += std::pow(positions[3 * i + a] - found_positions_[3 * i + a], 2);
    reuse = moved < 0.25 * kSkin * kSkin;
  }
  if (!reuse) {
    found_.reset();
    found_positions_.assign(positions, positions + 3 * n_total_);
    found_cell_ = cell;
    found_ = find_pairs(positions, species_.data(), n_total_, cell, model_->cutoff + kSkin, threads);
  }
  return *found_;
}

void CpuSystem::select_edges(const double *positions, const PairList &pairs, const Cell *cell, [[maybe_unused]] int threads) {
  const double cutoff = model_->cutoff;
  int64_t *offsets = offsets_.resize(n_local_ + 1), *kept = kept_.resize(pairs.offsets[n_local_]);
  offsets[0] = 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < n_local_; i++) {
    int64_t n = 0;
    for (int64_t pair = pairs.offsets[i]; species_[i] >= 0 && pair < pairs.offsets[i + 1]; pair++) {
      if (species_[pairs.neighbors[pair]] < 0) continue;
      const double d = length(edge_vector(positions, pairs, cell, i, pair));
      if (d < cutoff) kept[pairs.offsets[i] + n++] = pair;
      if (d < kCoincident) {
        n = -pair - 1;  // reported below: an exception must not leave a parallel region
        break;
      }
    }
    offsets[i + 1] = n;
  }
  for (int64_t i = 0; i < n_local_; i++) {
    if (offsets[i + 1] < 0) fail_coincident(i, pairs.neighbors[-offsets[i + 1] - 1]);
    offsets[i + 1] += offsets[i];
  }

  n_edges_ = offsets[n_local_];
  int32_t *neighbors = neighbors_.resize(n_edges_);
  double *distance = distance_.resize(n_edges_), *vectors = vectors_.resize(3 * n_edges_);
  float *unit = unit_.resize(3 * n_edges_);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < n_local_; i++)
    for (int64_t e = offsets[i]; e < offsets[i + 1]; e++) {
      const int64_t pair = kept[pairs.offsets[i] + e - offsets[i]];
      const auto r = edge_vector(positions, pairs, cell, i, pair);
      const double d = length(r);
      neighbors[e] = originals_.empty() ? pairs.neighbors[pair] : originals_[pairs.neighbors[pair]];
      distance[e] = d;
      for (int a = 0; a < 3; a++) vectors[3 * e + a] = r[a], unit[3 * e + a] = float(r[a] / d);
    }
}

void CpuSystem::evaluate(const double *positions, const PairList &pairs, const Cell *cell, const mlff_results &results,
                         int threads) {
  const bool backward = results.forces || results.virial || results.atom_virial;
  check_exchange(model_->plan.exchanges(backward));
  check_grade(results);
  select_edges(positions, pairs, cell, threads);
  std::fill_n(atom_energy_.resize(n_local_), n_local_, 0.0);
  if (backward) std::fill_n(gradient_.resize(3 * n_edges_), 3 * n_edges_, 0.0);
  const auto &buffers = model_->plan.buffers;
  for (size_t b = 0; b < buffers.size(); b++) {
    if (!backward && !buffers[b].forward) continue;
    const int64_t rows = buffers[b].rows == Rows::local ? n_local_ : buffers[b].rows == Rows::total ? n_total_ : n_edges_;
    if (rows > INT64_MAX / (buffers[b].width * 16)) throw std::bad_alloc();
    buffers_[b].resize(std::max<int64_t>(1, rows) * buffers[b].width * int64_t(dtype_size(buffers[b].dtype)));
  }
  run_stages(model_->plan.stages, backward, threads);
  collect_energy(results);
  if (backward) collect_gradient(results, threads);
  if (results.extrapolation_grade) {
    grade_.resize(n_local_);
    run_stages(model_->plan.grade, backward, threads);
    std::copy_n(grade_.data(), n_local_, results.extrapolation_grade);
  }
  evaluated_ = true;
}

void *CpuSystem::pointer(const Argument &argument) const {
  if (argument.kind == Argument::buffer) return buffers_[argument.index].data();
  if (argument.kind == Argument::tensor) return argument.constant->data;
  switch (Input(argument.index)) {
    case Input::species: return const_cast<int32_t *>(species_.data());
    case Input::offsets: return offsets_.data();
    case Input::neighbors: return neighbors_.data();
    case Input::distance: return distance_.data();
    case Input::unit: return unit_.data();
    case Input::atom_energy: return atom_energy_.data();
    case Input::gradient: return gradient_.data();
    case Input::grade: return grade_.data();
  }
  return nullptr;
}

void CpuSystem::run_stages(const std::vector<Stage> &stages, bool backward, int threads) {
  std::vector<void *> args;
  for (const Stage &stage : stages) {
    if (stage.backward && !backward) break;
    args.clear();
    for (const Argument &argument : stage.args) args.push_back(pointer(argument));
    if (stage.kernel) {
      stage.kernel->run({args.data(), stage.letters.data(), n_local_, n_total_, n_edges_, threads});
    } else {
      exchange(static_cast<float *>(args[0]), int32_t(2 * stage.letters['W' - 'A']));
    }
  }
}

void CpuSystem::collect_energy(const mlff_results &results) const {
  double energy = 0.0;
  for (int64_t i = 0; i < n_local_; i++) {
    if (!std::isfinite(atom_energy_[i]))
      fail(MLFF_ERROR_INPUT, "the energy of atom %lld is not finite: the structure is outside what the model can evaluate",
           (long long)i);
    energy += atom_energy_[i];
  }
  if (results.energy) *results.energy = energy;
  if (results.atom_energy) std::copy_n(atom_energy_.data(), n_local_, results.atom_energy);
}

namespace {

// Calls body(t, begin, end) for one range of atoms per thread. The ranges depend on `threads` alone, so sums over them are
// reproducible.
template <class Body>
void for_ranges(int64_t n, int threads, Body &&body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; t++) body(t, n * t / threads, n * (t + 1) / threads);
}

}  // namespace

void CpuSystem::collect_gradient(const mlff_results &results, int threads) {
  threads = int(std::clamp<int64_t>(n_local_ / 16, 1, threads));
  const int64_t *offsets = offsets_.data();
  for (int64_t i = 0; i < n_local_; i++)
    for (int64_t e = offsets[i]; e < offsets[i + 1]; e++)
      if (!std::isfinite(gradient_[3 * e] + gradient_[3 * e + 1] + gradient_[3 * e + 2]))
        fail(MLFF_ERROR_INPUT,
             "the force between atoms %lld and %d, %.3g Angstrom apart, is not finite: the structure is outside what the model can "
             "evaluate",
             (long long)i, neighbors_[e], distance_[e]);

  // Adds W numbers of every edge to its centre and, times `sign`, to its neighbour: one table per range of centres, summed in
  // order.
  const auto scatter = [&]<int W>(double *out, double sign, auto &&of_edge) {
    double *partial = partial_.resize((threads - 1) * n_total_ * W);
    for_ranges(n_local_, threads, [&](int t, int64_t begin, int64_t end) {
      double *table = t == 0 ? out : partial + (t - 1) * n_total_ * W;
      std::fill_n(table, n_total_ * W, 0.0);
      for (int64_t i = begin; i < end; i++)
        for (int64_t e = offsets[i]; e < offsets[i + 1]; e++) {
          double value[W];
          of_edge(e, value);
          for (int w = 0; w < W; w++) table[W * i + w] += value[w];
          for (int w = 0; w < W; w++) table[W * int64_t(neighbors_[e]) + w] += sign * value[w];
        }
    });
    for_ranges(n_total_ * W, threads, [&](int, int64_t begin, int64_t end) {
      for (int t = 1; t < threads; t++)
        for (int64_t x = begin; x < end; x++) out[x] += partial[(t - 1) * n_total_ * W + x];
    });
  };
  const auto edge_virial = [&](int64_t e, double factor, double *w) {
    const double *r = vectors_.data() + 3 * e, *g = gradient_.data() + 3 * e;
    for (int a = 0; a < 3; a++) w[a] = -factor * r[a] * g[a];
    w[3] = -0.5 * factor * (r[0] * g[1] + r[1] * g[0]);
    w[4] = -0.5 * factor * (r[0] * g[2] + r[2] * g[0]);
    w[5] = -0.5 * factor * (r[1] * g[2] + r[2] * g[1]);
  };

  if (results.forces)
    scatter.template operator()<3>(results.forces, -1.0,
                                   [&](int64_t e, double *v) { std::copy_n(gradient_.data() + 3 * e, 3, v); });
  if (results.atom_virial)
    scatter.template operator()<6>(results.atom_virial, 1.0, [&](int64_t e, double *v) { edge_virial(e, 0.5, v); });
  if (results.virial) {
    double *partial = partial_.resize(6 * threads);
    for_ranges(n_local_, threads, [&](int t, int64_t begin, int64_t end) {
      double sum[6] = {}, w[6];
      for (int64_t e = offsets[begin]; e < offsets[end]; e++) {
        edge_virial(e, 1.0, w);
        for (int c = 0; c < 6; c++) sum[c] += w[c];
      }
      std::copy_n(sum, 6, partial + 6 * t);
    });
    std::fill_n(results.virial, 6, 0.0);
    for (int t = 0; t < threads; t++)
      for (int c = 0; c < 6; c++) results.virial[c] += partial[6 * t + c];
  }
}

void CpuSystem::edges(int64_t *n_edges, int32_t *centers, int32_t *neighbors, double *vectors) const {
  if (!evaluated_) no_edges();
  if (n_edges) *n_edges = n_edges_;
  for (int64_t i = 0; centers && i < n_local_; i++) std::fill(centers + offsets_[i], centers + offsets_[i + 1], int32_t(i));
  if (neighbors) std::copy_n(neighbors_.data(), n_edges_, neighbors);
  if (vectors) std::copy_n(vectors_.data(), 3 * n_edges_, vectors);
}

size_t CpuSystem::bytes() const {
  size_t bytes = (species_.capacity() + originals_.capacity()) * sizeof(int32_t) + found_positions_.capacity() * sizeof(double);
  for (const auto *list : {&given_, &found_})
    if (*list) bytes += (*list)->bytes();
  for (const auto &buffer : buffers_) bytes += buffer.bytes();
  if (single_) bytes += single_->bytes();
  return bytes + offsets_.bytes() + kept_.bytes() + neighbors_.bytes() + distance_.bytes() + vectors_.bytes() +
         atom_energy_.bytes() + gradient_.bytes() + grade_.bytes() + partial_.bytes() + unit_.bytes();
}

}  // namespace mlff
