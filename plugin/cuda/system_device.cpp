// mlff_system_compute_device: atoms of the caller that are on the GPU already, evaluated in the caller's stream.
#include <algorithm>
#include <cmath>

#include "cuda/system.h"

namespace mlff::cuda {
namespace {

DevicePointer address(const void *pointer) { return DevicePointer(reinterpret_cast<uintptr_t>(pointer)); }

void check_pointer(const void *pointer, int ordinal, const char *what) {
  int where = -1;
  if (!pointer) return;
  if (driver().cuPointerGetAttribute(&where, kPointerDeviceOrdinal, address(pointer)) != 0 || where != ordinal)
    fail(MLFF_ERROR_INPUT, "%s must be in the memory of cuda:%d, the device of the system", what, ordinal);
}

}  // namespace

void CudaSystem::check_arrays(const mlff_device_arrays &a) const {
  if (!has_atoms_) fail(MLFF_ERROR_INPUT, "the system has no atoms yet: call set_atoms before computing");
  check_no_ghosts("compute_device");
  check_one_structure("compute_device");
  if (exchange_) fail(MLFF_ERROR_INPUT, "compute_device evaluates a whole system: it cannot exchange with other ranks");
  if (plan_.imports.empty())
    fail(MLFF_ERROR_RESOURCE, "%s has no kernels for arrays on the GPU; export it again with this mlff", model_->name.c_str());
  if (a.n_rows < n_local_ || a.n_rows > INT32_MAX || (!a.atoms && n_local_ > 0 && a.n_rows != n_local_))
    fail(MLFF_ERROR_INPUT, "the system has %lld atoms; arrays of %lld rows do not fit%s", (long long)n_local_, (long long)a.n_rows,
         a.atoms ? "" : " (without a list of atoms all rows are the system's)");
  if (n_local_ > 0 && !a.positions)
    fail(MLFF_ERROR_INPUT, "the positions of %lld atoms are needed, got NULL", (long long)n_local_);
  for (double unit : {a.length_unit, a.energy_unit})
    if (!(unit > 0.0 && std::isfinite(unit))) fail(MLFF_ERROR_INPUT, "length_unit and energy_unit must be positive, got %g", unit);
  const DevicePointer number = a.is_double ? sizeof(double) : sizeof(float);
  if (address(a.positions) % number || address(a.box) % number || address(a.forces) % number || address(a.energy) % sizeof(double))
    fail(MLFF_ERROR_INPUT, "device arrays must be aligned to the size of their numbers");
}

bool CudaSystem::set_caller_atoms(const mlff_device_arrays &a, bool may_change) {
  const auto row = [&](int64_t k) { return a.atoms ? a.atoms[k] : k; };
  bool same = caller_rows_ == a.n_rows && int64_t(caller_atoms_.size()) == n_local_;
  for (int64_t k = 0; same && k < n_local_; k++) same = caller_atoms_[size_t(k)] == row(k);
  if (same || !may_change) return same;
  std::vector<bool> seen(size_t(a.n_rows), false);
  std::vector<int32_t> atoms;
  for (int64_t k = 0; k < n_local_; k++) {
    if (row(k) < 0 || row(k) >= a.n_rows)
      fail(MLFF_ERROR_INPUT, "atoms[%lld] is %lld; it must be a row of the arrays, 0 to %lld", (long long)k, (long long)row(k),
           (long long)a.n_rows - 1);
    if (seen[size_t(row(k))]) fail(MLFF_ERROR_INPUT, "row %lld is listed twice in atoms", (long long)row(k));
    seen[size_t(row(k))] = true;
    atoms.push_back(int32_t(row(k)));
  }
  caller_atoms_ = std::move(atoms);
  caller_rows_ = a.n_rows;
  rebuild_ = true;
  return true;
}

// Images of the dense search for the caller's box, which only the device knows: never fewer than before.
void CudaSystem::read_box(const mlff_device_arrays &a, StreamHandle stream) {
  double cell[9];
  float narrow[9];
  MLFF_CUDA(cuMemcpyDtoHAsync, a.is_double ? static_cast<void *>(cell) : narrow, address(a.box),
            a.is_double ? sizeof cell : sizeof narrow, stream);
  MLFF_CUDA(cuStreamSynchronize, stream);
  for (int k = 0; k < 9; k++) cell[k] = a.length_unit * (a.is_double ? cell[k] : double(narrow[k]));
  int32_t periodic[3];
  for (int k = 0; k < 3; k++) periodic[k] = cell[3 * k] != 0.0 || cell[3 * k + 1] != 0.0 || cell[3 * k + 2] != 0.0;
  const std::vector<int32_t> before = images_;
  set_boxes({make_cell(cell, periodic, model_->cutoff)});
  for (size_t k = 0; k < 3 && before.size() == 3; k++) images_[k] = std::max(images_[k], before[k]);
}

void CudaSystem::compute_device(const mlff_device_arrays &a) {
  check_arrays(a);
  const Current current(device_->context);
  const auto stream = static_cast<StreamHandle>(a.stream);
  int capturing = kNotCapturing;
  MLFF_CUDA(cuStreamIsCapturing, stream, &capturing);
  if (n_local_ == 0) {
    if (a.energy) MLFF_CUDA(cuMemsetD32Async, address(a.energy), 0, 2, stream);
    return;
  }
  const bool backward = a.forces != nullptr;
  const Callers caller = {address(a.positions), address(a.box), address(a.energy), address(a.forces)};
  const auto wanted = [&](const Setup &setup) {
    return Warm{setup, a.is_double != 0, a.box != nullptr, a.energy != nullptr, backward, a.length_unit, a.energy_unit};
  };

  if (capturing != kNotCapturing) {
    // Nothing may be copied, allocated, loaded or waited for here, and what is captured must stay where it is.
    if (!warm_ || !(*warm_ == wanted(warm_->setup)) || !set_caller_atoms(a, false))
      fail(MLFF_ERROR_INPUT,
           "the stream is capturing: evaluate once before capturing, with the same atoms, units and kinds of results");
    captured_ = true;
    launch(stages(warm_->setup), stream, caller);
    return;
  }

  evaluated_ = false;
  check_pointer(a.positions, device_->ordinal, "positions");
  check_pointer(a.box, device_->ordinal, "box");
  check_pointer(a.energy, device_->ordinal, "energy");
  check_pointer(a.forces, device_->ordinal, "forces");
  if (!warm_ || !(*warm_ == wanted(warm_->setup)) || !set_caller_atoms(a, false)) detach();
  set_caller_atoms(a, true);
  if (!a.box)
    set_boxes({Cell{}});
  else if (!warm_ || !warm_->box)
    images_.clear(), read_box(a, stream);
  const double units[4] = {a.length_unit, a.energy_unit, a.energy_unit * a.length_unit, a.is_double ? 0.0 : 1.0};

  for (int round = 0; round < kMaxRounds; round++) {
    const double images = images_in(images_.data());
    Setup setup = choose(fits_dense(n_local_, images), backward);
    setup.arrays = true;
    make_room(setup, int64_t(double(n_local_) * images), stream);
    upload(setup, stream);
    put(kCallerAtoms, caller_atoms_.data(), caller_atoms_.size() * sizeof(int32_t), stream);
    put(kUnits, units, sizeof units, stream);
    if (a.box)
      mirrors_[kBoxes].clear();  // the device writes them
    else
      put(kBoxes, boxes_.data(), boxes_.size() * sizeof(double), stream);
    run(setup, stream, caller);
    auto *flags = static_cast<int32_t *>(results_.reserve(device_->context, 16 * sizeof(int32_t)));
    MLFF_CUDA(cuMemcpyDtoHAsync, flags, pointer(kStatus), 16 * sizeof(int32_t), stream);
    MLFF_CUDA(cuStreamSynchronize, stream);
    clean_ = true;
    rebuild_ = true;
    bool repeat = must_repeat(flags, setup);
    if (flags[6] && a.box) read_box(a, stream), repeat = true;
    if (repeat) continue;
    rebuild_ = false;
    evaluated_ = true;
    warm_ = wanted(setup);
    return;
  }
  fail(MLFF_ERROR_INTERNAL, "the neighbour search still asks for more room after %d evaluations", kMaxRounds);
}

}  // namespace mlff::cuda
