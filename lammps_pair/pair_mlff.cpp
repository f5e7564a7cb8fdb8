/* SPDX-License-Identifier: GPL-2.0-only
   LAMMPS pair style of mlff. Copyright (C) the mlff authors. See pair_mlff.h and LICENSE. */

#include "pair_mlff.h"

#include "../plugin/mlff.h"
#include "describe.h"
#include "elements.h"

#include "atom.h"
#include "comm.h"
#include "domain.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "universe.h"
#include "update.h"
#include "utils.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <regex>
#include <string>
#include <vector>

using namespace LAMMPS_NS;

// e N_A / 4184, exact in the 2019 SI, as in python/mlff/units.py. LAMMPS's own rounded factor (23.060549) differs in the eighth digit,
// which would show in energies of thousands of eV per atom.
static constexpr double KCAL_PER_MOL_PER_EV = 96.48533212331002 / 4.184;

static constexpr char EXCLUDED[] = "a GPU evaluates the model for all pairs of its atoms, also those that neigh_modify exclude names";

// Largest piece of a file that is broadcast at a time: counts in MPI are int.
static constexpr size_t BROADCAST_BYTES = size_t(1) << 30;

struct PairMLFF::Core {
  std::string file, wanted;      // file and device, as the user gave them
  std::string device = "cpu";    // of this rank
  bool gpu() const { return device != "cpu"; }
  bool alone = false;            // on a GPU, and the only rank: the core makes the images, and no ghost is handed over
  bool initialized = false;      // whether init_style() was called
  mlff_model *model = nullptr;
  mlff_system *system = nullptr;
  double energy_unit = 1.0;             // of LAMMPS, per eV
  std::vector<int> species_of_type;     // of the model, -1: NULL
  std::vector<int> atomic_number_of_type;

  // what the core was given at the last update_neighbors()
  int n_local = -1;
  std::vector<int> types;    // [n_total], of one rank on a GPU [n_local]
  std::vector<int32_t> species, originals, neighbors;
  std::vector<std::pair<tagint, int>> rows_by_id;
  std::vector<int64_t> offsets;

  // results, with room for the largest system so far
  std::vector<double> forces, atom_energy, atom_virial;

  // the exchange that is under way
  float *rows = nullptr;
  int width = 0;

  ~Core()
  {
    mlff_system_free(system);
    mlff_model_free(model);
  }
};

/* ---------------------------------------------------------------------- */

PairMLFF::PairMLFF(LAMMPS *lmp) : Pair(lmp)
{
  single_enable = 0;
  restartinfo = 0;    // like all many-body styles: pair_style and pair_coeff are given again after read_restart
  one_coeff = 1;
  manybody_flag = 1;
  reinitflag = 0;
  no_virial_fdotr_compute = 1;
  centroidstressflag = CENTROID_NOTAVAIL;
  unit_convert_flag = utils::get_supported_conversions(utils::ENERGY);
}

PairMLFF::~PairMLFF()
{
  if (allocated) {
    memory->destroy(setflag);
    memory->destroy(cutsq);
  }
}

/* ----------------------------------------------------------------------
   pair_style mlff model.pt [device auto|cpu|cuda|cuda:N] [check yes|no]
------------------------------------------------------------------------- */

