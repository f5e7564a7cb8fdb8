#include "plan.h"

#include <algorithm>
#include <cstring>

#include "../error.h"
#include "../plan.h"

namespace mlff::cuda {
namespace {

using nlohmann::json;

constexpr const char *kRowNames[] = {"local", "total", "edges", "candidates", "structures", "structures_plus_1", "bins", "one"};
constexpr const char *kScalarNames[kScalars] = {"edge_capacity", "candidate_capacity"};
constexpr const char *kCallerNames[kCallers] = {"caller_positions", "caller_box", "caller_energy", "caller_forces"};
constexpr int64_t kMaxShared = 232448, kMaxProgramsPerBlock = 65535, kMaxRowsPerBlock = 1 << 20;
constexpr size_t kMaxTable = 1000;

struct InputShape {
  const char *name;
  DType dtype;
  Rows rows;
  int64_t width;
};

constexpr InputShape kInputShapes[kInputs] = {
    {"status", DType::i32, Rows::one, 16},
    {"energies", DType::f64, Rows::structures, 1},
    {"virials", DType::f64, Rows::structures, 6},
    {"forces", DType::f64, Rows::total, 3},
    {"atom_energy", DType::f64, Rows::total, 1},
    {"atom_virial", DType::f64, Rows::total, 6},
    {"grade", DType::f64, Rows::total, 1},
    {"positions", DType::f64, Rows::total, 3},
    {"counts", DType::i32, Rows::one, 4},
    {"elements", DType::i32, Rows::total, 1},
    {"structure", DType::i32, Rows::total, 1},
    {"starts", DType::i32, Rows::structures_plus_1, 1},
    {"boxes", DType::f64, Rows::structures, 18},
    {"images", DType::i32, Rows::structures, 3},
    {"rebuild", DType::i32, Rows::one, 1},
    {"flags", DType::i32, Rows::one, 16},
    {"caller_atoms", DType::i32, Rows::total, 1},
    {"units", DType::f64, Rows::one, 4},
};

template <size_t N>
int index_of(const char *const (&names)[N], const std::string &name) {
  for (size_t k = 0; k < N; k++)
    if (name == names[k]) return int(k);
  return -1;
}

[[noreturn]] void bad(const std::string &message) { throw Error(MLFF_ERROR_FILE, message); }

const json &object_field(const json &entry, const char *key, const std::string &where) {
  if (entry.is_object())
    if (const auto it = entry.find(key); it != entry.end() && it->is_object() && it->size() <= kMaxTable) return *it;
  bad(where + ": needs an object \"" + key + "\" of at most " + std::to_string(kMaxTable) + " entries");
}

bool is_architecture(const std::string &name) {
  if (name == "ptx") return true;
  return name.size() >= 5 && name.size() <= 6 && name.rfind("sm_", 0) == 0 &&
         std::all_of(name.begin() + 3, name.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// The driver is given no size: the tables that a cubin's head points to must lie within the tensor, and PTX must end.
bool is_machine_code(const std::string &architecture, const Tensor &t) {
  if (t.dtype != DType::u8) return false;
  const uint8_t *p = t.as<uint8_t>();
  if (architecture == "ptx") return t.count > 1 && p[t.count - 1] == 0;
  if (t.count < 64 || std::memcmp(p,
                                  "\x7f"
                                  "ELF\x02\x01",
                                  6) != 0)
    return false;
  const auto size = uint64_t(t.count);
  const auto number = [](const uint8_t *at, int bytes) {
    uint64_t value = 0;
    for (int k = 0; k < bytes; k++) value |= uint64_t(at[k]) << (8 * k);
    return value;
  };
  const auto table_fits = [&](uint64_t offset, uint64_t entry, uint64_t count) {
    return offset <= size && entry * count <= size - offset;
  };
  const uint64_t sections = number(p + 40, 8), section_size = number(p + 58, 2), n_sections = number(p + 60, 2);
  if (!table_fits(number(p + 32, 8), number(p + 54, 2), number(p + 56, 2)) || !table_fits(sections, section_size, n_sections))
    return false;
  if (n_sections > 0 && section_size < 64) return false;
  for (uint64_t k = 0; k < n_sections; k++) {
    const uint8_t *s = p + sections + k * section_size;
    if (number(s + 4, 4) != 8 && !table_fits(number(s + 24, 8), number(s + 32, 8), 1)) return false;  // 8: a section without bytes
  }
  return true;
}

enum class List { imports, dense, list, schedule, grade };  // that a stage is in

class Parser {
 public:
  Parser(const Payload &payload, const std::string &where) : payload_(payload), where_(where) {}

  Plan parse(const json &entry) {
    for (const auto &input : kInputShapes) {
      names_.emplace(input.name, int(plan_.arrays.size()));
      plan_.arrays.push_back({input.name, input.dtype, input.rows, input.width});
    }
    for (const json &buffer : list_field(entry, "buffers", where_)) add_buffer(buffer);
    for (const auto &[name, kernel] : object_field(entry, "kernels", where_).items()) add_kernel(name, kernel);
    plan_.overlapping = names_field(entry, "overlapping", where_);
    for (const std::string &a : plan_.overlapping)
      if (!is_architecture(a)) bad(where_ + ": overlapping: there is no architecture \"" + a.substr(0, 80) + "\"");
    const json &search = object_field(entry, "search", where_);
    plan_.dense = stages(list_field(search, "dense", where_ + ": search"), where_ + ": dense search", List::dense);
    plan_.dense_takes_callers = std::any_of(plan_.dense.begin(), plan_.dense.end(), [](const Stage &s) {
      return std::any_of(s.args.begin(), s.args.end(), [](const Argument &a) { return a.kind == Argument::caller; });
    });
    plan_.list = stages(list_field(search, "list", where_ + ": search"), where_ + ": list search", List::list);
    for (const json &schedule : list_field(entry, "schedules", where_)) add_schedule(schedule);
    if (plan_.schedules.empty() || plan_.schedules.back().max_rows != INT64_MAX)
      bad(where_ + ": the last schedule must have the max_rows null");
    if (entry.contains("grade")) plan_.grade = stages(list_field(entry, "grade", where_), where_ + ": grade", List::grade);
    if (entry.contains("import")) plan_.imports = stages(list_field(entry, "import", where_), where_ + ": import", List::imports);
    return std::move(plan_);
  }

 private:
  void add_buffer(const json &entry) {
    Array buffer;
    buffer.name = string_field(entry, "name", where_ + ": a buffer");
    const std::string where = where_ + ": buffer \"" + buffer.name + "\"";
    if (!parse_dtype(string_field(entry, "dtype", where), buffer.dtype)) bad(where + ": unknown dtype");
    buffer.rows = rows_of(string_field(entry, "rows", where), where);
    buffer.width = number_field(entry, "width", 1, kMaxWidth, where);
    if (index_of(kScalarNames, buffer.name) >= 0 || index_of(kCallerNames, buffer.name) >= 0 || payload_.find(buffer.name) ||
        !names_.emplace(buffer.name, int(plan_.arrays.size())).second)
      bad(where + ": the name is taken by another buffer, a tensor or an input");
    plan_.arrays.push_back(buffer);
  }

  static Rows rows_of(const std::string &name, const std::string &where) {
    const int k = index_of(kRowNames, name);
    if (k < 0 || Rows(k) == Rows::structures_plus_1)
      bad(where + ": rows must be local, total, edges, candidates, structures, bins or one");
    return Rows(k);
  }

  void add_kernel(const std::string &name, const json &entry) {
    const std::string where = where_ + ": kernel \"" + name.substr(0, 80) + "\"";
    Kernel kernel;
    kernel.name = name;
    kernel.entry = name.substr(0, name.find('.'));
    if (kernel.entry.empty() || name.size() > 200) bad(where + ": the name must begin with that of an entry point");
    kernel.warps = int(number_field(entry, "warps", 1, 16, where));
    if (kernel.warps & (kernel.warps - 1)) bad(where + ": the warps must be 1, 2, 4, 8 or 16");
    if (entry.contains("carveout")) kernel.carveout = int(number_field(entry, "carveout", 0, 100, where));
    kernel.args = names_field(entry, "args", where);
    if (kernel.args.size() > kMaxArguments) bad(where + ": has more than " + std::to_string(kMaxArguments) + " arguments");
    std::vector<std::string> architectures;
    const json &shared = object_field(entry, "shared", where);
    for (const auto &[architecture, bytes] : shared.items()) {
      if (!is_architecture(architecture)) bad(where + ": there is no architecture \"" + architecture.substr(0, 80) + "\"");
      const Tensor *code = payload_.find("cuda." + architecture + "." + name);
      if (!code || !is_machine_code(architecture, *code))
        bad(where + ": the tensor \"cuda." + architecture + "." + name + "\" is missing or holds no machine code");
      kernel.images[architecture] = {code, int(number_field(shared, architecture.c_str(), 0, kMaxShared, where + ": shared"))};
      architectures.push_back(architecture);
    }
    if (plan_.kernels.empty()) plan_.architectures = architectures;
    if (architectures.empty() || architectures != plan_.architectures)
      bad(where + ": every kernel must be there for the same architectures, one or more");
    kernel_index_.emplace(name, int(plan_.kernels.size()));
    plan_.kernels.push_back(std::move(kernel));
  }

  void add_schedule(const json &entry) {
    const std::string where = where_ + ": schedule " + std::to_string(plan_.schedules.size());
    Schedule schedule{INT64_MAX, {}};
    if (!entry.is_object() || !entry.contains("max_rows")) bad(where + ": needs max_rows, a number or null");
    if (!entry["max_rows"].is_null()) schedule.max_rows = number_field(entry, "max_rows", 1, INT32_MAX, where);
    if (!plan_.schedules.empty() && plan_.schedules.back().max_rows >= schedule.max_rows)
      bad(where + ": the max_rows must increase from schedule to schedule");
    schedule.stages = stages(list_field(entry, "stages", where), where, List::schedule);
    // Ranks of one simulation differ in the number of their atoms, and all must exchange the same.
    if (!plan_.schedules.empty() && exchanges(schedule.stages) != exchanges(plan_.schedules[0].stages))
      bad(where + ": all schedules must exchange the same in the same order");
    plan_.schedules.push_back(std::move(schedule));
  }

  std::vector<std::pair<int64_t, Pass>> exchanges(const Stages &stages) const {
    std::vector<std::pair<int64_t, Pass>> list;
    for (const Stage &stage : stages)
      if (stage.kernel < 0) list.emplace_back(plan_.arrays[stage.args[0].index].width, stage.pass);
    return list;
  }

  Stages stages(const json &entries, const std::string &where, List list) {
    Stages result;
    for (const json &entry : entries) result.push_back(stage(entry, where + ": stage " + std::to_string(result.size()), list));
    return result;
  }

  Stage stage(const json &entry, std::string where, List list) {
    const std::string &name = string_field(entry, "kernel", where);
    where += " (" + name.substr(0, 80) + ")";
    Stage stage{};
    constexpr const char *passes[] = {"forward", "backward", "energy"};
    const int pass = entry.contains("pass") ? index_of(passes, string_field(entry, "pass", where)) : 0;
    if (pass < 0) bad(where + ": pass must be forward, backward or energy");
    stage.pass = Pass(pass);
    const std::vector<std::string> names = names_field(entry, "args", where);
    if (name == "exchange") return exchange(stage, names, where, list);

    const auto kernel = kernel_index_.find(name);
    if (kernel == kernel_index_.end()) bad(where + ": the plan has no such kernel");
    stage.kernel = kernel->second;
    const auto &types = plan_.kernels[stage.kernel].args;
    if (names.size() != types.size())
      bad(where + ": the kernel takes " + std::to_string(types.size()) + " arguments, " + std::to_string(names.size()) +
          " are given");
    for (size_t k = 0; k < names.size(); k++) {
      std::string type;
      stage.args.push_back(resolve(names[k], type, where, list));
      if (type != types[k])
        bad(where + ": argument " + std::to_string(k) + " = \"" + names[k].substr(0, 80) + "\" is " + type +
            ", the kernel takes " + types[k].substr(0, 80));
    }
    const json &grid = list_field(entry, "grid", where);
    const auto number = [&](size_t k, int64_t most) {
      if (!grid[k].is_number_unsigned() || grid[k].get<uint64_t>() < 1 || grid[k].get<uint64_t>() > uint64_t(most))
        bad(where + ": numbers of the grid must be whole, from 1 to " + std::to_string(most));
      return grid[k].get<int64_t>();
    };
    if (grid.size() != 3 || !grid[0].is_string()) bad(where + ": the grid must be [rows, rows per block, programs per block]");
    stage.grid_rows = rows_of(grid[0].get<std::string>(), where + ": grid");
    stage.rows_per_block = number(1, kMaxRowsPerBlock);
    stage.programs_per_block = number(2, kMaxProgramsPerBlock);
    return stage;
  }

  Stage exchange(Stage stage, const std::vector<std::string> &names, const std::string &where, List list) {
    const auto it = names.size() == 1 ? names_.find(names[0]) : names_.end();
    if (list != List::schedule || it == names_.end() || it->second < kInputs)
      bad(where + ": an exchange takes one buffer, in a schedule");
    const Array &array = plan_.arrays[it->second];
    if (array.dtype != DType::f32 || array.rows != Rows::total || array.width % 2)
      bad(where + ": \"" + array.name + "\" must be f32 with rows total and an even width to be exchanged");
    stage.kernel = -1;
    stage.args = {{Argument::array, it->second}};
    plan_.max_exchange_width = std::max(plan_.max_exchange_width, int32_t(array.width));
    return stage;
  }

  Argument resolve(const std::string &name, std::string &type, const std::string &where, List list) {
    if (const int k = index_of(kScalarNames, name); k >= 0) return type = "i32", Argument{Argument::scalar, k};
    if (const int k = index_of(kCallerNames, name); k >= 0) {
      if (list == List::list || list == List::grade) bad(where + ": \"" + name + "\" does not exist in a list search or grades");
      return type = "f64*", Argument{Argument::caller, k};
    }
    if (const auto it = names_.find(name); it != names_.end()) {
      type = std::string(dtype_name(plan_.arrays[it->second].dtype)) + "*";
      return {Argument::array, it->second};
    }
    const Tensor *tensor = payload_.find(name);
    if (!tensor) bad(where + ": there is no buffer, tensor or input \"" + name.substr(0, 80) + "\"");
    type = std::string(dtype_name(tensor->dtype)) + "*";
    const auto [it, fresh] = tensor_index_.emplace(name, int(plan_.tensors.size()));
    if (fresh) plan_.tensors.push_back(tensor);
    return {Argument::tensor, it->second};
  }

  const Payload &payload_;
  const std::string where_;
  Plan plan_;
  std::map<std::string, int> names_, kernel_index_, tensor_index_;
};

}  // namespace

int Plan::find(const std::string &name) const {
  const auto it = std::find_if(arrays.begin(), arrays.end(), [&](const Array &a) { return a.name == name; });
  return it == arrays.end() ? -1 : int(it - arrays.begin());
}

int Plan::schedule(int64_t n_total) const {
  int k = 0;
  while (schedules[k].max_rows < n_total) k++;  // the last one has no limit
  return k;
}

Plan parse_plan(const Payload &payload, const std::string &name) {
  const json &plans = payload.header.at("plans");
  return Parser(payload, name + ": cuda plan").parse(plans.at("cuda"));
}

}  // namespace mlff::cuda
