// A stand-in for libcuda.so.1: the driver functions that plugin/cuda/driver.h uses, on the host, with a model of pairs as its
// machine code.
//
// One GPU unless FAKE_CUDA_COUNT says otherwise; FAKE_CUDA_VERSION, FAKE_CUDA_ARCH (90) and FAKE_CUDA_MEMORY (bytes) set the rest.
// It is strict: without a current context, or for what must not happen while a stream captures, calls fail as the driver's do, and
// new memory is not zero. Energy of the model: 1/2 sum_ij q_i q_j (rc - d_ij)^2, q from the elements (1, 2, ...), of ghosts by the
// exchange of x = [q, 0].
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Pointer = unsigned long long;
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, NO_CONTEXT = 201, NOT_FOUND = 500, CAPTURING = 900 };

long setting(const char *name, long otherwise) {
  const char *text = std::getenv(name);
  return text && *text ? std::atol(text) : otherwise;
}

thread_local std::vector<void *> contexts;
thread_local int captures_here = 0;  // streams of this thread that are capturing
int the_context;
std::map<Pointer, size_t> memory;
size_t used = 0;
std::map<std::string, long> counters;

// ---- machine code: arguments by position, one call for the whole grid ---------------------------------------------------

using Args = void *const *;
template <class T>
T *at(Args a, int k) {
  return *static_cast<T *const *>(a[k]);
}
int scalar(Args a, int k) { return *static_cast<const int32_t *>(a[k]); }

void raise(int32_t *flag, int value) { *flag = std::max(*flag, value); }

// counts positions elements structure starts boxes images cutoff order edge_count neighbors distance geometry flags rebuild,
// edge_capacity candidate_capacity
void search(Args a, bool dense) {
  const auto *counts = at<int32_t>(a, 0), *elements = at<int32_t>(a, 2), *structure = at<int32_t>(a, 3),
             *starts = at<int32_t>(a, 4);
  const auto *x = at<double>(a, 1), *boxes = at<double>(a, 5), *cutoff = at<double>(a, 7);
  const auto *images = at<int32_t>(a, 6);
  auto *order = at<int32_t>(a, 8), *edge_count = at<int32_t>(a, 9), *neighbors = at<int32_t>(a, 10), *flags = at<int32_t>(a, 13);
  auto *distance = at<double>(a, 11);
  auto *geometry = at<float>(a, 12);
  auto *rebuild = at<int32_t>(a, 14);
  const int edges = scalar(a, 15), candidates = scalar(a, 16), n_total = counts[1];
  if (!dense && *rebuild) {
    flags[8] = 1;
    for (int i = 0; i < n_total; i++) order[i] = counts[3] ? n_total - 1 - i : i;  // a permutation that shows
  }
  for (int i = 0; dense && i < n_total; i++) order[i] = i;
  for (int b = 0; b < counts[2]; b++)
    for (int k = 0; k < 3 && dense; k++) {
      const double *inv = boxes + 18 * b + 9 + 3 * k;
      if (int(*cutoff * std::sqrt(inv[0] * inv[0] + inv[1] * inv[1] + inv[2] * inv[2]) + 0.5) > images[3 * b + k])
        raise(flags + 6, b + 1);
    }
  for (int i = 0; i < n_total; i++) {
    const int b = structure[i], ci = order[i];
    const double *cell = boxes + 18 * b, *inv = cell + 9;
    int n = 0, seen = 0;
    for (int j = starts[b]; j < starts[b + 1]; j++) {
      const int cj = order[j];
      double r0[3];
      int m[3], reach[3];
      for (int k = 0; k < 3; k++) {
        r0[k] = x[3 * cj + k] - x[3 * ci + k];
        if (!std::isfinite(x[3 * ci + k])) raise(flags + 3, ci + 1);
        reach[k] = dense ? images[3 * b + k] : inv[3 * k] || inv[3 * k + 1] || inv[3 * k + 2] ? 3 : 0;
      }
      double nearest[3] = {r0[0], r0[1], r0[2]};
      for (int k = 0; k < 3; k++) {
        const double turns = std::round(inv[3 * k] * r0[0] + inv[3 * k + 1] * r0[1] + inv[3 * k + 2] * r0[2]);
        for (int c = 0; c < 3; c++) nearest[c] -= turns * cell[3 * k + c];
      }
      for (m[0] = -reach[0]; m[0] <= reach[0]; m[0]++)
        for (m[1] = -reach[1]; m[1] <= reach[1]; m[1]++)
          for (m[2] = -reach[2]; m[2] <= reach[2]; m[2]++) {
            double r[3], d2 = 0;
            for (int c = 0; c < 3; c++) {
              r[c] = nearest[c] + m[0] * cell[c] + m[1] * cell[3 + c] + m[2] * cell[6 + c];
              d2 += r[c] * r[c];
            }
            const double d = std::sqrt(d2);
            seen += dense || d < *cutoff + 1;
            if (elements[ci] < 0 || elements[cj] < 0 || d >= *cutoff || (i == j && d < 1e-9)) continue;
            if (d < 1e-6 && ci < cj) raise(flags + 4, ci + 1), raise(flags + 5, cj + 1);
            if (n < edges) {
              const int64_t e = int64_t(i) * edges + n;
              neighbors[e] = j, distance[e] = d;
              for (int c = 0; c < 3; c++) geometry[4 * e + c] = float(r[c] / d);
              geometry[4 * e + 3] = float(d);
            }
            n++;
          }
    }
    edge_count[i] = std::min(n, edges);
    raise(flags, n), raise(flags + 1, seen);
    if (dense && seen > candidates) std::abort();  // the host promises room
  }
}
void list(Args a) { search(a, false); }

