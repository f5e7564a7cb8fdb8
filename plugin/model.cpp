#include "model.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "system.h"

namespace mlff {
namespace {

using nlohmann::json;

constexpr double kMaxCutoff = 100.0;  // Angstrom
constexpr double kMaxEnergyError = 1e-5, kMaxForceError = 1e-4;

const json *field(const json &header, const char *key) {
  const auto it = header.find(key);
  return it == header.end() ? nullptr : &*it;
}

double read_cutoff(const Payload &payload, const std::string &name) {
  const json *value = field(payload.header, "cutoff");
  const double cutoff = value && value->is_number() ? value->get<double>() : 0.0;
  if (!(cutoff > 0.0 && cutoff <= kMaxCutoff))
    fail(MLFF_ERROR_FILE, "%s: the cutoff must be a number above 0 and up to %g Angstrom", name.c_str(), kMaxCutoff);
  // The kernels read the tensor, the neighbour search the header: were they different, forces would jump at the smaller one.
  const Tensor *tensor = payload.find("cutoff");
  if (tensor && (tensor->dtype != DType::f64 || tensor->count != 1 || *tensor->as<double>() != cutoff))
    fail(MLFF_ERROR_FILE, "%s: tensor \"cutoff\" does not hold the header's cutoff, %g", name.c_str(), cutoff);
  return cutoff;
}

std::vector<int32_t> read_atomic_numbers(const json &header, const std::string &name) {
  const json *list = field(header, "atomic_numbers");
  std::vector<int32_t> numbers;
  bool good = list && list->is_array() && !list->empty() && list->size() <= 118;
  for (size_t i = 0; good && i < list->size(); i++) {
    const json &z = (*list)[i];
    good = z.is_number_unsigned() && z.get<uint64_t>() >= 1 && z.get<uint64_t>() <= 118 &&
           std::count(numbers.begin(), numbers.end(), z.get<int32_t>()) == 0;
    if (good) numbers.push_back(z.get<int32_t>());
  }
  if (!good) fail(MLFF_ERROR_FILE, "%s: atomic_numbers must be a list of different whole numbers from 1 to 118", name.c_str());
  return numbers;
}

void check_header(const json &header, const std::string &name) {
  for (const char *key : {"architecture", "precision", "mlff_version"})
    if (!field(header, key) || !field(header, key)->is_string())
      fail(MLFF_ERROR_FILE, "%s: the header needs %s, a text", name.c_str(), key);
  for (const char *key : {"config", "provenance", "plans"})
    if (!field(header, key) || !field(header, key)->is_object())
      fail(MLFF_ERROR_FILE, "%s: the header needs %s, an object", name.c_str(), key);
  if (!field(header, "references") || !field(header, "references")->is_array())
    fail(MLFF_ERROR_FILE, "%s: the header needs references, a list", name.c_str());
  const json *units = field(header, "units");
  const auto is = [&](const char *key, const char *unit) {
    return units && units->is_object() && units->contains(key) && (*units)[key].is_string() &&
           (*units)[key].get_ref<const std::string &>() == unit;
  };
  if (!is("length", "Angstrom") || !is("energy", "eV"))
    fail(MLFF_ERROR_FILE, "%s: the units must be Angstrom and eV", name.c_str());
}

}  // namespace

Model::Model(Payload p, const KernelTable &kernels, const std::string &file)
    : name(file),
      payload(std::move(p)),
      cutoff(read_cutoff(payload, name)),
      atomic_numbers(read_atomic_numbers(payload.header, name)) {
  check_header(payload.header, name);
  plan = parse_plan(payload, "cpu", kernels, int(atomic_numbers.size()), name);
  if (payload.header["plans"].contains("cuda")) cuda_plan = cuda::parse_plan(payload, name);
  if (cuda_plan && cuda_plan->grade.empty() == has_grade())
    fail(MLFF_ERROR_FILE, "%s: either all plans have stages of extrapolation grades or none; export it again", name.c_str());

  for (const json &entry : *field(payload.header, "references")) {
    const auto text = [&](const char *key) {
      if (!entry.is_object() || !entry.contains(key) || !entry[key].is_string())
        fail(MLFF_ERROR_FILE, "%s: a reference structure needs the texts \"name\" and \"prefix\"", name.c_str());
      return entry[key].get<std::string>();
    };
    Reference r;
    r.name = text("name");
    const std::string prefix = text("prefix");
    const Tensor *numbers = payload.find(prefix + ".atomic_numbers");
    r.n = numbers && numbers->shape.size() == 1 ? numbers->count : 0;
    const auto tensor = [&](const char *key, DType dtype, const std::vector<int64_t> &shape) {
      const Tensor *t = payload.find(prefix + "." + key);
      if (!t || t->dtype != dtype || t->shape != shape)
        fail(MLFF_ERROR_FILE, "%s: reference structure \"%s\" needs the tensor \"%s.%s\" of dtype %s and shape %s", name.c_str(),
             r.name.c_str(), prefix.c_str(), key, dtype_name(dtype), shape_text(shape).c_str());
      return t;
    };
    r.atomic_numbers = tensor("atomic_numbers", DType::i32, {r.n})->as<int32_t>();
    r.positions = tensor("positions", DType::f64, {r.n, 3})->as<double>();
    r.cell = tensor("cell", DType::f64, {3, 3})->as<double>();
    r.pbc = tensor("pbc", DType::i32, {3})->as<int32_t>();
    r.energy = tensor("energy", DType::f64, {1})->as<double>();
    r.forces = tensor("forces", DType::f64, {r.n, 3})->as<double>();
    tensor("virial", DType::f64, {6});
    for (int64_t i = 0; i < r.n; i++)
      if (species_of(r.atomic_numbers[i]) < 0)
        fail(MLFF_ERROR_FILE, "%s: reference structure \"%s\" holds the atomic number %d, which the model does not know",
             name.c_str(), r.name.c_str(), r.atomic_numbers[i]);
    references.push_back(r);
  }
}

int32_t Model::max_exchange_width() const {
  return std::max(plan.max_exchange_width, cuda_plan ? cuda_plan->max_exchange_width : 0);
}

int32_t Model::species_of(int32_t atomic_number) const {
  const auto it = std::find(atomic_numbers.begin(), atomic_numbers.end(), atomic_number);
  return it == atomic_numbers.end() ? -1 : int32_t(it - atomic_numbers.begin());
}

void self_check(std::shared_ptr<const Model> model, const std::string &device, double &max_energy_error_per_atom,
                double &max_force_error) {
  max_energy_error_per_atom = max_force_error = 0.0;
  std::string worst;
  if (model->references.empty())
    throw Error(MLFF_ERROR_FILE, "the model file holds no reference structures to check against; export it again");
  for (const Reference &r : model->references) {
    const std::unique_ptr<System> system = create_system(model, device);
    system->set_threads(1);  // small structures, and the same result everywhere
    std::vector<int32_t> species(r.n);
    for (int64_t i = 0; i < r.n; i++) species[i] = model->species_of(r.atomic_numbers[i]);
    system->set_atoms(r.n, r.n, species.data());
    double energy;
    std::vector<double> forces(3 * r.n);
    mlff_results results{};
    results.energy = &energy;
    results.forces = forces.data();
    system->compute_periodic(r.positions, r.cell, r.pbc, results);
    double force_error = 0.0;
    for (int64_t i = 0; i < 3 * r.n; i++) force_error = std::max(force_error, std::abs(forces[i] - r.forces[i]));
    const double energy_error = std::abs(energy - *r.energy) / double(r.n);
    if (worst.empty() && (energy_error > kMaxEnergyError || force_error > kMaxForceError)) worst = r.name;
    max_energy_error_per_atom = std::max(max_energy_error_per_atom, energy_error);
    max_force_error = std::max(max_force_error, force_error);
  }
  if (!worst.empty())
    fail(MLFF_ERROR_INTERNAL,
         "self-check: reference structure \"%s\" is not reproduced: largest deviations %.3g eV/atom (allowed %g) and %.3g "
         "eV/Angstrom (allowed %g)",
         worst.c_str(), max_energy_error_per_atom, kMaxEnergyError, max_force_error, kMaxForceError);
}

}  // namespace mlff