void PairMLFF::settings(int narg, char **arg)
{
  if (narg < 1)
    error->all(FLERR, "Pair style mlff needs a model file: pair_style mlff model.pt [device auto|cpu|cuda|cuda:N] [check yes|no]");

  bool check = false;
  std::string device = "auto";
  for (int iarg = 1; iarg < narg; iarg += 2) {
    const std::string keyword = arg[iarg];
    if (keyword != "device" && keyword != "check")
      error->all(FLERR, "Pair style mlff has the keywords device and check, got {}", keyword);
    if (iarg + 1 == narg) error->all(FLERR, "Pair style mlff: keyword {} needs a value", keyword);
    const std::string value = arg[iarg + 1];
    if (keyword == "check")
      check = utils::logical(FLERR, value, false, lmp);
    else if (std::regex_match(value, std::regex("auto|cpu|cuda|cuda:[0-9]{1,4}")))
      device = value;
    else
      error->all(FLERR, "Pair style mlff: device must be auto, cpu, cuda or cuda:N, got {}", value);
  }

  // a second pair_style mlff without another style between them comes to the same object: start afresh
  if (allocated)
    for (int i = 1; i <= atom->ntypes; i++)
      for (int j = 1; j <= atom->ntypes; j++) setflag[i][j] = 0;
  core = std::make_unique<Core>();
  core->wanted = device;

  load(arg[0]);
  comm_forward = mlff_model_max_exchange_width(core->model) / 2;    // two floats travel as one double
  if (check) self_check();
}

/* ----------------------------------------------------------------------
   read the file on rank 0 only, hand the same bytes to the core on every rank
------------------------------------------------------------------------- */

void PairMLFF::load(const char *file)
{
  core->file = file;
  std::vector<char> bytes;
  std::string problem;
  bigint size = -1;
  if (comm->me == 0) {
    const std::string path = utils::get_potential_file_path(file);
    std::error_code failed;
    if (path.empty())
      problem = "no such model file, or not readable";
    else if (!std::filesystem::is_regular_file(path, failed))
      problem = "not a file";
    else {
      bytes.resize(std::filesystem::file_size(path, failed));
      std::ifstream stream(path, std::ios::binary);
      if (!stream.read(bytes.data(), bytes.size()))
        problem = "could not be read";
      else
        size = bytes.size();
    }
  }
  MPI_Bcast(&size, 1, MPI_LMP_BIGINT, 0, world);
  if (size < 0) error->all(FLERR, "Pair style mlff: {}: {}", file, problem);

  bytes.resize(size);
  for (size_t start = 0; start < bytes.size(); start += BROADCAST_BYTES)
    MPI_Bcast(&bytes[start], int(std::min(BROADCAST_BYTES, bytes.size() - start)), MPI_BYTE, 0, world);

  problem = problem_of_any(mlff_model_load_memory(bytes.data(), bytes.size(), &core->model));
  std::string place = "cpu", why;
  if (problem.empty() && core->wanted != "cpu") {
    place = choose_device();
    why = problem_of_any(mlff_model_supports(core->model, core->device.c_str()));
    if (why.empty()) why = problem_of_any(make_system());
    if (!why.empty() && core->wanted != "auto") problem = why;
    if (!why.empty()) core->device = place = "cpu";
  }
  if (problem.empty() && !core->gpu()) problem = problem_of_any(make_system());
  if (!problem.empty()) error->all(FLERR, "Pair style mlff: {}: {}", file, problem);

  if (comm->me == 0) {
    std::string elements;
    for (int i = 0; i < mlff_model_n_species(core->model); i++)
      elements += std::string(" ") + ELEMENTS[mlff_model_atomic_numbers(core->model)[i]].symbol;
    if (!core->gpu()) place += fmt::format(" with {} thread(s) per rank", comm->nthreads);
    if (!why.empty()) place += ": " + why;
    utils::logmesg(lmp, "mlff {}: {}: {}; elements{}, cutoff {:.6g} A, sha256 {:.12}, {}\n", mlff_version(), file,
                   describe_model(mlff_model_header(core->model)), elements, mlff_model_cutoff(core->model),
                   mlff_model_sha256(core->model), place);
  }
}

/* ----------------------------------------------------------------------
   the error of the first rank whose status is one, on every rank; empty if all is well
------------------------------------------------------------------------- */

