#include "cuda/system.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace mlff::cuda {
namespace {

constexpr size_t kAlign = 256, kMaxGraphs = 4;
constexpr int64_t kFirstEdges = 64, kFirstCandidates = 128;
constexpr int64_t kRowBlock = 128;  // atoms: kernels treat whole blocks, and the last one must not end outside a buffer
constexpr int64_t kMaxDensePairs = 1 << 24, kMaxDenseCandidates = 65536;
constexpr int64_t kMaxBytes = int64_t(1) << 50;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t with_headroom(int64_t n) { return round_up(n + n / 8, 16); }

// Room for n rows, kept while it is not much too large, so that a fluctuating n uses the same graphs.
int64_t room(int64_t n, int64_t now, int64_t multiple) {
  if (n <= now && (now <= 64 * multiple || 2 * n >= now)) return now;
  return round_up(std::max<int64_t>(1, now == 0 ? n : n + n / 8), multiple);
}

// Images that the dense search looks at: candidates are counted from the nearest one.
std::array<int32_t, 3> count_images(const Cell &cell, const Basis &basis, double cutoff) {
  std::array<int32_t, 3> n{};
  for (int k = 0; k < 3; k++)
    if (cell.periodic[k]) n[k] = int32_t(std::floor(cutoff / basis.height[k] + 0.5));
  return n;
}

std::vector<const Stage *> running(std::initializer_list<const Stages *> lists, bool backward) {
  std::vector<const Stage *> result;
  for (const Stages *list : lists)
    for (const Stage &stage : *list)
      if (stage.runs(backward)) result.push_back(&stage);
  return result;
}

// Code of others runs with the context that it had.
class Suspended {
 public:
  Suspended() { MLFF_CUDA(cuCtxPopCurrent, &context_); }
  ~Suspended() { driver().cuCtxPushCurrent(context_); }
  Suspended(const Suspended &) = delete;
  Suspended &operator=(const Suspended &) = delete;

 private:
  Context context_ = nullptr;
};

}  // namespace

int64_t Capacity::bins() const { return std::max<int64_t>(round_up(2 * total, 16), 64); }

int64_t Capacity::rows(Rows rows) const {
  switch (rows) {
    case Rows::local: return local;
    case Rows::total: return total;
    case Rows::edges: return total * edges;
    case Rows::candidates: return total * candidates;
    case Rows::structures: return structures;
    case Rows::structures_plus_1: return structures + 1;
    case Rows::bins: return bins();
    case Rows::one: return 1;
  }
  return 0;
}

CudaSystem::CudaSystem(std::shared_ptr<Device> device) : System(device->model), device_(std::move(device)), plan_(device_->plan) {
  const Current current(device_->context);
  stream_ = make_stream(device_->context);
}

void CudaSystem::atoms_changed() {
  atoms_dirty_ = rebuild_ = true;
  wide_ = false;
  warm_.reset();
  detach();
}

void CudaSystem::detach() {
  if (captured_) capacity_ = {};
}

void CudaSystem::set_neighbors(const int64_t *, const int32_t *) {
  fail(MLFF_ERROR_INPUT, "the CUDA backend searches its own neighbours: call compute without a list");
}

// ---- what to run ------------------------------------------------------------------------------------------------------

bool CudaSystem::fits_dense(int64_t n, double images) const {
  const double candidates = double(n) * images;
  return n <= plan_.schedules[0].max_rows && candidates <= double(kMaxDenseCandidates) &&
         double(n) * candidates <= double(kMaxDensePairs);
}

CudaSystem::Setup CudaSystem::choose(bool dense, bool backward) const {
  const bool pieces = exchange_ || n_total_ > n_local_;
  return {dense, backward, pieces, wide_ || pieces ? int(plan_.schedules.size()) - 1 : plan_.schedule(n_total_)};
}

std::vector<const Stage *> CudaSystem::stages(const Setup &setup) const {
  static const Stages nothing;
  const Stages &search = setup.dense ? plan_.dense : plan_.list, &schedule = plan_.schedules[size_t(setup.schedule)].stages;
  const bool imports = setup.arrays && !(setup.dense && plan_.dense_takes_callers);
  return running({imports ? &plan_.imports : &nothing, &search, &schedule}, setup.backward);
}

