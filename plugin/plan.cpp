#include "plan.h"

#include <algorithm>
#include <map>
#include <set>

#include "error.h"
#include "signature.h"

namespace mlff {
namespace {

using nlohmann::json;

constexpr int64_t kFeatureMultiple = 16;  // kernels go through the features in whole vectors
constexpr size_t kMaxEntries = 10000;

struct InputShape {
  const char *name;
  DType dtype;
  Rows rows;
  int64_t width;
  bool writable;
};

constexpr InputShape kInputShapes[kInputs] = {
    {"species", DType::i32, Rows::total, 1, false},   {"offsets", DType::i64, Rows::local_plus_1, 1, false},
    {"neighbors", DType::i32, Rows::edges, 1, false}, {"distance", DType::f64, Rows::edges, 1, false},
    {"unit", DType::f32, Rows::edges, 3, false},      {"atom_energy", DType::f64, Rows::local, 1, true},
    {"gradient", DType::f64, Rows::edges, 3, true},   {"grade", DType::f64, Rows::local, 1, true},
};

class Parser {
 public:
  Parser(const Payload &payload, const KernelTable &kernels, int n_species, const std::string &where)
      : payload_(payload), kernels_(kernels), n_species_(n_species), where_(where) {}

  Plan parse(const json &entry) {
    for (const json &buffer : list_field(entry, "buffers", where_)) add_buffer(buffer);
    for (const json &stage : list_field(entry, "stages", where_)) add_stage(stage, plan_.stages);
    // Grades can be wanted without forces: what the backward stages write is not there then.
    for (size_t b = 0; b < written_.size(); b++) written_[b] = written_[b] && plan_.buffers[b].forward;
    if (entry.contains("grade"))
      for (const json &stage : list_field(entry, "grade", where_)) add_stage(stage, plan_.grade);
    return std::move(plan_);
  }

 private:
  void add_buffer(const json &entry) {
    Buffer buffer;
    buffer.name = string_field(entry, "name", where_ + ": a buffer");
    const std::string where = where_ + ": buffer \"" + buffer.name + "\"";
    if (!parse_dtype(string_field(entry, "dtype", where), buffer.dtype)) throw Error(MLFF_ERROR_FILE, where + ": unknown dtype");
    if (!parse_rows(string_field(entry, "rows", where), buffer.rows) || buffer.rows == Rows::local_plus_1)
      throw Error(MLFF_ERROR_FILE, where + ": rows must be local, total or edges");
    buffer.width = number_field(entry, "width", 1, kMaxWidth, where);
    buffer.forward = false;
    const bool taken =
        std::any_of(std::begin(kInputShapes), std::end(kInputShapes), [&](const auto &i) { return buffer.name == i.name; });
    if (taken || payload_.find(buffer.name) || !buffer_index_.emplace(buffer.name, int(plan_.buffers.size())).second)
      throw Error(MLFF_ERROR_FILE, where + ": the name is taken by another buffer, a tensor or an input");
    plan_.buffers.push_back(buffer);
    written_.push_back(false);
  }

  Argument resolve(const std::string &name, const std::string &where) const {
    if (const auto it = buffer_index_.find(name); it != buffer_index_.end()) return {Argument::buffer, it->second, nullptr};
    for (int i = 0; i < kInputs; i++)
      if (name == kInputShapes[i].name) return {Argument::input, i, nullptr};
    if (const Tensor *tensor = payload_.find(name)) return {Argument::tensor, 0, tensor};
    throw Error(MLFF_ERROR_FILE, where + ": there is no buffer, tensor or input \"" + name + "\"");
  }