std::string PairMLFF::problem_of_any(int status)
{
  std::string text = status == MLFF_OK ? "" : mlff_last_error();
  const int mine = status == MLFF_OK ? comm->nprocs : comm->me;
  int first;
  MPI_Allreduce(&mine, &first, 1, MPI_INT, MPI_MIN, world);
  if (first == comm->nprocs) return "";
  int size = int(text.size());
  MPI_Bcast(&size, 1, MPI_INT, first, world);
  text.resize(size);
  MPI_Bcast(&text[0], size, MPI_CHAR, first, world);
  for (const std::string unnamed : {"model in memory: ", "model in memory"}) {    // to the core; here it has a name
    const size_t at = text.find(unnamed);
    if (at != std::string::npos) text.replace(at, unnamed.size(), unnamed.back() == ' ' ? "" : "the file");
  }
  return text.empty() ? "unknown error" : text;
}

/* ----------------------------------------------------------------------
   the GPU of this rank, by its place among the ranks of its node; returns what the log says of all ranks
------------------------------------------------------------------------- */

std::string PairMLFF::choose_device()
{
  int place = 0, count = 0;
#ifndef MPI_STUBS
  MPI_Comm node;
  MPI_Comm_split_type(world, MPI_COMM_TYPE_SHARED, comm->me, MPI_INFO_NULL, &node);
  MPI_Comm_rank(node, &place);
  MPI_Comm_free(&node);
#endif
  mlff_device_count("cuda", &count);
  count = std::max(count, 1);
  const bool one = core->wanted.rfind("cuda:", 0) == 0;
  const int first = universe->root_proc[universe->iworld];    // partitions begin at different GPUs
  core->device = one ? core->wanted : "cuda:" + std::to_string((first + place) % count);

  int own = place < (one ? 1 : count), all;    // whether this rank is the first on its GPU
  MPI_Allreduce(&own, &all, 1, MPI_INT, MPI_SUM, world);
  return core->device + (comm->nprocs > 1 ? fmt::format(" on rank 0, {} rank(s) on {} GPU(s)", comm->nprocs, all) : "");
}

/* ----------------------------------------------------------------------
   the system of this rank on its device
------------------------------------------------------------------------- */

int PairMLFF::make_system()
{
  mlff_system_free(core->system);
  core->system = nullptr;
  core->alone = core->gpu() && comm->nprocs == 1;
  core->n_local = -1;
  const int status = mlff_system_create(core->model, core->device.c_str(), &core->system);
  if (status != MLFF_OK || core->alone) return status;
  return mlff_system_set_exchange(core->system, &PairMLFF::exchange, this);
}

/* ----------------------------------------------------------------------
   a GPU cannot do what the input script asks for: the CPU can, if the user leaves the choice to us
------------------------------------------------------------------------- */

void PairMLFF::fall_back(const std::string &why)
{
  if (core->wanted != "auto") error->all(FLERR, "Pair style mlff: {}: use device cpu", why);
  if (comm->me == 0) utils::logmesg(lmp, "mlff {}: on the CPU: {}\n", mlff_version(), why);
  core->device = "cpu";
  const std::string problem = problem_of_any(make_system());
  if (!problem.empty()) error->all(FLERR, "Pair style mlff: {}: {}", core->file, problem);
  mlff_system_set_threads(core->system, comm->nthreads);
}

/* ----------------------------------------------------------------------
   compare with the reference structures in the file, on rank 0
------------------------------------------------------------------------- */

void PairMLFF::self_check()
{
  std::string problem;
  int status = MLFF_OK;
  if (comm->me == 0) {
    double energy_error = 0.0, force_error = 0.0;
    status = mlff_model_self_check(core->model, core->device.c_str(), &energy_error, &force_error);
    if (status == MLFF_OK)
      utils::logmesg(lmp, "mlff {}: self-check passed: largest deviation {:.2g} eV/atom, {:.2g} eV/Angstrom\n", mlff_version(),
                     energy_error, force_error);
    else
      problem = mlff_last_error();
  }
  MPI_Bcast(&status, 1, MPI_INT, 0, world);
  if (status != MLFF_OK) error->all(FLERR, "Pair style mlff: {}: self-check failed: {}", core->file, problem);
}

/* ----------------------------------------------------------------------
   pair_coeff * * O H ...
------------------------------------------------------------------------- */