// counts elements order x
void features(Args a) {
  const auto *counts = at<int32_t>(a, 0), *elements = at<int32_t>(a, 1), *order = at<int32_t>(a, 2);
  auto *x = at<float>(a, 3);
  for (int i = 0; i < counts[0]; i++) x[2 * i] = float(elements[order[i]] + 1), x[2 * i + 1] = 0;
  if (setting("FAKE_CUDA_TOO_LARGE", 0) > 1) x[0] = std::numeric_limits<float>::quiet_NaN();
}

// For few atoms. FAKE_CUDA_TOO_LARGE: 1 for this kernel, 2 for the one of many atoms too.
void features_few(Args a) {
  features(a);
  if (setting("FAKE_CUDA_TOO_LARGE", 0) > 0) at<float>(a, 3)[0] = std::numeric_limits<float>::quiet_NaN();
}

// counts order x grade
void extrapolation(Args a) {
  const auto *counts = at<int32_t>(a, 0), *order = at<int32_t>(a, 1);
  const auto *x = at<float>(a, 2);
  auto *grade = at<double>(a, 3);
  for (int i = 0; i < counts[0]; i++) grade[order[i]] = 100.0 * x[2 * i] + order[i];
}

// counts order edge_count neighbors distance geometry cutoff x atom_energy forces atom_virial, edge_capacity
void pairs(Args a, bool backward) {
  const auto *counts = at<int32_t>(a, 0), *order = at<int32_t>(a, 1), *edge_count = at<int32_t>(a, 2),
             *neighbors = at<int32_t>(a, 3);
  const auto *distance = at<double>(a, 4), *cutoff = at<double>(a, 6);
  const auto *geometry = at<float>(a, 5), *x = at<float>(a, 7);
  auto *atom_energy = at<double>(a, 8), *forces = at<double>(a, 9), *atom_virial = at<double>(a, 10);
  for (int i = 0; i < counts[1]; i++) {
    double energy = 0, f[3] = {}, w[6] = {};
    for (int64_t e = int64_t(i) * scalar(a, 11), end = e + (i < counts[0] ? edge_count[i] : 0); e < end; e++) {
      const double qq = x[2 * i] * x[2 * neighbors[e]], s = *cutoff - distance[e], d = distance[e];
      const float *u = geometry + 4 * e;
      energy += 0.5 * qq * s * s;
      for (int c = 0; c < 3; c++) f[c] -= 2 * qq * s * u[c];
      constexpr int first[6] = {0, 1, 2, 0, 0, 1}, second[6] = {0, 1, 2, 1, 2, 2};
      for (int c = 0; c < 6; c++) w[c] += qq * s * d * u[first[c]] * u[second[c]];
    }
    if (!backward) atom_energy[order[i]] = energy;
    for (int c = 0; backward && c < 3; c++) forces[3 * order[i] + c] = f[c];
    for (int c = 0; backward && c < 6; c++) atom_virial[6 * order[i] + c] = w[c];
  }
}
void energy(Args a) { pairs(a, false); }
void gradient(Args a) { pairs(a, true); }

