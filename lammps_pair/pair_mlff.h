/* SPDX-License-Identifier: GPL-2.0-only
   LAMMPS pair style of mlff. Copyright (C) the mlff authors.

   This program is free software; you can redistribute it and/or modify it under the terms of the GNU General Public License,
   version 2, as published by the Free Software Foundation. It is distributed WITHOUT ANY WARRANTY; see the file LICENSE beside
   this one. LAMMPS itself is free software under the same licence. */

// pair_style mlff model.pt [device auto|cpu|cuda|cuda:N] [check yes|no]
// pair_coeff * * O H          (an element, or NULL, for each atom type)
//
// A thin skin over the C interface plugin/mlff.h: it hands over atoms, neighbours and positions, converts units, and fills the
// ghost rows of the model's features with LAMMPS's forward communication, so that any number of ranks needs ghosts of one cutoff only.
//
// On a GPU the core finds the pairs by itself, so LAMMPS builds no list. One rank alone hands over its own atoms and the box;
// several hand over their ghosts, too. Ranks of a node take its GPUs in turns.
#ifdef PAIR_CLASS
// clang-format off
PairStyle(mlff,PairMLFF);
// clang-format on
#else

#ifndef LMP_PAIR_MLFF_H
#define LMP_PAIR_MLFF_H

#include "pair.h"

#include <memory>
#include <string>

namespace LAMMPS_NS {

class PairMLFF : public Pair {
 public:
  PairMLFF(class LAMMPS *);
  ~PairMLFF() override;

  void settings(int, char **) override;
  void coeff(int, char **) override;
  void init_style() override;
  double init_one(int, int) override;
  void compute(int, int) override;

  int pack_forward_comm(int, int *, double *, int, int *) override;
  void unpack_forward_comm(int, int, double *) override;
  double memory_usage() override;

 private:
  struct Core;    // the model, its workspace and the arrays that are kept between steps
  std::unique_ptr<Core> core;

  void load(const char *);
  std::string choose_device();
  int make_system();
  std::string problem_of_any(int);
  void fall_back(const std::string &);
  void check_hybrid();
  void self_check();
  void update_neighbors();
  int set_neighbors();
  void find_originals();
  void refuse_excluded_pairs();
  [[noreturn]] void report_failure();
  static int exchange(void *, float *, int);
};

}    // namespace LAMMPS_NS

#endif
#endif
