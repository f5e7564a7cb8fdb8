// The C interface: no exception leaves it, every failure becomes a status and one line of text.
#include "mlff.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "cuda/driver.h"
#include "error.h"
#include "model.h"
#include "system.h"

#ifndef MLFF_VERSION
#define MLFF_VERSION "0.1.0"
#endif

struct mlff_model {
  std::shared_ptr<const mlff::Model> model;
};

struct mlff_system {
  std::unique_ptr<mlff::System> system;
};

namespace {

thread_local char last_error[1024];  // a plain array: noting an error must not fail

int note(int status, const char *text) {
  std::snprintf(last_error, sizeof last_error, "%s", text);
  for (char *c = last_error; *c; c++)
    if (static_cast<unsigned char>(*c) < 0x20 || *c == 0x7f) *c = ' ';  // names out of a file may hold anything
  return status;
}

template <class Body>
int guarded(Body &&body) {
  try {
    body();
    last_error[0] = 0;
    return MLFF_OK;
  } catch (const mlff::Error &e) {
    return note(e.status, e.what());
  } catch (const std::bad_alloc &) {
    return note(MLFF_ERROR_RESOURCE, "out of memory");
  } catch (const std::exception &e) {
    return note(MLFF_ERROR_INTERNAL, e.what());
  } catch (...) {
    return note(MLFF_ERROR_INTERNAL, "an exception of an unknown kind");
  }
}

void require(const void *pointer, const char *what) {
  if (!pointer) mlff::fail(MLFF_ERROR_INPUT, "%s must not be NULL", what);
}

void make_model(mlff::Payload payload, const std::string &name, mlff_model **model) {
  auto made = std::make_unique<mlff_model>();
  made->model = std::make_shared<const mlff::Model>(std::move(payload), mlff::cpu_kernels(), name);
  *model = made.release();
}

}  // namespace

int mlff_abi_version(void) { return MLFF_ABI_VERSION; }
const char *mlff_version(void) { return MLFF_VERSION; }
const char *mlff_last_error(void) { return last_error; }

int mlff_device_count(const char *kind, int32_t *count) {
  return guarded([&] {
    require(count, "count");
    *count = 0;
    require(kind, "kind");
    if (std::strcmp(kind, "cpu") == 0)
      *count = 1;
    else if (std::strcmp(kind, "cuda") == 0)
      *count = mlff::cuda::device_count();
    else
      mlff::fail(MLFF_ERROR_INPUT, "the kinds of devices are \"cpu\" and \"cuda\", got \"%.80s\"", kind);
  });
}

int mlff_model_load(const char *path, mlff_model **model) {
  return guarded([&] {
    require(model, "model");
    *model = nullptr;
    require(path, "path");
    make_model(mlff::read_payload_file(path), path, model);
  });
}

int mlff_model_load_memory(const void *data, size_t size, mlff_model **model) {
  return guarded([&] {
    require(model, "model");
    *model = nullptr;
    if (size > 0) require(data, "data");
    make_model(mlff::read_payload(data, size, "model in memory"), "model in memory", model);
  });
}

void mlff_model_free(mlff_model *model) { delete model; }

const char *mlff_model_header(const mlff_model *model) { return model->model->payload.header_text.c_str(); }
const char *mlff_model_sha256(const mlff_model *model) { return model->model->payload.sha256.c_str(); }
double mlff_model_cutoff(const mlff_model *model) { return model->model->cutoff; }
int32_t mlff_model_n_species(const mlff_model *model) { return int32_t(model->model->atomic_numbers.size()); }
const int32_t *mlff_model_atomic_numbers(const mlff_model *model) { return model->model->atomic_numbers.data(); }
int32_t mlff_model_species_of(const mlff_model *model, int32_t atomic_number) { return model->model->species_of(atomic_number); }
int32_t mlff_model_max_exchange_width(const mlff_model *model) { return model->model->max_exchange_width(); }