void CudaSystem::set_boxes(const std::vector<Cell> &cells) {
  boxes_.assign(18 * cells.size(), 0.0);
  images_.assign(3 * cells.size(), 0);
  for (size_t b = 0; b < cells.size(); b++) {
    const Basis basis(cells[b]);
    for (int k = 0; k < 3; k++)
      for (int a = 0; a < 3 && cells[b].periodic[k]; a++) {
        boxes_[18 * b + 3 * k + a] = cells[b].vectors[k][a];
        boxes_[18 * b + 9 + 3 * k + a] = basis.inverse[k][a];
      }
    const auto n = count_images(cells[b], basis, model_->cutoff);
    std::copy(n.begin(), n.end(), &images_[3 * b]);
  }
}

// ---- memory -----------------------------------------------------------------------------------------------------------

size_t CudaSystem::place(const Capacity &capacity, std::vector<size_t> &offsets) const {
  if (capacity.total * std::max(capacity.edges, capacity.candidates) > INT32_MAX)
    fail(MLFF_ERROR_RESOURCE,
         "%lld atoms with %lld edges and %lld candidates each are more than the CUDA backend can count; use more ranks",
         (long long)n_total_, (long long)capacity.edges, (long long)capacity.candidates);
  int64_t size = 0;
  for (const Array &array : plan_.arrays) {
    offsets.push_back(size_t(size));
    int64_t rows = std::max<int64_t>(1, capacity.rows(array.rows));
    if (array.rows == Rows::local || array.rows == Rows::total) rows = round_up(rows, kRowBlock);
    size += round_up(rows * array.width * int64_t(dtype_size(array.dtype)), kAlign);
    if (size > kMaxBytes)
      fail(MLFF_ERROR_RESOURCE, "out of memory for %lld atoms; use a smaller system or more ranks", (long long)n_total_);
  }
  return size_t(size);
}

void CudaSystem::allocate(size_t size) {
  graphs_.clear();
  capacity_ = {};
  if (captured_) retired_.push_back(std::move(arena_));
  captured_ = false;
  arena_ = {};
  try {
    arena_ = DeviceBuffer(device_->context, size);
  } catch (const Error &e) {
    size_t available = 0, all = 0;
    if (e.status != MLFF_ERROR_RESOURCE || driver().cuMemGetInfo(&available, &all) != 0) throw;
    fail(MLFF_ERROR_RESOURCE,
         "out of memory on cuda:%d: %lld atoms need %.2f GB, %.2f GB are free; about %lld atoms fit: use a smaller system or more "
         "GPUs",
         device_->ordinal, (long long)n_total_, 1e-9 * double(size), 1e-9 * double(available),
         (long long)(double(n_total_) * double(available) / double(size)));
  }
}

void CudaSystem::make_room(const Setup &setup, int64_t dense_candidates, StreamHandle stream) {
  Capacity c;
  c.local = room(n_local_, capacity_.local, 16);
  c.total = std::max(c.local, room(n_total_, capacity_.total, 16));
  c.structures = room(n_structures(), capacity_.structures, 1);
  const bool was_dense = dense_ && capacity_.candidates > 0;
  if (setup.dense) {
    const int64_t needed = round_up(std::max<int64_t>(1, dense_candidates), 16);
    const bool keep = was_dense && capacity_.candidates >= needed && capacity_.candidates <= 2 * needed;
    c.candidates = keep ? capacity_.candidates : needed;
  } else {
    c.candidates = std::max(list_candidates_, kFirstCandidates);
  }
  c.edges = std::max(edge_capacity_, setup.dense ? std::min(kFirstEdges, c.candidates) : kFirstEdges);
  if (c == capacity_ && dense_ == setup.dense) return;  // the two searches must not meet what the other has left

  warm_.reset();
  std::vector<size_t> offsets;
  const size_t size = place(c, offsets);
  if (size > arena_.bytes() || captured_) allocate(size);
  MLFF_CUDA(cuMemsetD32Async, arena_.get(), 0, size / 4, stream);
  offsets_ = std::move(offsets);
  capacity_ = c;
  dense_ = setup.dense;
  for (auto &mirror : mirrors_) mirror.clear();
  atoms_dirty_ = rebuild_ = clean_ = true;
}

