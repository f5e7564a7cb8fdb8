/* SPDX-License-Identifier: GPL-2.0-only
   LAMMPS pair style of mlff. Copyright (C) the mlff authors. See pair_mlff.h and LICENSE. */
#ifndef MLFF_DESCRIBE_H
#define MLFF_DESCRIBE_H

#include <string>

// What a model is, from the header of its file (JSON): "ethanol-water, painn, teacher SO3LR", as far as the header says so.
std::string describe_model(const char *header);

#endif
