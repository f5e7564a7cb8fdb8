// The CUDA driver, opened at run time: the same binary works on a machine without a GPU, and no CUDA toolkit is needed to build
// it.
//
// Only what is used here is declared, by the binary interface that NVIDIA keeps stable since CUDA 12 (cuda.h). Objects free
// themselves in the context that they were made in; errors while freeing are ignored, because at the end of a process the driver
// may be gone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "../error.h"

namespace mlff::cuda {

using Result = int;
using DevicePointer = unsigned long long;
using Context = struct ContextObject *;
using StreamHandle = struct StreamObject *;
using ModuleHandle = struct ModuleObject *;
using FunctionHandle = struct FunctionObject *;
using GraphHandle = struct GraphObject *;
using GraphExecHandle = struct GraphExecObject *;

constexpr Result kOutOfMemory = 2, kNoDevice = 100, kInvalidDevice = 101, kNoBinary = 209;
constexpr int kAttributeMajor = 75, kAttributeMinor = 76, kAttributeMaxShared = 97;  // CU_DEVICE_ATTRIBUTE_...
constexpr int kFunctionMaxDynamicShared = 8, kFunctionCarveout = 9;                  // CU_FUNC_ATTRIBUTE_...
constexpr int kPointerDeviceOrdinal = 9;                                             // CU_POINTER_ATTRIBUTE_...
constexpr unsigned kStreamNonBlocking = 1;
constexpr int kCaptureThreadLocal = 1, kNotCapturing = 0;
constexpr int kMinDriver = 12000;       // CUDA 12.0
constexpr int kOverlapDriver = 12030;   // captures launches that overlap with the kernel before
constexpr int kAttributeOverlap = 6;    // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  char padding[4];
  union {
    int on;
    char all[64];
  };
};

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  StreamHandle stream;
  LaunchAttribute *attributes;
  unsigned n_attributes;
};

// name here and in messages, symbol of the library, parameters
#define MLFF_CUDA_FUNCTIONS(X)                                                                                                \
  X(cuInit, "cuInit", (unsigned flags))                                                                                       \
  X(cuDriverGetVersion, "cuDriverGetVersion", (int *version))                                                                 \
  X(cuGetErrorString, "cuGetErrorString", (Result error, const char **text))                                                  \
  X(cuDeviceGetCount, "cuDeviceGetCount", (int *count))                                                                       \
  X(cuDeviceGet, "cuDeviceGet", (int *device, int ordinal))                                                                   \
  X(cuDeviceGetName, "cuDeviceGetName", (char *name, int size, int device))                                                   \
  X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *value, int attribute, int device))                                    \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (Context * context, int device))                                    \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (Context context))                                                               \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (Context * context))                                                               \
  X(cuModuleLoadData, "cuModuleLoadData", (ModuleHandle * module, const void *image))                                         \
  X(cuModuleUnload, "cuModuleUnload", (ModuleHandle module))                                                                  \
  X(cuModuleGetFunction, "cuModuleGetFunction", (FunctionHandle * function, ModuleHandle module, const char *name))           \
  X(cuFuncSetAttribute, "cuFuncSetAttribute", (FunctionHandle function, int attribute, int value))                            \
  X(cuMemGetInfo, "cuMemGetInfo_v2", (size_t *free, size_t *total))                                                           \
  X(cuMemAlloc, "cuMemAlloc_v2", (DevicePointer * pointer, size_t bytes))                                                     \
  X(cuMemFree, "cuMemFree_v2", (DevicePointer pointer))                                                                       \
  X(cuMemHostAlloc, "cuMemHostAlloc", (void **pointer, size_t bytes, unsigned flags))                                         \
  X(cuMemFreeHost, "cuMemFreeHost", (void *pointer))                                                                          \
  X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (DevicePointer to, const void *from, size_t bytes, StreamHandle stream))       \
  X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void *to, DevicePointer from, size_t bytes, StreamHandle stream))             \
  X(cuMemsetD32Async, "cuMemsetD32Async", (DevicePointer to, unsigned value, size_t count, StreamHandle stream))              \
  X(cuPointerGetAttribute, "cuPointerGetAttribute", (void *value, int attribute, DevicePointer pointer))                      \
  X(cuStreamCreate, "cuStreamCreate", (StreamHandle * stream, unsigned flags))                                                \
  X(cuStreamDestroy, "cuStreamDestroy_v2", (StreamHandle stream))                                                             \
  X(cuStreamSynchronize, "cuStreamSynchronize", (StreamHandle stream))                                                        \
  X(cuStreamBeginCapture, "cuStreamBeginCapture_v2", (StreamHandle stream, int mode))                                         \
  X(cuStreamEndCapture, "cuStreamEndCapture", (StreamHandle stream, GraphHandle * graph))                                     \
  X(cuStreamIsCapturing, "cuStreamIsCapturing", (StreamHandle stream, int *status))                                           \
  X(cuGraphInstantiate, "cuGraphInstantiateWithFlags", (GraphExecHandle * exec, GraphHandle graph, unsigned long long flags)) \
  X(cuGraphLaunch, "cuGraphLaunch", (GraphExecHandle exec, StreamHandle stream))                                              \
  X(cuGraphExecDestroy, "cuGraphExecDestroy", (GraphExecHandle exec))                                                         \
  X(cuGraphDestroy, "cuGraphDestroy", (GraphHandle graph))                                                                    \
  X(cuLaunchKernel, "cuLaunchKernelEx",                                                                                       \
    (const LaunchConfig *config, FunctionHandle function, void **parameters, void **extra))