void CudaSystem::put(Input input, const void *data, size_t bytes, StreamHandle stream) {
  std::vector<std::byte> &mirror = mirrors_[input];
  if (bytes == 0 || (mirror.size() == bytes && std::memcmp(mirror.data(), data, bytes) == 0)) return;
  const auto *begin = static_cast<const std::byte *>(data);
  mirror.assign(begin, begin + bytes);
  MLFF_CUDA(cuMemcpyHtoDAsync, pointer(input), mirror.data(), bytes, stream);
}

void CudaSystem::upload(const Setup &setup, StreamHandle stream) {
  if (!clean_) {
    MLFF_CUDA(cuMemsetD32Async, pointer(kFlags), 0, 16, stream);
    for (auto &mirror : mirrors_) mirror.clear();
    atoms_dirty_ = rebuild_ = true;
  }
  clean_ = false;
  if (atoms_dirty_) {
    std::vector<int32_t> structure(size_t(n_total_), 0), starts(starts_.begin(), starts_.end());
    for (size_t b = 0; b + 1 < starts.size(); b++)
      std::fill(structure.begin() + starts[b], structure.begin() + starts[b + 1], int32_t(b));
    put(kElements, species_.data(), species_.size() * sizeof(int32_t), stream);
    put(kStructure, structure.data(), structure.size() * sizeof(int32_t), stream);
    put(kStarts, starts.data(), starts.size() * sizeof(int32_t), stream);
    atoms_dirty_ = false;
  }
  const bool permute = !setup.dense && !setup.pieces;  // rows that are exchanged are in the caller's order
  const int32_t counts[4] = {int32_t(n_local_), int32_t(n_total_), n_structures(), permute};
  put(kCounts, counts, sizeof counts, stream);
  put(kImages, images_.data(), images_.size() * sizeof(int32_t), stream);
  if (rebuild_) MLFF_CUDA(cuMemsetD32Async, pointer(kRebuild), 1, 1, stream);
}

size_t CudaSystem::bytes() const {
  size_t bytes = arena_.bytes() + positions_.bytes() + results_.bytes() + exchanged_.bytes();
  for (const DeviceBuffer &buffer : retired_) bytes += buffer.bytes();
  return bytes;
}

// ---- launches ---------------------------------------------------------------------------------------------------------

void CudaSystem::launch(const Stage &stage, StreamHandle stream, bool overlap, const Callers &caller) {
  const Device::Function &function = device_->function(stage.kernel);
  const int32_t scalars[kScalars] = {int32_t(capacity_.edges), int32_t(capacity_.candidates)};
  DevicePointer values[kMaxArguments + 2];
  void *parameters[kMaxArguments + 2];
  for (size_t k = 0; k < stage.args.size() + 2; k++) {
    parameters[k] = &values[k];
    values[k] = 0;  // as the last two stay, Triton's scratch areas
    if (k >= stage.args.size()) continue;
    const Argument &a = stage.args[k];
    switch (a.kind) {
      case Argument::array: values[k] = pointer(a.index); break;
      case Argument::tensor: values[k] = device_->tensor(a.index); break;
      case Argument::caller: values[k] = caller[size_t(a.index)]; break;
      case Argument::scalar: std::memcpy(&values[k], &scalars[a.index], sizeof(int32_t)); break;
    }
  }
  const int64_t rows = std::max<int64_t>(1, capacity_.rows(stage.grid_rows));
  const int64_t programs = (rows + stage.rows_per_block - 1) / stage.rows_per_block * stage.programs_per_block;
  if (programs > INT32_MAX) fail(MLFF_ERROR_RESOURCE, "%lld atoms are more than one GPU kernel can count; use more ranks", (long long)n_total_);
  LaunchAttribute attribute{kAttributeOverlap, {}, {1}};
  const LaunchConfig config{unsigned(programs), 1,         1, function.threads, 1, 1, function.shared_bytes, stream,
                            &attribute,         unsigned(overlap)};
  MLFF_CUDA(cuLaunchKernel, &config, function.handle, parameters, nullptr);
}

