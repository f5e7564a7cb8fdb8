// Neighbour search in double precision: any triclinic cell, any periodic directions, cells smaller than the cutoff.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace mlff {

// Periodic directions of a system. Vectors of directions that are not periodic do not matter.
struct Cell {
  std::array<std::array<double, 3>, 3> vectors{};
  std::array<bool, 3> periodic{};
  bool operator==(const Cell &) const = default;
};

// Three vectors that span space: the cell's in periodic directions, orthogonal unit vectors in the others.
struct Basis {
  std::array<std::array<double, 3>, 3> vectors, inverse;  // inverse[k] . x is the k-th fractional coordinate
  std::array<double, 3> height;                           // distance between the faces of direction k

  explicit Basis(const Cell &cell);
};

// Directed pairs, sorted by centre i, then neighbour j, then shift: those of i are offsets[i] .. offsets[i + 1] - 1.
struct PairList {
  std::vector<int64_t> offsets;
  std::vector<int32_t> neighbors;
  std::vector<std::array<int32_t, 3>> shifts;  // of cell vectors, added to x_j; empty: no shifts

  size_t bytes() const {
    return offsets.capacity() * sizeof(offsets[0]) + neighbors.capacity() * sizeof(neighbors[0]) +
           shifts.capacity() * sizeof(shifts[0]);
  }
};

// Cell from the caller's arrays (mlff_system_compute_periodic). Throws Error(MLFF_ERROR_INPUT) for a cell that is not finite,
// singular, or so flat that the cutoff spans more than kMaxImages of it.
Cell make_cell(const double *cell, const int32_t *pbc, double cutoff);
constexpr int kMaxImages = 10;

// All pairs with |x_j + shift - x_i| < cutoff (up to rounding) of the atoms whose species is not negative. positions: [n, 3],
// finite. An atom is a neighbour of its own images, not of itself. Throws Error(MLFF_ERROR_INPUT) for an atom absurdly far outside
// the cell.
PairList find_pairs(const double *positions, const int32_t *species, int64_t n, const Cell &cell, double cutoff, int threads);

}  // namespace mlff
