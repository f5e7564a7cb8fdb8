#include "system.h"

#include <algorithm>
#include <cmath>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "error.h"

namespace mlff {
namespace {

constexpr double kSkin = 1.0;         // Angstrom, of the core's own pair lists
constexpr double kCoincident = 1e-6;  // Angstrom, below which two atoms have no direction between them
constexpr int32_t kMaxThreads = 1024;

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

// Turns a failed allocation into an error that names the size of the system.
template <class Body>
void with_memory(int64_t n_atoms, const int64_t &n_edges, Body &&body) {
  try {
    body();
  } catch (const std::bad_alloc &) {
    fail(MLFF_ERROR_RESOURCE, "out of memory for %lld atoms and %lld edges; use a smaller system or more ranks", (long long)n_atoms,
         (long long)n_edges);
  }
}

}  // namespace

System::System(std::shared_ptr<const Model> model, const std::string &device)
    : model_(std::move(model)), buffers_(model_->plan.buffers.size()) {
  if (device != "cpu")
    fail(MLFF_ERROR_RESOURCE, "there is no device \"%s\"; this build of mlff computes on \"cpu\"", device.substr(0, 80).c_str());
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
      fail(MLFF_ERROR_INPUT, "atom %lld has species %d; the model's species are 0 to %d, or -1 for an atom to ignore", (long long)i,
           species[i], n_species - 1);
  with_memory(n_total, n_edges_, [&] { species_.reserve(n_total); });
  species_.assign(species, species + n_total);
  n_local_ = n_local, n_total_ = n_total;
  originals_.clear();
  foreign_ghosts_ = n_total > n_local;
  has_atoms_ = true;
  given_.reset(), found_.reset();
  evaluated_ = false;
}

void System::set_images(const int32_t *originals) {
  if (n_total_ > 0 && !originals) fail(MLFF_ERROR_INPUT, "set_images needs the originals of %lld atoms, got NULL", (long long)n_total_);
  bool foreign = false;
  for (int64_t k = 0; k < n_total_; k++) {
    const int32_t first = originals[k];
    if (first < 0 || first > k || originals[first] != first || species_[first] != species_[k] || (k < n_local_ && first != k))
      fail(MLFF_ERROR_INPUT, "atom %lld has the original %d; it must be the first row of the same atom, and of a local atom itself",
           (long long)k, first);
    foreign |= k >= n_local_ && first == k;
  }
  with_memory(n_total_, n_edges_, [&] { originals_.assign(originals, originals + n_total_); });
  foreign_ghosts_ = foreign;
  evaluated_ = false;
}

void System::set_neighbors(const int64_t *offsets, const int32_t *neighbors) {
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

void System::set_exchange(mlff_exchange_fn exchange, void *user) {
  exchange_ = exchange;
  user_ = user;
}

void System::check_ready(const double *positions) const {
  if (!has_atoms_) fail(MLFF_ERROR_INPUT, "the system has no atoms yet: call set_atoms before computing");
  if (n_total_ > 0 && !positions) fail(MLFF_ERROR_INPUT, "the positions of %lld atoms are needed, got NULL", (long long)n_total_);
  for (int64_t i = 0; i < 3 * n_total_; i++)
    if (!std::isfinite(positions[i]))
      fail(MLFF_ERROR_INPUT, "the position of atom %lld is not finite (%c = %g)", (long long)i / 3, "xyz"[i % 3], positions[i]);
}

void System::compute(const double *positions, const mlff_results &results) {
  evaluated_ = false;
  check_ready(positions);
  if (!given_) fail(MLFF_ERROR_INPUT, "compute needs a neighbour list: call set_neighbors after set_atoms");
  const int threads = threads_ ? threads_ : default_threads();
  with_memory(n_total_, n_edges_, [&] { evaluate(positions, *given_, nullptr, results, threads); });
}

void System::compute_periodic(const double *positions, const double *cell, const int32_t *pbc, const mlff_results &results) {
  evaluated_ = false;
  check_ready(positions);
  if (n_total_ != n_local_)
    fail(MLFF_ERROR_INPUT, "compute_periodic finds its own images: %lld atoms were set as ghosts, none are allowed",
         (long long)(n_total_ - n_local_));
  const Cell box = make_cell(cell, pbc, model_->cutoff);
  const int threads = threads_ ? threads_ : default_threads();
  with_memory(n_total_, n_edges_, [&] { evaluate(positions, find(positions, box, threads), &box, results, threads); });
}

const PairList &System::find(const double *positions, const Cell &cell, int threads) {
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

void System::select_edges(const double *positions, const PairList &pairs, const Cell *cell, [[maybe_unused]] int threads) {
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
    if (offsets[i + 1] < 0)
      fail(MLFF_ERROR_INPUT, "atoms %lld and %d are at the same place (closer than %g Angstrom); move one of them", (long long)i,
           pairs.neighbors[-offsets[i + 1] - 1], kCoincident);
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

void System::evaluate(const double *positions, const PairList &pairs, const Cell *cell, const mlff_results &results, int threads) {
  const bool backward = results.forces || results.virial || results.atom_virial;
  if (foreign_ghosts_ && !exchange_ && model_->plan.exchanges(backward))
    fail(MLFF_ERROR_EXCHANGE, "the system has %lld ghosts, and the model's message layers need their features: call set_exchange",
         (long long)(n_total_ - n_local_));
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
  run_stages(backward, threads);
  collect_energy(results);
  if (backward) collect_gradient(results, threads);
  evaluated_ = true;
}

void *System::pointer(const Argument &argument) const {
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
  }
  return nullptr;
}

void System::run_stages(bool backward, int threads) {
  std::vector<void *> args;
  for (const Stage &stage : model_->plan.stages) {
    if (stage.backward && !backward) break;
    args.clear();
    for (const Argument &argument : stage.args) args.push_back(pointer(argument));
    if (stage.kernel) {
      stage.kernel->run({args.data(), stage.letters.data(), n_local_, n_total_, n_edges_, threads});
    } else if (exchange_) {
      // Every rank takes part, also one that has no atoms: the others wait for it.
      if (const int rc = exchange_(user_, static_cast<float *>(args[0]), int32_t(2 * stage.letters['W' - 'A'])))
        fail(MLFF_ERROR_EXCHANGE, "the exchange of ghost features failed: the callback returned %d", rc);
    }
  }
}

void System::collect_energy(const mlff_results &results) const {
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

void System::collect_gradient(const mlff_results &results, int threads) {
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

void System::edges(int64_t *n_edges, int32_t *centers, int32_t *neighbors, double *vectors) const {
  if (!evaluated_)
    throw Error(MLFF_ERROR_INPUT,
                "there are no edges: the system has not been evaluated since it was set up, or the last evaluation failed");
  if (n_edges) *n_edges = n_edges_;
  for (int64_t i = 0; centers && i < n_local_; i++) std::fill(centers + offsets_[i], centers + offsets_[i + 1], int32_t(i));
  if (neighbors) std::copy_n(neighbors_.data(), n_edges_, neighbors);
  if (vectors) std::copy_n(vectors_.data(), 3 * n_edges_, vectors);
}

size_t System::bytes() const {
  size_t bytes = (species_.capacity() + originals_.capacity()) * sizeof(int32_t) + found_positions_.capacity() * sizeof(double);
  for (const auto *list : {&given_, &found_})
    if (*list) bytes += (*list)->bytes();
  for (const auto &buffer : buffers_) bytes += buffer.bytes();
  return bytes + offsets_.bytes() + kept_.bytes() + neighbors_.bytes() + distance_.bytes() + vectors_.bytes() +
         atom_energy_.bytes() + gradient_.bytes() + partial_.bytes() + unit_.bytes();
}

}  // namespace mlff