void CudaSystem::launch(std::span<const Stage *const> stages, StreamHandle stream, const Callers &caller) {
  bool overlap = false;  // with what was in the stream before: nobody knows what that is
  for (const Stage *stage : stages) {
    if (stage->kernel < 0) continue;
    launch(*stage, stream, overlap, caller);
    overlap = device_->overlaps();
  }
}

CudaSystem::Graphs &CudaSystem::graphs(const Setup &setup, const Callers &caller) {
  const auto known = std::find_if(graphs_.begin(), graphs_.end(), [&](const Graphs &g) {
    return g.setup == setup && g.capacity == capacity_ && g.caller == caller;
  });
  const bool is_new = known == graphs_.end();
  if (is_new) {
    if (graphs_.size() == kMaxGraphs) graphs_.erase(graphs_.begin());
    graphs_.push_back({setup, capacity_, caller, {}, {}});
  } else {
    std::rotate(known, known + 1, graphs_.end());
  }
  Graphs &graphs = graphs_.back();
  if (!graphs.pieces.empty() || (is_new && setup.arrays)) return graphs;
  const auto list = stages(setup);
  for (const Stage *stage : list)
    if (stage->kernel >= 0) device_->function(stage->kernel);  // code cannot be loaded during a capture
  std::vector<GraphExec> pieces;
  std::vector<int> exchanges;
  for (auto it = list.begin();; it++) {
    const auto end = std::find_if(it, list.end(), [&](const Stage *s) { return s->kernel < 0 && setup.pieces; });
    GraphExec piece;
    if (std::any_of(it, end, [](const Stage *s) { return s->kernel >= 0; }))
      piece = capture(device_->context, stream_.get(), [&] {
        launch({it, end}, stream_.get(), caller);
      });
    pieces.push_back(std::move(piece));
    if ((it = end) == list.end()) break;
    exchanges.push_back((*it)->args[0].index);
  }
  graphs.pieces = std::move(pieces), graphs.exchanges = std::move(exchanges);
  return graphs;
}

bool CudaSystem::run(const Setup &setup, StreamHandle stream, const Callers &caller) {
  const Graphs &g = graphs(setup, caller);
  if (g.pieces.empty()) launch(stages(setup), stream, caller);
  for (size_t k = 0; k < g.pieces.size(); k++) {
    if (g.pieces[k]) MLFF_CUDA(cuGraphLaunch, g.pieces[k].get(), stream);
    if (k < g.exchanges.size() && !exchange_rows(g, k, stream)) return false;
  }
  return true;
}

bool CudaSystem::exchange_rows(const Graphs &graphs, size_t number, StreamHandle stream) {
  const int array = graphs.exchanges[number];
  const bool first = number == 0;
  const int64_t width = plan_.arrays[size_t(array)].width, row = width * int64_t(sizeof(float));
  auto *rows = static_cast<float *>(exchanged_.reserve(device_->context, size_t(n_total_ * row) + 16 * sizeof(int32_t)));
  auto *flags = reinterpret_cast<int32_t *>(rows + n_total_ * width);
  MLFF_CUDA(cuMemcpyDtoHAsync, rows, pointer(array), size_t(n_local_ * row), stream);
  if (first) MLFF_CUDA(cuMemcpyDtoHAsync, flags, pointer(kFlags), 16 * sizeof(int32_t), stream);
  MLFF_CUDA(cuStreamSynchronize, stream);
  // A rank that evaluates again must do so before it has exchanged anything: the others count the exchanges.
  if (first && must_repeat(flags, graphs.setup)) return false;
  {
    const Suspended suspended;
    exchange(rows, int32_t(width));
  }
  for (int64_t k = n_local_; !originals_.empty() && k < n_total_; k++)
    if (originals_[size_t(k)] != k) std::copy_n(rows + originals_[size_t(k)] * width, width, rows + k * width);
  if (n_total_ > n_local_)
    MLFF_CUDA(cuMemcpyHtoDAsync, pointer(array) + DevicePointer(n_local_ * row), rows + n_local_ * width,
              size_t((n_total_ - n_local_) * row), stream);
  return true;
}