// counts starts atom_energy forces atom_virial flags energies virials status rebuild, edge_capacity candidate_capacity,
// caller_atoms units caller_energy caller_forces
void total(Args a) {
  const auto *counts = at<int32_t>(a, 0), *starts = at<int32_t>(a, 1);
  auto *atom_energy = at<double>(a, 2), *forces = at<double>(a, 3), *atom_virial = at<double>(a, 4);
  auto *flags = at<int32_t>(a, 5), *status = at<int32_t>(a, 8);
  auto *energies = at<double>(a, 6), *virials = at<double>(a, 7);
  const bool bad = flags[0] > scalar(a, 10) || flags[1] > scalar(a, 11) || flags[3] || flags[4] || flags[6];
  for (int b = 0; b < counts[2]; b++) {
    energies[b] = 0;
    std::fill_n(virials + 6 * b, 6, 0.0);
    for (int i = starts[b]; i < starts[b + 1]; i++) {
      if (!std::isfinite(atom_energy[i])) raise(flags + 7, i + 1);
      if (i < counts[0]) energies[b] += atom_energy[i];
      for (int c = 0; c < 6; c++) virials[6 * b + c] += atom_virial[6 * i + c];
    }
    if (bad) energies[b] = std::numeric_limits<double>::quiet_NaN();
  }
  if (bad) std::fill_n(forces, 3 * counts[1], std::numeric_limits<double>::quiet_NaN());
  std::copy_n(flags, 16, status);
  std::fill_n(flags, 16, 0);
  *at<int32_t>(a, 9) = 0;
  const auto *atoms = at<int32_t>(a, 12);
  const auto *units = at<double>(a, 13);
  if (at<double>(a, 14)) *at<double>(a, 14) = units[1] * *energies;
  for (int i = 0; at<double>(a, 15) && i < 3 * counts[0]; i++) {
    const int k = 3 * atoms[i / 3] + i % 3;
    if (units[3] != 0)
      at<float>(a, 15)[k] = float(units[2] * forces[i]);
    else
      at<double>(a, 15)[k] = units[2] * forces[i];
  }
}

// counts caller_positions caller_box caller_atoms units positions boxes; without a box boxes stay as they are
template <class T>
void load_as(Args a) {
  const auto *counts = at<int32_t>(a, 0), *atoms = at<int32_t>(a, 3);
  const T *x = at<T>(a, 1), *box = at<T>(a, 2);
  const double unit = *at<double>(a, 4);
  auto *positions = at<double>(a, 5), *boxes = at<double>(a, 6);
  for (int i = 0; i < 3 * counts[0]; i++) positions[i] = unit * x[3 * atoms[i / 3] + i % 3];
  if (box) std::fill_n(boxes, 18, 0.0);
  for (int k = 0; box && k < 3; k++)  // orthogonal boxes are enough here
    if (box[4 * k] != 0) boxes[4 * k] = unit * box[4 * k], boxes[9 + 4 * k] = 1 / boxes[4 * k];
}
void load(Args a) { at<double>(a, 4)[3] != 0 ? load_as<float>(a) : load_as<double>(a); }
// As list, then caller_positions caller_box caller_atoms units
void dense(Args a) {
  void *const own[] = {a[0], a[17], a[18], a[19], a[20], a[1], a[5]};
  if (at<double>(a, 17)) load(own);
  search(a, true);
}

}  // namespace

struct FunctionObject {
  const char *name;
  void (*code)(Args);
  int n;
  int shared = 49152;
};

namespace {

FunctionObject functions[] = {{"extrapolation", extrapolation, 4}, {"dense", dense, 21},         {"list", list, 17},          {"features", features, 4}, {"features_few", features_few, 4},
                              {"energy", energy, 12},       {"gradient", gradient, 12},  {"total", total, 16},
                              {"load", load, 7}};

struct Launch {
  FunctionObject *function;
  std::vector<Pointer> values;
  void run() {
    std::vector<void *> args;
    for (Pointer &value : values) args.push_back(&value);
    counters["launches"]++;
    function->code(args.data());
  }
};

}  // namespace