  void add_stage(const json &entry, std::vector<Stage> &stages) {
    const bool of_grade = &stages == &plan_.grade;
    std::string where = where_ + (of_grade ? ": grade, stage " : ": stage ") + std::to_string(stages.size());
    const std::string &kernel = string_field(entry, "kernel", where);
    where += " (" + kernel + ")";
    Stage stage{};
    const std::string &pass = entry.contains("pass") ? string_field(entry, "pass", where) : "forward";
    if (pass != "forward" && pass != "backward") throw Error(MLFF_ERROR_FILE, where + ": pass must be forward or backward");
    stage.backward = pass == "backward";
    if (!stage.backward && !stages.empty() && stages.back().backward)
      throw Error(MLFF_ERROR_FILE, where + ": a forward stage comes after a backward stage");
    if (of_grade && (stage.backward || kernel == "exchange"))
      throw Error(MLFF_ERROR_FILE, where + ": stages of grades are forward stages without an exchange");

    const std::vector<std::string> names = names_field(entry, "args", where);
    const bool exchange = kernel == "exchange";
    for (int i = 0; i < kernels_.size && !exchange; i++)
      if (kernel == kernels_.kernels[i].name) stage.kernel = &kernels_.kernels[i];
    if (!exchange && !stage.kernel) throw Error(MLFF_ERROR_FILE, where + ": this mlff has no such kernel; update mlff");

    const auto parameters = parse_signature(exchange ? "> x:f32[total,2W]" : stage.kernel->signature);
    if (names.size() != parameters.size())
      throw Error(MLFF_ERROR_FILE, where + ": the kernel takes " + std::to_string(parameters.size()) + " arguments, " +
                                       std::to_string(names.size()) + " are given");
    // The tables of elements that a kernel indexes with the species must have as many rows as there are elements.
    stage.letters['S' - 'A'] = n_species_;
    stage.letters['P' - 'A'] = int64_t(n_species_) * n_species_;
    std::vector<Equation> equations;
    for (size_t k = 0; k < names.size(); k++) {
      const std::string what = where + ": argument " + parameters[k].name + " = \"" + names[k].substr(0, 80) + "\"";
      stage.args.push_back(resolve(names[k], where));
      check_argument(parameters[k], stage, stage.args.back(), what, equations);
      const bool is_grade = stage.args.back().kind == Argument::input && stage.args.back().index == int(Input::grade);
      const bool is_result = stage.args.back().kind == Argument::input && parameters[k].written;
      if (is_grade != (of_grade && is_result))
        throw Error(MLFF_ERROR_FILE, what + ": stages of grades write \"grade\" and no other result, and nothing else touches it");
      if (std::count(names.begin(), names.end(), names[k]) > 1 && parameters[k].written)
        throw Error(MLFF_ERROR_FILE, what + " is written, and may be given only once");
    }
    std::string problem;
    if (!solve(equations, stage.letters, problem)) throw Error(MLFF_ERROR_FILE, problem);
    if (stage.letters['F' - 'A'] % kFeatureMultiple != 0)
      throw Error(MLFF_ERROR_FILE, where + ": the number of features must be a multiple of " + std::to_string(kFeatureMultiple) +
                                       ", it is " + std::to_string(stage.letters['F' - 'A']));
    for (size_t k = 0; k < names.size(); k++) {
      const Argument &argument = stage.args[k];
      if (argument.kind != Argument::buffer) continue;
      if (parameters[k].written && !exchange) written_[argument.index] = true;
      if (!stage.backward) plan_.buffers[argument.index].forward = true;
      if (exchange) plan_.max_exchange_width = std::max(plan_.max_exchange_width, int32_t(plan_.buffers[argument.index].width));
    }
    stages.push_back(std::move(stage));
  }