bool CudaSystem::must_repeat(const int32_t *flags, const Setup &setup) {
  if (flags[3])
    fail(MLFF_ERROR_INPUT, "the position of atom %d is not finite, or absurdly far from the cell or the other atoms",
         flags[3] - 1);
  if (flags[4] && flags[5]) fail_coincident(std::min(flags[4], flags[5]) - 1, std::max(flags[4], flags[5]) - 1);
  bool repeat = false;
  if (flags[0] > capacity_.edges) edge_capacity_ = with_headroom(flags[0]), repeat = true;
  if (flags[1] > capacity_.candidates && !setup.dense) list_candidates_ = with_headroom(flags[1]), repeat = true;
  if (repeat) return true;
  if (flags[1] > capacity_.candidates)
    fail(MLFF_ERROR_INTERNAL, "the dense search met %d candidates of an atom, there is room for %lld", flags[1],
         (long long)capacity_.candidates);
  if (!flags[7] || flags[6]) return false;
  if (setup.schedule + 1 < int(plan_.schedules.size())) return wide_ = true;
  fail(MLFF_ERROR_INPUT,
       "the energy of atom %d, or the force on it, is not finite: the structure is outside what the model can evaluate", flags[7] - 1);
}

// ---- arrays of the host -----------------------------------------------------------------------------------------------

void CudaSystem::compute(const double *positions, const mlff_results &results) {
  evaluated_ = false;
  check_ready(positions);
  check_one_structure("compute");
  set_boxes({Cell{}});
  evaluate(positions, choose(false, results.forces || results.virial || results.atom_virial), results);
}

void CudaSystem::compute_periodic(const double *positions, const double *cell, const int32_t *pbc, const mlff_results &results) {
  check_one_structure("compute_periodic");
  compute_batch(positions, cell, pbc, results);
}

void CudaSystem::compute_batch(const double *positions, const double *cells, const int32_t *pbcs, const mlff_results &results) {
  evaluated_ = false;
  check_ready(positions);
  check_no_ghosts(n_structures() == 1 ? "compute_periodic" : "compute_batch");
  std::vector<Cell> all;
  for (int32_t b = 0; b < n_structures(); b++) try {
      all.push_back(make_cell(cells ? cells + 9 * b : nullptr, pbcs ? pbcs + 3 * b : nullptr, model_->cutoff));
    } catch (const Error &e) {
      if (n_structures() == 1) throw;
      fail(e.status, "structure %d, which begins with atom %lld: %s", b, (long long)starts_[size_t(b)], e.what());
    }
  set_boxes(all);
  bool dense = true;
  dense_candidates_ = 0;
  for (int32_t b = 0; b < n_structures(); b++) {
    const int64_t n = starts_[size_t(b) + 1] - starts_[size_t(b)];
    const double candidates = double(n) * images_in(&images_[3 * size_t(b)]);
    if (n_structures() == 1) dense = fits_dense(n, images_in(images_.data()));
    if (n_structures() > 1 && candidates > double(kMaxDenseCandidates))
      fail(MLFF_ERROR_INPUT,
           "structure %d has %lld atoms and %.0f images of each to look at, more than a batch allows (%lld in all); evaluate it "
           "alone",
           b, (long long)n, images_in(&images_[3 * size_t(b)]), (long long)kMaxDenseCandidates);
    if (dense) dense_candidates_ = std::max(dense_candidates_, int64_t(candidates));
  }
  evaluate(positions, choose(dense, results.forces || results.virial || results.atom_virial), results);
}