int32_t mlff_model_has_extrapolation_grade(const mlff_model *model) { return model->model->has_grade(); }

int mlff_model_self_check(const mlff_model *model, const char *device, double *max_energy_error_per_atom, double *max_force_error) {
  return guarded([&] {
    require(model, "model");
    require(device, "device");
    double energy_error = 0.0, force_error = 0.0;
    const auto report = [&] {
      if (max_energy_error_per_atom) *max_energy_error_per_atom = energy_error;
      if (max_force_error) *max_force_error = force_error;
    };
    try {
      mlff::self_check(model->model, device, energy_error, force_error);
    } catch (...) {
      report();
      throw;
    }
    report();
  });
}

int mlff_model_supports(const mlff_model *model, const char *device) {
  return guarded([&] {
    require(model, "model");
    require(device, "device");
    mlff::check_device(*model->model, device);
  });
}

int mlff_system_create(const mlff_model *model, const char *device, mlff_system **system) {
  return guarded([&] {
    require(system, "system");
    *system = nullptr;
    require(model, "model");
    require(device, "device");
    auto made = std::make_unique<mlff_system>();
    made->system = mlff::create_system(model->model, device);
    *system = made.release();
  });
}

void mlff_system_free(mlff_system *system) { delete system; }

int mlff_system_set_threads(mlff_system *system, int32_t n_threads) {
  return guarded([&] {
    require(system, "system");
    system->system->set_threads(n_threads);
  });
}

int mlff_system_set_atoms(mlff_system *system, int64_t n_local, int64_t n_total, const int32_t *species) {
  return guarded([&] {
    require(system, "system");
    system->system->set_atoms(n_local, n_total, species);
  });
}

int mlff_system_set_images(mlff_system *system, const int32_t *originals) {
  return guarded([&] {
    require(system, "system");
    system->system->set_images(originals);
  });
}

int mlff_system_set_neighbors(mlff_system *system, const int64_t *offsets, const int32_t *neighbors) {
  return guarded([&] {
    require(system, "system");
    system->system->set_neighbors(offsets, neighbors);
  });
}

int mlff_system_set_exchange(mlff_system *system, mlff_exchange_fn exchange, void *user) {
  return guarded([&] {
    require(system, "system");
    system->system->set_exchange(exchange, user);
  });
}

int mlff_system_compute(mlff_system *system, const double *positions, const mlff_results *results) {
  return guarded([&] {
    require(system, "system");
    require(results, "results");
    system->system->compute(positions, *results);
  });
}

int mlff_system_compute_periodic(mlff_system *system, const double *positions, const double *cell, const int32_t *pbc,
                                 const mlff_results *results) {
  return guarded([&] {
    require(system, "system");
    require(results, "results");
    system->system->compute_periodic(positions, cell, pbc, *results);
  });
}

int mlff_system_set_structures(mlff_system *system, int32_t n_structures, const int64_t *starts) {
  return guarded([&] {
    require(system, "system");
    system->system->set_structures(n_structures, starts);
  });
}

int mlff_system_compute_batch(mlff_system *system, const double *positions, const double *cells, const int32_t *pbcs,
                              const mlff_results *results) {
  return guarded([&] {
    require(system, "system");
    require(results, "results");
    system->system->compute_batch(positions, cells, pbcs, *results);
  });
}

int mlff_system_compute_device(mlff_system *system, const mlff_device_arrays *arrays) {
  return guarded([&] {
    require(system, "system");
    require(arrays, "arrays");
    system->system->compute_device(*arrays);
  });
}

int mlff_system_edges(const mlff_system *system, int64_t *n_edges, int32_t *centers, int32_t *neighbors, double *vectors) {
  return guarded([&] {
    require(system, "system");
    system->system->edges(n_edges, centers, neighbors, vectors);
  });
}

size_t mlff_system_bytes(const mlff_system *system) { return system ? system->system->bytes() : 0; }