struct GraphObject {
  std::vector<Launch> launches;
};
struct StreamObject {
  bool capturing = false;
  GraphObject recorded;
};
static StreamObject default_stream;
static StreamObject &object(StreamObject *stream) { return stream ? *stream : default_stream; }

#define NEEDS_CONTEXT \
  if (contexts.empty()) return NO_CONTEXT
#define NOT_WHILE_CAPTURING \
  NEEDS_CONTEXT;            \
  if (captures_here > 0) return CAPTURING

API long fake_counter(const char *name) {
  const std::string key = name;
  return key == "used" ? long(used) : key == "contexts" ? long(contexts.size()) : counters[key];
}
API int cuInit(unsigned) { return setting("FAKE_CUDA_COUNT", 1) ? OK : NO_DEVICE; }
API int cuDriverGetVersion(int *version) { return *version = int(setting("FAKE_CUDA_VERSION", 13000)), OK; }
API int cuGetErrorString(int error, const char **text) {
  *text = error == OUT_OF_MEMORY ? "out of memory"
          : error == NO_CONTEXT  ? "invalid device context"
          : error == NOT_FOUND   ? "named symbol not found"
          : error == CAPTURING   ? "operation not permitted when stream is capturing"
                                 : "invalid argument";
  return OK;
}
API int cuDeviceGetCount(int *count) { return *count = int(setting("FAKE_CUDA_COUNT", 1)), OK; }
API int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, OK; }
API int cuDeviceGetName(char *name, int size, int) { return std::strncpy(name, "Fake GPU", size_t(size)), OK; }
API int cuDeviceGetAttribute(int *value, int attribute, int) {
  const int arch = int(setting("FAKE_CUDA_ARCH", 90));
  return *value = attribute == 75 ? arch / 10 : attribute == 76 ? arch % 10 : 232448, OK;
}
API int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &the_context, OK; }
API int cuCtxPushCurrent_v2(void *context) { return contexts.push_back(context), OK; }
API int cuCtxPopCurrent_v2(void **context) {
  NEEDS_CONTEXT;
  *context = contexts.back();
  contexts.pop_back();
  return OK;
}
API int cuModuleLoadData(void **module, const void *image) {
  NOT_WHILE_CAPTURING;
  counters[std::memcmp(image,
                       "\x7f"
                       "ELF",
                       4) == 0
               ? "cubins"
               : "ptx"]++;
  return *module = new int, OK;
}
API int cuModuleUnload(void *module) { return delete static_cast<int *>(module), OK; }
API int cuModuleGetFunction(FunctionObject **function, void *, const char *name) {
  NEEDS_CONTEXT;
  for (FunctionObject &f : functions)
    if (std::strcmp(f.name, name) == 0) return *function = &f, OK;
  return NOT_FOUND;
}
API int cuFuncSetAttribute(FunctionObject *function, int attribute, int value) {
  NEEDS_CONTEXT;
  if (attribute == 9) return value >= -1 && value <= 100 ? OK : INVALID;
  return attribute == 8 ? function->shared = value, OK : INVALID;
}
API int cuMemGetInfo_v2(size_t *free, size_t *all) {
  NEEDS_CONTEXT;
  *all = size_t(setting("FAKE_CUDA_MEMORY", 1L << 33));
  return *free = *all - used, OK;
}
API int cuMemAlloc_v2(Pointer *pointer, size_t bytes) {
  NOT_WHILE_CAPTURING;
  if (bytes == 0) return INVALID;
  if (used + bytes > size_t(setting("FAKE_CUDA_MEMORY", 1L << 33))) return OUT_OF_MEMORY;
  *pointer = Pointer(uintptr_t(std::aligned_alloc(256, (bytes + 255) / 256 * 256)));
  std::memset(reinterpret_cast<void *>(*pointer), 0xcd, bytes);
  counters["allocations"]++;
  return memory[*pointer] = bytes, used += bytes, OK;
}
API int cuMemFree_v2(Pointer pointer) {
  NOT_WHILE_CAPTURING;
  if (!memory.count(pointer)) return INVALID;
  used -= memory[pointer];
  memory.erase(pointer);
  return std::free(reinterpret_cast<void *>(pointer)), OK;
}
API int cuMemHostAlloc(void **pointer, size_t bytes, unsigned) {
  NOT_WHILE_CAPTURING;
  return *pointer = std::malloc(bytes), OK;
}
API int cuMemFreeHost(void *pointer) { return std::free(pointer), OK; }