void PairMLFF::coeff(int narg, char **arg)
{
  if (!core || !core->system) error->all(FLERR, "Pair style mlff has no model: its pair_style command failed");
  const int n = atom->ntypes;
  const bool metal = strcmp(update->unit_style, "metal") == 0;
  if (!metal && strcmp(update->unit_style, "real") != 0)
    error->all(FLERR, "Pair style mlff needs units metal or real, got {}", update->unit_style);
  core->energy_unit = metal ? 1.0 : KCAL_PER_MOL_PER_EV;

  if (narg - 2 != n)    // LAMMPS itself asks for * * because of one_coeff
    error->all(FLERR, "Pair style mlff: pair_coeff must name an element or NULL for each of the {} atom types, got {}", n, narg - 2);

  if (!allocated) {
    memory->create(setflag, n + 1, n + 1, "pair:setflag");
    memory->create(cutsq, n + 1, n + 1, "pair:cutsq");
    allocated = 1;
  }

  std::string known;
  for (int i = 0; i < mlff_model_n_species(core->model); i++)
    known += std::string(" ") + ELEMENTS[mlff_model_atomic_numbers(core->model)[i]].symbol;

  core->n_local = -1;    // what the core was given is out of date
  core->species_of_type.assign(n + 1, -1);
  core->atomic_number_of_type.assign(n + 1, 0);
  for (int type = 1; type <= n; type++) {
    const char *name = arg[type + 1];
    if (strcmp(name, "NULL") == 0) continue;
    for (int z = 1; z <= MAX_ATOMIC_NUMBER; z++)
      if (strcmp(name, ELEMENTS[z].symbol) == 0) core->atomic_number_of_type[type] = z;
    core->species_of_type[type] = mlff_model_species_of(core->model, core->atomic_number_of_type[type]);
    if (core->species_of_type[type] < 0)
      error->all(FLERR, "Pair style mlff: {} knows the elements{}; pair_coeff names {} for type {}", core->file, known, name, type);
  }

  for (int i = 1; i <= n; i++)
    for (int j = 1; j <= n; j++) setflag[i][j] = core->species_of_type[i] >= 0 && core->species_of_type[j] >= 0;
}

/* ---------------------------------------------------------------------- */

void PairMLFF::init_style()
{
  if (!force->newton_pair) error->all(FLERR, "Pair style mlff needs newton pair on: forces on ghost atoms must go home");

  if (comm->me == 0 && atom->mass)
    for (int type = 1; type <= atom->ntypes; type++) {
      const int z = core->atomic_number_of_type[type];
      if (z && atom->mass_setflag[type] && std::fabs(atom->mass[type] - ELEMENTS[z].mass) > 0.5)
        error->warning(FLERR, "Pair style mlff: atom type {} has the mass {:.6g}, but pair_coeff says {} ({:.6g})", type, atom->mass[type],
                       ELEMENTS[z].symbol, ELEMENTS[z].mass);
    }

  mlff_system_set_threads(core->system, comm->nthreads);
  core->n_local = -1;    // the first compute() of every run asks for the neighbour list
  core->initialized = true;
  if (core->gpu() && (neighbor->nex_type || neighbor->nex_group || neighbor->nex_mol)) fall_back(EXCLUDED);
  if (!core->gpu())
    neighbor->add_request(this, NeighConst::REQ_FULL);
  else if (utils::strmatch(force->pair_style, "^hybrid"))    // never built, but it tells which pairs are another style's
    neighbor->add_request(this, NeighConst::REQ_FULL | NeighConst::REQ_OCCASIONAL);
  else
    list = nullptr;    // of an earlier pair_style command. A list that is asked for again is not handed over again
}

/* ----------------------------------------------------------------------
   under hybrid a list lacks the pairs of types that belong to other styles; on a GPU the model would see them
------------------------------------------------------------------------- */