  // One argument against its parameter; sizes that depend on letters become equations.
  void check_argument(const Parameter &p, const Stage &stage, const Argument &argument, const std::string &what,
                      std::vector<Equation> &equations) const {
    DType dtype;
    std::vector<int64_t> sizes;
    if (argument.kind == Argument::tensor) {
      dtype = argument.constant->dtype;
      sizes = argument.constant->shape;
      if (p.written) throw Error(MLFF_ERROR_FILE, what + " is written, but it is a tensor of the file");
      if (p.has_rows)
        throw Error(MLFF_ERROR_FILE,
                    what + " must be a buffer or an input with rows " + rows_name(p.rows) + ", but it is a tensor");
      if (sizes.size() != p.dims.size())
        throw Error(MLFF_ERROR_FILE,
                    what + " must have " + std::to_string(p.dims.size()) + " dimensions, its shape is " + shape_text(sizes));
    } else {
      const bool is_buffer = argument.kind == Argument::buffer;
      const Buffer *buffer = is_buffer ? &plan_.buffers[argument.index] : nullptr;
      const InputShape *input = is_buffer ? nullptr : &kInputShapes[argument.index];
      const Rows rows = is_buffer ? buffer->rows : input->rows;
      dtype = is_buffer ? buffer->dtype : input->dtype;
      sizes = {is_buffer ? buffer->width : input->width};
      if (!p.has_rows) throw Error(MLFF_ERROR_FILE, what + " must be a tensor of the file");
      if (p.rows != rows)
        throw Error(MLFF_ERROR_FILE, what + " must have rows " + rows_name(p.rows) + ", it has rows " + rows_name(rows));
      if (!is_buffer && p.written && !input->writable)
        throw Error(MLFF_ERROR_FILE, what + " is written, but that input is read-only");
      if (!is_buffer && !stage.backward && argument.index == int(Input::gradient))
        throw Error(MLFF_ERROR_FILE, what + " exists in the backward pass only");
      if (!is_buffer && !stage.kernel) throw Error(MLFF_ERROR_FILE, what + " must be a buffer");
      if (is_buffer && (!p.written || !stage.kernel) && !written_[argument.index])
        throw Error(MLFF_ERROR_FILE, what + " is read before any stage has written it");
    }
    if (dtype != p.dtype) throw Error(MLFF_ERROR_FILE, what + " must be " + dtype_name(p.dtype) + ", it is " + dtype_name(dtype));
    for (size_t i = 0; i < sizes.size(); i++)
      equations.push_back({p.dims[i], sizes[i], what + ": dimension " + std::to_string(i + p.has_rows)});
  }

  const Payload &payload_;
  const KernelTable &kernels_;
  const int n_species_;
  const std::string where_;
  Plan plan_;
  std::map<std::string, int> buffer_index_;
  std::vector<bool> written_;
};

}  // namespace

const std::string &string_field(const json &entry, const char *key, const std::string &where) {
  const auto it = entry.is_object() ? entry.find(key) : entry.end();
  if (!entry.is_object() || it == entry.end() || !it->is_string() || it->get_ref<const std::string &>().size() > 200)
    throw Error(MLFF_ERROR_FILE, where + ": needs a text \"" + key + "\"");
  return it->get_ref<const std::string &>();
}

const json &list_field(const json &entry, const char *key, const std::string &where) {
  if (entry.is_object())
    if (const auto it = entry.find(key); it != entry.end() && it->is_array() && it->size() <= kMaxEntries) return *it;
  throw Error(MLFF_ERROR_FILE, where + ": needs a list \"" + key + "\" of at most " + std::to_string(kMaxEntries) + " entries");
}

std::vector<std::string> names_field(const json &entry, const char *key, const std::string &where) {
  std::vector<std::string> names;
  for (const json &name : list_field(entry, key, where)) {
    if (!name.is_string()) throw Error(MLFF_ERROR_FILE, where + ": " + key + " must be names");
    names.push_back(name.get<std::string>());
  }
  return names;
}

int64_t number_field(const json &entry, const char *key, int64_t least, int64_t most, const std::string &where) {
  if (entry.is_object())
    if (const auto it = entry.find(key); it != entry.end() && it->is_number_unsigned())
      if (const auto n = it->get<uint64_t>(); n >= uint64_t(least) && n <= uint64_t(most)) return int64_t(n);
  throw Error(MLFF_ERROR_FILE, where + ": the " + key + " must be a whole number from " + std::to_string(least) + " to " +
                                   std::to_string(most));
}

bool Plan::exchanges(bool backward) const {
  return std::any_of(stages.begin(), stages.end(), [&](const Stage &s) { return !s.kernel && (backward || !s.backward); });
}

Plan parse_plan(const Payload &payload, const std::string &backend, const KernelTable &kernels, int n_species,
                const std::string &name) {
  const auto plans = payload.header.find("plans");
  if (plans == payload.header.end() || !plans->is_object() || !plans->contains(backend))
    throw Error(MLFF_ERROR_FILE, name + ": the file has no plan for the " + backend + " backend; export it again");
  return Parser(payload, kernels, n_species, name + ": " + backend + " plan").parse((*plans)[backend]);
}

}  // namespace mlff
