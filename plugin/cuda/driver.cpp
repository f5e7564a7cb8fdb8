#include "driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace mlff::cuda {
namespace {

Driver open_driver() {
  const char *other = std::getenv("MLFF_CUDA_DRIVER");
  const char *path = other && *other ? other : "libcuda.so.1";
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);  // never closed: threads of the driver may run until the process ends
  if (!library) fail(MLFF_ERROR_RESOURCE, "no NVIDIA driver (%s) on this machine; use the device \"cpu\"", path);
  Driver d;
  const char *missing = nullptr;
#define MLFF_CUDA_RESOLVE(name, symbol, parameters)                        \
  d.name = reinterpret_cast<Result(*) parameters>(dlsym(library, symbol)); \
  if (!d.name && !missing) missing = symbol;
  MLFF_CUDA_FUNCTIONS(MLFF_CUDA_RESOLVE)
#undef MLFF_CUDA_RESOLVE
  int version = 0;
  if (d.cuDriverGetVersion && d.cuDriverGetVersion(&version) == 0 && version < kMinDriver)
    fail(MLFF_ERROR_RESOURCE, "the NVIDIA driver is for CUDA %d.%d, mlff needs one for CUDA %d.%d or newer; update the driver",
         version / 1000, version % 1000 / 10, kMinDriver / 1000, kMinDriver % 1000 / 10);
  if (missing) fail(MLFF_ERROR_RESOURCE, "the NVIDIA driver (%s) has no function %s; update the driver", path, missing);
  const char *text = nullptr;
  const Result result = d.cuInit(0);
  if (result == kNoDevice) fail(MLFF_ERROR_RESOURCE, "the NVIDIA driver finds no GPU on this machine; use the device \"cpu\"");
  if (result != 0) {
    d.cuGetErrorString(result, &text);
    fail(MLFF_ERROR_RESOURCE, "the NVIDIA driver does not start: cuInit: %s (error %d)", text ? text : "unknown error", result);
  }
  return d;
}

}  // namespace

const Driver &driver() {
  static const Driver opened = open_driver();  // if it throws, the next call tries again
  return opened;
}

int device_count() {
  try {
    int count = 0;
    return driver().cuDeviceGetCount(&count) == 0 ? count : 0;
  } catch (const Error &) {
    return 0;
  }
}

void check(Result result, const char *function) {
  if (result == 0) return;
  const char *text = nullptr;
  driver().cuGetErrorString(result, &text);
  const bool resource = result == kOutOfMemory || result == kNoDevice || result == kInvalidDevice || result == kNoBinary;
  fail(resource ? MLFF_ERROR_RESOURCE : MLFF_ERROR_INTERNAL, "CUDA: %s: %s (error %d)", function, text ? text : "unknown error",
       result);
}

Context primary_context(int ordinal) {
  static std::mutex mutex;
  static auto &contexts = *new std::map<int, Context>;  // never destroyed: systems may be freed while the process exits
  const std::lock_guard<std::mutex> lock(mutex);
  Context &context = contexts[ordinal];
  if (!context) {
    int device;
    MLFF_CUDA(cuDeviceGet, &device, ordinal);
    MLFF_CUDA(cuDevicePrimaryCtxRetain, &context, device);
  }
  return context;
}

Stream make_stream(Context context) {
  StreamHandle handle = nullptr;
  MLFF_CUDA(cuStreamCreate, &handle, kStreamNonBlocking);
  return Stream(context, handle);
}

Module load_module(Context context, const void *image) {
  ModuleHandle handle = nullptr;
  MLFF_CUDA(cuModuleLoadData, &handle, image);
  return Module(context, handle);
}

DeviceBuffer::DeviceBuffer(Context context, size_t bytes) {
  DevicePointer pointer = 0;
  MLFF_CUDA(cuMemAlloc, &pointer, bytes);
  memory_ = DeviceMemory(context, pointer);
  bytes_ = bytes;
}

void *PinnedBuffer::reserve(Context context, size_t bytes) {
  if (bytes > bytes_) {
    memory_.reset();
    bytes_ = 0;
    const size_t wanted = bytes + bytes / 8;
    void *pointer = nullptr;
    MLFF_CUDA(cuMemHostAlloc, &pointer, wanted, 0);
    memory_ = PinnedMemory(context, pointer);
    bytes_ = wanted;
  }
  return memory_.get();
}

}  // namespace mlff::cuda