void PairMLFF::check_hybrid()
{
  bool whole = !list->molskip;
  const auto &species = core->species_of_type;
  for (int i = 1; i <= atom->ntypes && list->iskip; i++)
    for (int j = 1; j <= atom->ntypes; j++)
      if (species[i] >= 0 && species[j] >= 0 && (list->iskip[i] || list->iskip[j] || list->ijskip[i][j])) whole = false;
  if (!whole)
    fall_back("a GPU evaluates the model for all pairs of its atoms, and pair_style " + std::string(force->pair_style) +
              " gives some of them to another style");
}

double PairMLFF::init_one(int, int)
{
  return mlff_model_cutoff(core->model);
}

/* ---------------------------------------------------------------------- */

void PairMLFF::compute(int eflag, int vflag)
{
  ev_init(eflag, vflag);

  if (!core->initialized) error->all(FLERR, "Pair style mlff: run needs 'pre yes' after a pair_style command");
  if (core->gpu() && neighbor->exclude)    // by a fix, after init_style()
    error->all(FLERR, "Pair style mlff: {}: use device cpu", EXCLUDED);
  if (core->gpu() && list && core->n_local < 0) check_hybrid();    // the list of init_style(), which is not complete until now

  const int n_local = atom->nlocal, n_total = core->alone ? n_local : n_local + atom->nghost;
  // types can change without a new neighbour list (fix atom/swap); without ghosts nothing else counts
  if ((neighbor->ago == 0 && !core->alone) || n_local != core->n_local || size_t(n_total) != core->types.size() ||
      !std::equal(core->types.begin(), core->types.end(), atom->type))
    update_neighbors();

  auto grown = [](std::vector<double> &buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size + size / 8);
    return buffer.data();
  };
  double energy = 0.0, w[6] = {};
  mlff_results results{};
  results.forces = grown(core->forces, 3 * size_t(n_total) + 1);
  if (eflag_global) results.energy = &energy;
  if (eflag_atom) results.atom_energy = grown(core->atom_energy, size_t(n_local) + 1);
  if (vflag_global) results.virial = w;
  if (vflag_atom) results.atom_virial = grown(core->atom_virial, 6 * size_t(n_total) + 1);

  const double *positions = n_total ? atom->x[0] : results.forces;    // never a null pointer
  int status;
  if (core->alone) {
    const bool tilted = domain->triclinic, flat = domain->dimension == 2;
    const double *l = domain->prd;
    const double cell[9] = {l[0], 0, 0, tilted ? domain->xy : 0, l[1], 0, tilted ? domain->xz : 0, tilted ? domain->yz : 0, l[2]};
    const int32_t periodic[3] = {domain->periodicity[0], domain->periodicity[1], domain->periodicity[2] && !flat};
    status = mlff_system_compute_periodic(core->system, positions, cell, periodic, &results);
  } else
    status = mlff_system_compute(core->system, positions, &results);
  if (status != MLFF_OK) report_failure();

  const double unit = core->energy_unit;
  double *f = n_total ? atom->f[0] : nullptr;
  for (size_t k = 0; k < 3 * size_t(n_total); k++) f[k] += unit * results.forces[k];
  if (eflag_global) eng_vdwl += unit * energy;
  if (vflag_global)
    for (int k = 0; k < 6; k++) virial[k] += unit * w[k];
  if (eflag_atom)
    for (int i = 0; i < n_local; i++) eatom[i] += unit * results.atom_energy[i];
  if (vflag_atom)
    for (size_t k = 0; k < 6 * size_t(n_total); k++) vatom[0][k] += unit * results.atom_virial[k];
}

/* ----------------------------------------------------------------------
   the core counts atoms of this rank from 0: name those that have gone astray by their IDs instead
------------------------------------------------------------------------- */

