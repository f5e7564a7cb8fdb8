#include "neighbors.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>

#include "error.h"

namespace mlff {
namespace {

using Vector = std::array<double, 3>;
using Index = std::array<int32_t, 3>;

Vector cross(const Vector &a, const Vector &b) {
  return {a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]};
}
double dot(const Vector &a, const Vector &b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
Vector scaled(const Vector &a, double s) { return {a[0] * s, a[1] * s, a[2] * s}; }
Vector normalized(const Vector &a) { return scaled(a, 1.0 / std::sqrt(dot(a, a))); }

// The axis that is furthest from a, made orthogonal to it and of unit length.
Vector orthogonal(const Vector &a) {
  int k = 0;
  for (int i = 1; i < 3; i++)
    if (std::abs(a[i]) < std::abs(a[k])) k = i;
  Vector axis{};
  axis[k] = 1.0;
  return normalized(cross(a, axis));
}

// Bins of at least the cutoff's width (a fraction of the cell if that is smaller), found by a sorted list of the occupied ones: its
// memory depends on the number of atoms only, however far apart they are. Few atoms or a small cell are the case of one bin.
class Bins {
 public:
  Bins(const double *positions, const int32_t *species, int64_t n, const Cell &cell, double cutoff)
      : cell_(cell), wraps_(n), bin_(n), place_(n) {
    const Basis basis(cell);
    std::vector<Vector> fractions(n);
    Vector low{}, high{};
    low.fill(std::numeric_limits<double>::infinity());
    high.fill(-std::numeric_limits<double>::infinity());
    for (int64_t i = 0; i < n; i++) {
      if (species[i] < 0) continue;
      const Vector x = {positions[3 * i], positions[3 * i + 1], positions[3 * i + 2]};
      for (int k = 0; k < 3; k++) {
        double f = dot(basis.inverse[k], x);
        if (cell.periodic[k]) {
          const double wrap = std::floor(f);
          if (!(std::abs(wrap) < 1e8))
            fail(MLFF_ERROR_INPUT, "atom %lld is %.3g cells outside the periodic cell; wrap the positions into the cell",
                 (long long)i, wrap);
          wraps_[i][k] = int32_t(wrap);
          f = std::min(f - wrap, 1.0 - 1e-16);
        } else if (!(std::abs(f) < 1e15)) {
          fail(MLFF_ERROR_INPUT, "atom %lld is %.3g Angstrom from the origin; positions must stay within 1e15", (long long)i, f);
        }
        fractions[i][k] = f;
        low[k] = std::min(low[k], f), high[k] = std::max(high[k], f);
      }
      atoms_.push_back(int32_t(i));
    }
    for (int k = 0; k < 3; k++) {
      // Fractional coordinates of open directions are lengths, because their vectors are of unit length.
      const double origin = cell.periodic[k] ? 0.0 : low[k], extent = cell.periodic[k] ? 1.0 : high[k] - low[k];
      const double fit = atoms_.size() < kAllPairs ? 1.0 : std::floor(extent * basis.height[k] / cutoff);
      count_[k] = int64_t(std::clamp(fit, 1.0, double(kMaxBins)));
      const double width = extent * basis.height[k] / double(count_[k]);
      reach_[k] = cell.periodic[k] || count_[k] > 1 ? int64_t(std::ceil(cutoff / width * (1.0 - 1e-12))) : 0;
      for (int32_t i : atoms_) {
        const double position = extent > 0 ? (fractions[i][k] - origin) / extent * double(count_[k]) : 0.0;
        bin_[i][k] = int32_t(std::clamp<double>(std::floor(position), 0.0, double(count_[k] - 1)));
      }
    }
    std::sort(atoms_.begin(), atoms_.end(),
              [&](int32_t i, int32_t j) { return std::pair(key(bin_[i]), i) < std::pair(key(bin_[j]), j); });
    for (auto &axis : wrapped_) axis.resize(atoms_.size());
    for (size_t m = 0; m < atoms_.size(); m++) {
      const int32_t i = atoms_[m];
      place_[i] = int64_t(m);
      for (int a = 0; a < 3; a++) wrapped_[a][m] = positions[3 * i + a] - translation(wraps_[i], a);
      if (m == 0 || key(bin_[i]) != keys_.back()) keys_.push_back(key(bin_[i])), starts_.push_back(int64_t(m));
    }
    starts_.push_back(int64_t(atoms_.size()));
  }

  // Some atoms in bin order, and where they are as seen from the atom i that asks.
  struct Candidates {
    int64_t size, self;             // self: the entry that is the atom i, or -1
    const double *x, *y, *z;        // wrapped into the cell
    double from_x, from_y, from_z;  // to be subtracted
    const int32_t *atoms;
    Index image;  // cells by which they are moved, all wrapped

    bool closer(int64_t m, double squared) const {
      const double dx = x[m] - from_x, dy = y[m] - from_y, dz = z[m] - from_z;
      return dx * dx + dy * dy + dz * dz < squared;
    }
  };

  // Calls body(candidates) until all atoms and images within the cutoff of atom i have been among them, each once.
  template <class Body>
  void for_candidates(int64_t i, Body &&body) const {
    int64_t d[3];
    for (d[0] = -reach_[0]; d[0] <= reach_[0]; d[0]++)
      for (d[1] = -reach_[1]; d[1] <= reach_[1]; d[1]++)
        for (d[2] = -reach_[2]; d[2] <= reach_[2]; d[2]++) {
          Index bin, image;
          bool exists = true;
          for (int k = 0; k < 3; k++) {
            const int64_t b = bin_[i][k] + d[k], turns = b >= 0 ? b / count_[k] : -((count_[k] - 1 - b) / count_[k]);
            exists = exists && (turns == 0 || cell_.periodic[k]);
            bin[k] = int32_t(b - turns * count_[k]);
            image[k] = int32_t(turns);
          }
          if (!exists) continue;
          const auto it = std::lower_bound(keys_.begin(), keys_.end(), key(bin));
          if (it == keys_.end() || *it != key(bin)) continue;
          const int64_t start = starts_[it - keys_.begin()], end = starts_[it - keys_.begin() + 1], place = place_[i];
          body(Candidates{end - start, image == Index{} && place >= start && place < end ? place - start : -1, &wrapped_[0][start],
                          &wrapped_[1][start], &wrapped_[2][start], wrapped_[0][place] - translation(image, 0),
                          wrapped_[1][place] - translation(image, 1), wrapped_[2][place] - translation(image, 2), &atoms_[start],
                          image});
        }
  }

  // Cells to subtract from an atom's position to bring it into the cell.
  const Index &wrap(int64_t i) const { return wraps_[i]; }

 private:
  static constexpr int64_t kMaxBins = 1 << 20;
  static constexpr size_t kAllPairs = 48;  // atoms below which bins cost more than they save

  static uint64_t key(const Index &bin) { return (uint64_t(bin[0]) << 40) | (uint64_t(bin[1]) << 20) | uint64_t(bin[2]); }

  double translation(const Index &cells, int axis) const {
    double x = 0.0;
    for (int k = 0; k < 3; k++)
      if (cell_.periodic[k]) x += cells[k] * cell_.vectors[k][axis];
    return x;
  }

  const Cell &cell_;
  std::vector<Index> wraps_, bin_;
  std::vector<int64_t> place_;                  // of an atom in bin order
  std::vector<int32_t> atoms_;                  // in bin order
  std::array<std::vector<double>, 3> wrapped_;  // positions in bin order
  std::array<int64_t, 3> count_, reach_;
  std::vector<uint64_t> keys_;  // of the occupied bins, ascending
  std::vector<int64_t> starts_;
};

}  // namespace

Basis::Basis(const Cell &cell) {
  int periodic[3], open[3], n_periodic = 0, n_open = 0;
  for (int k = 0; k < 3; k++) (cell.periodic[k] ? periodic[n_periodic++] : open[n_open++]) = k;
  for (int n = 0; n < n_periodic; n++) vectors[periodic[n]] = cell.vectors[periodic[n]];
  if (n_periodic == 0) vectors = {Vector{1, 0, 0}, Vector{0, 1, 0}, Vector{0, 0, 1}};
  if (n_periodic == 1) {
    const Vector axis = normalized(vectors[periodic[0]]);
    vectors[open[0]] = orthogonal(axis);
    vectors[open[1]] = cross(axis, vectors[open[0]]);
  }
  if (n_periodic == 2) vectors[open[0]] = normalized(cross(vectors[periodic[0]], vectors[periodic[1]]));
  const double volume = dot(vectors[0], cross(vectors[1], vectors[2]));
  for (int k = 0; k < 3; k++) {
    const Vector normal = cross(vectors[(k + 1) % 3], vectors[(k + 2) % 3]);
    inverse[k] = scaled(normal, 1.0 / volume);
    height[k] = std::abs(volume) / std::sqrt(dot(normal, normal));
  }
}

Cell make_cell(const double *cell, const int32_t *pbc, double cutoff) {
  Cell result;
  for (int k = 0; k < 3; k++) result.periodic[k] = pbc && pbc[k];
  for (int k = 0; k < 3; k++) {
    if (!result.periodic[k]) continue;
    if (!cell) fail(MLFF_ERROR_INPUT, "direction %d is periodic, but there is no cell; give the cell vectors", k);
    for (int a = 0; a < 3; a++) {
      if (!std::isfinite(cell[3 * k + a]))
        fail(MLFF_ERROR_INPUT, "cell vector %d is not finite (component %d is %g)", k, a, cell[3 * k + a]);
      result.vectors[k][a] = cell[3 * k + a];
    }
    const double length = std::sqrt(dot(result.vectors[k], result.vectors[k]));
    if (!(length > 1e-6 && length < 1e12))
      fail(MLFF_ERROR_INPUT, "cell vector %d has the length %g Angstrom, but that direction is periodic", k, length);
  }
  const Basis basis(result);
  for (int k = 0; k < 3; k++) {
    if (!result.periodic[k]) continue;
    const double length = std::sqrt(dot(result.vectors[k], result.vectors[k]));
    if (!(basis.height[k] > 1e-9 * length))
      fail(MLFF_ERROR_INPUT, "the cell is singular: its periodic vectors are not linearly independent");
    if (basis.height[k] < cutoff / kMaxImages)
      fail(MLFF_ERROR_INPUT,
           "the cell is %.4g Angstrom high along direction %d; the smallest height allowed is %.4g (the cutoff / %d)",
           basis.height[k], k, cutoff / kMaxImages, kMaxImages);
  }
  return result;
}

PairList find_pairs(const double *positions, const int32_t *species, int64_t n, const Cell &cell, double cutoff,
                    [[maybe_unused]] int threads) {
  struct Pair {
    int32_t j;
    Index shift;
    auto operator<=>(const Pair &) const = default;
  };
  constexpr int64_t kBlock = 64;  // atoms whose pairs are collected together
  const Bins bins(positions, species, n, cell, cutoff);
  std::vector<std::vector<Pair>> blocks((n + kBlock - 1) / kBlock);
  PairList pairs;
  pairs.offsets.assign(n + 1, 0);
  std::atomic<bool> out_of_memory = false;  // an exception must not leave a parallel region
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (size_t b = 0; b < blocks.size(); b++) try {
      auto &found = blocks[b];
      for (int64_t i = int64_t(b) * kBlock; i < std::min(n, int64_t(b + 1) * kBlock); i++) {
        const size_t first = found.size();
        if (species[i] >= 0)
          bins.for_candidates(i, [&](const Bins::Candidates &c) {
            for (int64_t m = 0; m < c.size; m++)
              if (c.closer(m, cutoff * cutoff) && m != c.self) {
                const int32_t j = c.atoms[m];
                const Index &wi = bins.wrap(i), &wj = bins.wrap(j);
                found.push_back({j, {c.image[0] + wi[0] - wj[0], c.image[1] + wi[1] - wj[1], c.image[2] + wi[2] - wj[2]}});
              }
          });
        std::sort(found.begin() + int64_t(first), found.end());
        pairs.offsets[i + 1] = int64_t(found.size() - first);
      }
    } catch (const std::bad_alloc &) {
      out_of_memory = true;
    }
  if (out_of_memory) throw std::bad_alloc();

  for (int64_t i = 0; i < n; i++) pairs.offsets[i + 1] += pairs.offsets[i];
  pairs.neighbors.reserve(pairs.offsets[n]);
  pairs.shifts.reserve(pairs.offsets[n]);
  for (auto &found : blocks) {
    for (const Pair &pair : found) pairs.neighbors.push_back(pair.j), pairs.shifts.push_back(pair.shift);
    std::vector<Pair>().swap(found);
  }
  return pairs;
}

}  // namespace mlff