// Whether the range lies in one allocation: a copy outside it is a fault of the caller.
static bool inside(Pointer pointer, size_t bytes) {
  const auto next = memory.upper_bound(pointer);
  return next != memory.begin() && pointer + bytes <= std::prev(next)->first + std::prev(next)->second;
}
API int cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t bytes, StreamObject *stream) {
  NOT_WHILE_CAPTURING;
  if (object(stream).capturing || !inside(to, bytes)) return INVALID;
  counters["uploads"]++;
  return std::memcpy(reinterpret_cast<void *>(to), from, bytes), OK;
}
API int cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t bytes, StreamObject *stream) {
  NOT_WHILE_CAPTURING;
  if (object(stream).capturing || !inside(from, bytes)) return INVALID;
  return std::memcpy(to, reinterpret_cast<void *>(from), bytes), OK;
}
API int cuMemsetD32Async(Pointer to, unsigned value, size_t count, StreamObject *stream) {
  NOT_WHILE_CAPTURING;
  if (object(stream).capturing || !inside(to, 4 * count)) return INVALID;
  return std::fill_n(reinterpret_cast<unsigned *>(to), count, value), OK;
}
API int cuPointerGetAttribute(int *value, int attribute, Pointer pointer) {
  return attribute == 9 && inside(pointer, 1) ? *value = 0, OK : INVALID;
}
API int cuStreamCreate(StreamObject **stream, unsigned) {
  NOT_WHILE_CAPTURING;
  return *stream = new StreamObject, OK;
}
API int cuStreamDestroy_v2(StreamObject *stream) { return delete stream, OK; }
API int cuStreamSynchronize(StreamObject *stream) {
  NEEDS_CONTEXT;
  return object(stream).capturing ? CAPTURING : OK;
}
API int cuStreamBeginCapture_v2(StreamObject *stream, int) {
  NEEDS_CONTEXT;
  if (!stream || stream->capturing) return INVALID;
  counters["captures"]++;
  return stream->capturing = true, captures_here++, OK;
}
API int cuStreamEndCapture(StreamObject *stream, GraphObject **graph) {
  if (!stream->capturing) return INVALID;
  *graph = new GraphObject(std::move(stream->recorded));
  stream->recorded.launches.clear();
  return stream->capturing = false, captures_here--, OK;
}
API int cuStreamIsCapturing(StreamObject *stream, int *status) { return *status = object(stream).capturing, OK; }
API int cuGraphInstantiateWithFlags(GraphObject **exec, GraphObject *graph, unsigned long long) {
  NEEDS_CONTEXT;
  return *exec = new GraphObject(*graph), OK;
}
API int cuGraphLaunch(GraphObject *exec, StreamObject *stream) {
  NEEDS_CONTEXT;
  if (object(stream).capturing) return INVALID;
  counters["graph_launches"]++;
  for (Launch &launch : exec->launches) launch.run();
  return OK;
}
API int cuGraphExecDestroy(GraphObject *exec) { return delete exec, OK; }
API int cuGraphDestroy(GraphObject *graph) { return delete graph, OK; }
struct LaunchConfig {
  unsigned x, y, z, threads, threads_y, threads_z, shared;
  StreamObject *stream;
  const int *attributes;
  unsigned n_attributes;
};
API int cuLaunchKernelEx(const LaunchConfig *config, FunctionObject *function, void **parameters, void **) {
  NEEDS_CONTEXT;
  const LaunchConfig &c = *config;
  if (!c.x || !c.y || c.z != 1 || c.threads % 32 || c.threads_y != 1 || c.threads_z != 1 || int(c.shared) > function->shared ||
      c.n_attributes > 1)
    return INVALID;
  if (c.n_attributes) {
    if (c.attributes[0] != 6 || c.attributes[2] != 1) return INVALID;  // programmatic stream serialization, on
    counters["overlapping"]++;
  }
  Launch launch{function, {}};
  for (int k = 0; k < function->n; k++) launch.values.push_back(*static_cast<Pointer *>(parameters[k]));
  for (int k = 0; k < 2; k++)  // Triton's scratch areas
    if (*static_cast<Pointer *>(parameters[function->n + k])) return INVALID;
  if (object(c.stream).capturing)
    object(c.stream).recorded.launches.push_back(launch);
  else
    launch.run();
  return OK;
}