void CudaSystem::evaluate(const double *positions, Setup setup, const mlff_results &results) {
  const auto list = stages(setup);
  check_grade(results);
  check_exchange(std::any_of(list.begin(), list.end(), [](const Stage *s) { return s->kernel < 0; }));
  if (n_local_ == 0) {
    evaluate_nothing(setup, results);
    evaluated_ = true;
    return;
  }
  const Current current(device_->context);
  const StreamHandle stream = stream_.get();
  warm_.reset();  // boxes and images are the host's now
  detach();
  auto *staged = static_cast<double *>(positions_.reserve(device_->context, size_t(3 * n_total_) * sizeof(double)));
  std::copy_n(positions, 3 * n_total_, staged);
  for (int round = 0; round < kMaxRounds; round++) {
    setup = choose(setup.dense, setup.backward);
    make_room(setup, dense_candidates_, stream);
    upload(setup, stream);
    put(kBoxes, boxes_.data(), boxes_.size() * sizeof(double), stream);
    MLFF_CUDA(cuMemcpyHtoDAsync, pointer(kPositions), staged, size_t(3 * n_total_) * sizeof(double), stream);
    if (!run(setup, stream)) continue;
    if (results.extrapolation_grade) launch(running({&plan_.grade}, setup.backward), stream);
    const int32_t *flags = fetch(results);
    clean_ = true;
    rebuild_ = true;
    if (must_repeat(flags, setup)) continue;
    if (flags[6]) fail(MLFF_ERROR_INTERNAL, "the device asks for more images of structure %d than its cell needs", flags[6] - 1);
    rebuild_ = false;
    deliver(results);
    evaluated_ = true;
    return;
  }
  fail(MLFF_ERROR_INTERNAL, "the neighbour search still asks for more room after %d evaluations", kMaxRounds);
}

void CudaSystem::evaluate_nothing(const Setup &setup, const mlff_results &results) const {
  const int64_t n = n_structures();
  if (results.energy) std::fill_n(results.energy, n, 0.0);
  if (results.virial) std::fill_n(results.virial, 6 * n, 0.0);
  if (results.forces) std::fill_n(results.forces, 3 * n_total_, 0.0);
  if (results.atom_virial) std::fill_n(results.atom_virial, 6 * n_total_, 0.0);
  for (const Stage *stage : stages(setup)) {
    if (stage->kernel >= 0 || !exchange_) continue;
    const int64_t width = plan_.arrays[size_t(stage->args[0].index)].width;
    std::vector<float> rows(size_t(std::max<int64_t>(1, n_total_ * width)), 0.0f);
    exchange(rows.data(), int32_t(width));
  }
}

const int32_t *CudaSystem::fetch(const mlff_results &results) {
  // The results lie in the arena in the order of Input: the usual ones come with one copy.
  const size_t energies_end = offsets_[kVirials] + 6 * sizeof(double) * size_t(n_structures());
  const size_t forces_end = offsets_[kForces] + 3 * sizeof(double) * size_t(n_total_);
  struct Part {
    size_t begin, end;
  };
  std::vector<Part> parts = {{offsets_[kStatus], results.forces ? forces_end : energies_end}};
  if (results.atom_energy) parts.push_back({offsets_[kAtomEnergy], offsets_[kAtomEnergy] + sizeof(double) * size_t(n_local_)});
  if (results.extrapolation_grade) parts.push_back({offsets_[kGrade], offsets_[kGrade] + sizeof(double) * size_t(n_local_)});
  if (results.atom_virial) parts.push_back({offsets_[kAtomVirial], offsets_[kAtomVirial] + 6 * sizeof(double) * size_t(n_total_)});
  size_t size = 0;
  for (const Part &part : parts) size += size_t(round_up(int64_t(part.end - part.begin), kAlign));
  auto *host = static_cast<std::byte *>(results_.reserve(device_->context, size));
  result_offsets_.assign(kInputs, 0);
  for (size_t used = 0; const Part &part : parts) {
    MLFF_CUDA(cuMemcpyDtoHAsync, host + used, arena_.get() + part.begin, part.end - part.begin, stream_.get());
    for (int k = 0; k < kPositions; k++)
      if (offsets_[size_t(k)] >= part.begin && offsets_[size_t(k)] < part.end)
        result_offsets_[size_t(k)] = used + offsets_[size_t(k)] - part.begin;
    used += size_t(round_up(int64_t(part.end - part.begin), kAlign));
  }
  MLFF_CUDA(cuStreamSynchronize, stream_.get());
  return reinterpret_cast<const int32_t *>(host + result_offsets_[kStatus]);
}