struct Driver {
#define MLFF_CUDA_MEMBER(name, symbol, parameters) Result(*name) parameters = nullptr;
  MLFF_CUDA_FUNCTIONS(MLFF_CUDA_MEMBER)
#undef MLFF_CUDA_MEMBER
};

// The driver, opened and initialised at the first call. The environment variable MLFF_CUDA_DRIVER names another library than
// libcuda.so.1 (for tests). Throws Error(MLFF_ERROR_RESOURCE) without a driver, if it is too old, or if it finds no GPU.
const Driver &driver();

// Number of GPUs; 0 if there is no usable driver.
int device_count();

// Throws if a call of the driver failed: MLFF_ERROR_RESOURCE for want of memory or a device, else MLFF_ERROR_INTERNAL.
void check(Result result, const char *function);
#define MLFF_CUDA(function, ...) ::mlff::cuda::check(::mlff::cuda::driver().function(__VA_ARGS__), #function)

// The primary context of a device, which torch and CUDA's run-time library use too: pointers are valid in all of them. It is held
// until the process ends, as they do: making it again costs more than anything else here.
Context primary_context(int ordinal);

// Makes a context current while it lives; the caller's is restored.
class Current {
 public:
  explicit Current(Context context) { MLFF_CUDA(cuCtxPushCurrent, context); }
  ~Current() {
    Context popped;
    driver().cuCtxPopCurrent(&popped);
  }
  Current(const Current &) = delete;
  Current &operator=(const Current &) = delete;
};

// Owner of one object of the driver, made in `context`. Free takes the driver and the object.
template <class T, auto Free>
class Owned {
 public:
  Owned() = default;
  Owned(Context context, T object) : context_(context), object_(object) {}
  Owned(Owned &&other) noexcept : context_(other.context_), object_(std::exchange(other.object_, T{})) {}
  Owned &operator=(Owned &&other) noexcept {
    std::swap(context_, other.context_), std::swap(object_, other.object_);
    return *this;
  }
  ~Owned() { reset(); }
  void reset() {
    if (!object_) return;
    const Driver &d = driver();  // does not throw: it is open, or there would be no object
    Context popped;
    if (d.cuCtxPushCurrent(context_) == 0) {
      (d.*Free)(object_);
      d.cuCtxPopCurrent(&popped);
    }
    object_ = T{};
  }
  T get() const { return object_; }
  explicit operator bool() const { return bool(object_); }

 private:
  Context context_ = nullptr;
  T object_{};
};

using Stream = Owned<StreamHandle, &Driver::cuStreamDestroy>;
using Module = Owned<ModuleHandle, &Driver::cuModuleUnload>;
using Graph = Owned<GraphHandle, &Driver::cuGraphDestroy>;
using GraphExec = Owned<GraphExecHandle, &Driver::cuGraphExecDestroy>;
using DeviceMemory = Owned<DevicePointer, &Driver::cuMemFree>;
using PinnedMemory = Owned<void *, &Driver::cuMemFreeHost>;

// These need their context to be current.
Stream make_stream(Context context);
Module load_module(Context context, const void *image);

// Memory of the device, aligned to 256 bytes; its contents are undefined.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Context context, size_t bytes);
  DevicePointer get() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  DeviceMemory memory_;
  size_t bytes_ = 0;
};

// Host memory that the device copies from and to directly. Growing it forgets what it held.
class PinnedBuffer {
 public:
  void *reserve(Context context, size_t bytes);
  void *data() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  PinnedMemory memory_;
  size_t bytes_ = 0;
};

// What launch() puts into the stream, as a graph. The stream is not capturing any more afterwards, also if launch() throws.
template <class Launch>
GraphExec capture(Context context, StreamHandle stream, Launch &&launch) {
  MLFF_CUDA(cuStreamBeginCapture, stream, kCaptureThreadLocal);
  GraphHandle handle = nullptr;
  try {
    launch();
  } catch (...) {
    driver().cuStreamEndCapture(stream, &handle);
    const Graph unfinished(context, handle);
    throw;
  }
  MLFF_CUDA(cuStreamEndCapture, stream, &handle);
  const Graph graph(context, handle);
  GraphExecHandle exec = nullptr;
  MLFF_CUDA(cuGraphInstantiate, &exec, handle, 0);
  return GraphExec(context, exec);
}

}  // namespace mlff::cuda