void PairMLFF::report_failure()
{
  std::string message = mlff_last_error();
  const int n_total = atom->nlocal + atom->nghost;
  double **x = atom->x;
  auto id = [&](int i) { return atom->tag_enable ? atom->tag[i] : tagint(i + 1); };
  for (int i = 0; i < n_total; i++)
    for (int k = 0; k < 3; k++)
      if (!std::isfinite(x[i][k]))
        error->one(FLERR, "Pair style mlff, step {}: the position of atom {} is not finite ({} = {}): the simulation is unstable", update->ntimestep,
                   id(i), "xyz"[k], x[i][k]);

  // "atom 3", "atoms 3 and 5"
  static const std::regex counted("\\batoms? ([0-9]+)(?: and ([0-9]+))?\\b");
  std::smatch found;
  if (std::regex_search(message, found, counted)) {
    std::string text = found.prefix();
    text += found[2].matched ? "atoms " : "atom ";
    for (int k = 1; k <= 2 && found[k].matched; k++) {
      const int i = std::stoi(found[k]);
      text += (k == 2 ? " and " : "") + (i < n_total ? std::to_string(id(i)) : found[k].str());
    }
    message = text + found.suffix().str();
  }
  error->one(FLERR, "Pair style mlff, step {}: {}", update->ntimestep, message);
}

/* ----------------------------------------------------------------------
   hand species and, for the CPU, LAMMPS's full neighbour list to the core
------------------------------------------------------------------------- */

void PairMLFF::update_neighbors()
{
  const int n_local = atom->nlocal, n_total = core->alone ? n_local : n_local + atom->nghost;
  core->n_local = n_local;
  core->types.assign(atom->type, atom->type + n_total);
  core->species.resize(n_total + 1);
  for (int i = 0; i < n_total; i++) core->species[i] = core->species_of_type[atom->type[i]];
  int status = mlff_system_set_atoms(core->system, n_local, n_total, core->species.data());
  if (status == MLFF_OK && !core->alone) {
    find_originals();
    status = mlff_system_set_images(core->system, core->originals.data());
  }
  if (status == MLFF_OK && !core->gpu()) status = set_neighbors();
  if (status != MLFF_OK) error->one(FLERR, "Pair style mlff, step {}: {}", update->ntimestep, mlff_last_error());
}

int PairMLFF::set_neighbors()
{
  const int n_local = atom->nlocal;
  const int32_t *species = core->species.data();
  refuse_excluded_pairs();
  if (list->occasional) neighbor->build_one(list);    // requested for a GPU, before fall_back()

  // under hybrid the list has some of the atoms only: the others get an empty row
  auto &offsets = core->offsets;
  offsets.assign(n_local + 1, 0);
  for (int ii = 0; ii < list->inum; ii++) {
    const int i = list->ilist[ii];
    if (species[i] < 0) continue;
    for (int jj = 0; jj < list->numneigh[i]; jj++) offsets[i + 1] += species[list->firstneigh[i][jj] & NEIGHMASK] >= 0;
  }
  for (int i = 0; i < n_local; i++) offsets[i + 1] += offsets[i];

  core->neighbors.resize(offsets[n_local] + 1);
  for (int ii = 0; ii < list->inum; ii++) {
    const int i = list->ilist[ii];
    if (species[i] < 0) continue;
    int32_t *row = &core->neighbors[offsets[i]];
    for (int jj = 0; jj < list->numneigh[i]; jj++) {
      const int j = list->firstneigh[i][jj] & NEIGHMASK;
      if (species[j] >= 0) *row++ = j;
    }
  }

  return mlff_system_set_neighbors(core->system, offsets.data(), core->neighbors.data());
}

/* ----------------------------------------------------------------------
   the first row of the same atom, for each row: ghosts that are images of an atom that is on this rank need no exchange
------------------------------------------------------------------------- */

void PairMLFF::find_originals()
{
  const int n_total = atom->nlocal + atom->nghost;
  auto &originals = core->originals;
  originals.resize(n_total + 1);
  for (int i = 0; i < n_total; i++) originals[i] = i;
  if (!atom->tag_enable) return;

  auto &rows = core->rows_by_id;
  rows.resize(n_total);
  for (int i = 0; i < n_total; i++) rows[i] = {atom->tag[i], i};
  std::sort(rows.begin(), rows.end());
  for (int k = 1; k < n_total; k++)
    if (rows[k].first == rows[k - 1].first) originals[rows[k].second] = originals[rows[k - 1].second];
}