void CudaSystem::deliver(const mlff_results &results) const {
  const auto *host = static_cast<const std::byte *>(results_.data());
  const auto copy = [&](Input input, double *out, int64_t rows, int64_t width) {
    if (!out) return;
    const auto *in = reinterpret_cast<const double *>(host + result_offsets_[input]);
    for (int64_t k = 0; !all_finite(in, rows * width) && k < rows * width; k++)
      if (!std::isfinite(in[k]))
        fail(MLFF_ERROR_INPUT, "%s %lld is not finite: the structure is outside what the model can evaluate",
             input == kForces                          ? "the force on atom"
             : input == kEnergies || input == kVirials ? "a result of structure"
                                                       : "a result of atom",
             (long long)(k / width));
    std::copy_n(in, rows * width, out);
  };
  copy(kEnergies, results.energy, n_structures(), 1);
  copy(kVirials, results.virial, n_structures(), 6);
  copy(kAtomEnergy, results.atom_energy, n_local_, 1);
  copy(kForces, results.forces, n_total_, 3);
  copy(kAtomVirial, results.atom_virial, n_total_, 6);
  copy(kGrade, results.extrapolation_grade, n_local_, 1);
  for (int64_t k = n_local_; !originals_.empty() && k < n_total_; k++) {  // what belongs to an image goes to its original
    const int64_t first = originals_[size_t(k)];
    if (first == k) continue;
    for (auto [out, width] : {std::pair(results.forces, 3), std::pair(results.atom_virial, 6)})
      for (int a = 0; out && a < width; a++) out[width * first + a] += std::exchange(out[width * k + a], 0.0);
  }
}

void CudaSystem::edges(int64_t *n_edges, int32_t *centers, int32_t *neighbors, double *vectors) const {
  if (!evaluated_ || n_structures() != 1) no_edges();
  if (n_local_ == 0) {
    if (n_edges) *n_edges = 0;
    return;
  }
  const Current current(device_->context);
  const auto download = [&]<class T>(const char *name, int64_t rows, std::vector<T> &out) {
    const int k = plan_.find(name);
    if (k < 0 || dtype_size(plan_.arrays[size_t(k)].dtype) != sizeof(T) || capacity_.rows(plan_.arrays[size_t(k)].rows) < rows)
      fail(MLFF_ERROR_INTERNAL, "the plan keeps no %s of edges", name);
    const int64_t width = plan_.arrays[size_t(k)].width;
    out.resize(size_t(rows * width));
    MLFF_CUDA(cuMemcpyDtoHAsync, out.data(), pointer(k), out.size() * sizeof(T), stream_.get());
    MLFF_CUDA(cuStreamSynchronize, stream_.get());
    return width;
  };
  std::vector<int32_t> count;
  download("edge_count", n_local_, count);
  if (n_edges) *n_edges = std::accumulate(count.begin(), count.end(), int64_t(0));
  if (!centers && !neighbors && !vectors) return;

  std::vector<int32_t> order, sources;
  std::vector<float> geometry;
  std::vector<double> distance;
  download("order", n_total_, order);
  download("neighbors", n_local_ * capacity_.edges, sources);
  download("distance", n_local_ * capacity_.edges, distance);
  const int64_t width = download("geometry", n_local_ * capacity_.edges, geometry);
  struct Edge {
    int32_t center, neighbor;
    std::array<double, 3> vector;
    auto operator<=>(const Edge &) const = default;
  };
  std::vector<Edge> all;
  for (int64_t i = 0; i < n_local_; i++)
    for (int64_t e = i * capacity_.edges; e < i * capacity_.edges + count[size_t(i)]; e++) {
      Edge edge{order[size_t(i)], order[size_t(sources[size_t(e)])], {}};
      if (!originals_.empty()) edge.neighbor = originals_[size_t(edge.neighbor)];
      for (int a = 0; a < 3; a++) edge.vector[size_t(a)] = distance[size_t(e)] * double(geometry[size_t(e * width + a)]);
      all.push_back(edge);
    }
  std::sort(all.begin(), all.end());
  for (size_t e = 0; e < all.size(); e++) {
    if (centers) centers[e] = all[e].center;
    if (neighbors) neighbors[e] = all[e].neighbor;
    if (vectors) std::copy_n(all[e].vector.data(), 3, vectors + 3 * e);
  }
}

}  // namespace mlff::cuda