/* ----------------------------------------------------------------------
   bonded atoms whose special_bonds weights are zero are missing from LAMMPS's neighbour list, and would be in the model
------------------------------------------------------------------------- */

void PairMLFF::refuse_excluded_pairs()
{
  const int *flags = neighbor->special_flag;
  const char *remedy = "which the model needs: use special_bonds lj/coul 1.0 1.0 1.0";
  if (atom->molecular == Atom::ATOMIC || (flags[1] && flags[2] && flags[3])) return;
  for (int i = 0; i < atom->nlocal; i++) {
    if (core->species[i] < 0) continue;
    if (atom->molecular == Atom::TEMPLATE) {    // the bonds are in the template, whose headers a stock LAMMPS does not bring
      if (atom->molindex[i] >= 0)
        error->one(FLERR, "Pair style mlff: special_bonds leaves bonded pairs of the molecule of atom {} out of the neighbor list, {}",
                   atom->tag[i], remedy);
      continue;
    }
    int m = 0;
    for (int kind = 0; kind < 3; kind++)
      for (; m < atom->nspecial[i][kind]; m++) {
        const int j = flags[kind + 1] == 0 ? atom->map(atom->special[i][m]) : -1;
        if (j >= 0 && core->species[j] >= 0)
          error->one(FLERR, "Pair style mlff: special_bonds leaves the pair of atoms {} and {} out of the neighbor list, {}",
                     atom->tag[i], atom->tag[j], remedy);
      }
  }
}

/* ----------------------------------------------------------------------
   fill the ghost rows of a feature table: called by the core, between layers
------------------------------------------------------------------------- */

int PairMLFF::exchange(void *self, float *rows, int width)
{
  auto *pair = static_cast<PairMLFF *>(self);
  if (pair->comm->nprocs == 1 && pair->atom->tag_enable) return 0;    // every ghost is an image
  const int widest = pair->comm_forward;    // LAMMPS sizes its buffers by it
  if (width % 2 || width / 2 > widest) return 1;
  pair->core->rows = rows;
  pair->core->width = width;
  pair->comm_forward = width / 2;
  pair->comm->forward_comm(pair);
  pair->comm_forward = widest;
  return 0;
}

int PairMLFF::pack_forward_comm(int n, int *list, double *buf, int pbc_flag, int *pbc)
{
  // where this rank is its own neighbor, what it would send to itself are images: nobody reads the buffer
  bool to_self = false;
  if (pbc_flag && comm->style == Comm::BRICK && atom->tag_enable)
    for (int dim = 0; dim < 3; dim++) to_self |= pbc[dim] != 0 && comm->procgrid[dim] == 1;

  const size_t width = core->width;
  for (int i = 0; i < n && !to_self; i++)
    std::memcpy(buf + i * (width / 2), core->rows + core->originals[list[i]] * width, width * sizeof(float));
  return n * int(width / 2);
}

void PairMLFF::unpack_forward_comm(int n, int first, double *buf)
{
  const size_t width = core->width;
  for (int i = 0; i < n; i++)
    if (core->originals[first + i] == first + i)
      std::memcpy(core->rows + (first + i) * width, buf + i * (width / 2), width * sizeof(float));
}

double PairMLFF::memory_usage()
{
  double bytes = Pair::memory_usage();
  if (core)
    bytes += mlff_system_bytes(core->system) + core->neighbors.capacity() * sizeof(int32_t) + core->offsets.capacity() * sizeof(int64_t) +
        (core->types.capacity() + core->species.capacity()) * sizeof(int) +
        (core->forces.capacity() + core->atom_energy.capacity() + core->atom_virial.capacity()) * sizeof(double);
  return bytes;
}
