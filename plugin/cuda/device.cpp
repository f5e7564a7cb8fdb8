#include "device.h"

#include <algorithm>
#include <cstdlib>
#include <map>

namespace mlff::cuda {
namespace {

constexpr size_t kAlign = 256;
constexpr int kMinPtxMajor = 8;              // PTX is for sm_80
constexpr int kSharedWithoutAsking = 49152;  // bytes of dynamic shared memory that every kernel may have

int attribute(int which, int ordinal) {
  int device, value = 0;
  MLFF_CUDA(cuDeviceGet, &device, ordinal);
  MLFF_CUDA(cuDeviceGetAttribute, &value, which, device);
  return value;
}

std::string architecture_for(const Model &model, int ordinal) {
  const int count = (driver(), device_count());
  if (ordinal >= count)
    fail(MLFF_ERROR_RESOURCE, "there is no device \"cuda:%d\"; this machine has %d GPU%s, numbered from 0", ordinal, count,
         count == 1 ? "" : "s");
  if (!model.cuda_plan)
    fail(MLFF_ERROR_RESOURCE, "%s has no kernels for GPUs; export it again with this mlff", model.name.c_str());
  const int major = attribute(kAttributeMajor, ordinal), minor = attribute(kAttributeMinor, ordinal);
  const auto &all = model.cuda_plan->architectures;
  const std::string chosen = choose_architecture(all, major, minor);
  if (chosen.empty()) {
    char name[128] = "";
    std::string list;
    for (const std::string &a : all) list += (list.empty() ? "" : ", ") + a;
    int device;
    MLFF_CUDA(cuDeviceGet, &device, ordinal);
    MLFF_CUDA(cuDeviceGetName, name, int(sizeof name), device);
    fail(MLFF_ERROR_RESOURCE, "cuda:%d (%s) is sm_%d%d; %s has code for %s; export it again for this GPU", ordinal, name, major,
         minor, model.name.c_str(), list.c_str());
  }
  return chosen;
}

// Whether the code for an architecture waits by itself, and the driver takes launches that rely on it.
bool can_overlap(const Plan &plan, const std::string &architecture) {
  int version = 0;
  MLFF_CUDA(cuDriverGetVersion, &version);
  return version >= kOverlapDriver && std::count(plan.overlapping.begin(), plan.overlapping.end(), architecture) > 0;
}

}  // namespace

std::string choose_architecture(const std::vector<std::string> &architectures, int major, int minor) {
  int best = -1;
  bool ptx = false;
  for (const std::string &a : architectures) {
    const int number = a == "ptx" ? -1 : std::atoi(a.c_str() + 3);
    ptx |= number < 0;
    if (number / 10 == major && number % 10 <= minor) best = std::max(best, number);
  }
  if (best >= 0) return "sm_" + std::to_string(best);
  return ptx && major >= kMinPtxMajor ? "ptx" : "";
}

void check_support(const Model &model, int ordinal) { architecture_for(model, ordinal); }

std::shared_ptr<Device> Device::get(std::shared_ptr<const Model> model, int ordinal) {
  static std::mutex mutex;
  static auto &devices = *new std::map<std::pair<const Model *, int>, std::weak_ptr<Device>>;  // never destroyed
  const std::lock_guard<std::mutex> lock(mutex);
  std::erase_if(devices, [](const auto &entry) { return entry.second.expired(); });
  // A living entry keeps its model alive, so the address of the key is that model's and no other's.
  auto &known = devices[{model.get(), ordinal}];
  std::shared_ptr<Device> device = known.lock();
  if (!device) known = device = std::make_shared<Device>(std::move(model), ordinal);
  return device;
}

Device::Device(std::shared_ptr<const Model> m, int n)
    // the support is checked first: it says why there is no context or no plan
    : model((check_support(*m, n), std::move(m))),
      plan(*model->cuda_plan),
      ordinal(n),
      context(primary_context(n)),
      architecture_(architecture_for(*model, n)),
      overlaps_(can_overlap(plan, architecture_)),
      max_shared_(attribute(kAttributeMaxShared, n)),
      functions_(plan.kernels.size()) {
  const Current current(context);
  size_t size = 0;
  for (const Tensor *t : plan.tensors) {
    offsets_.push_back(size);
    size += (size_t(t->count) * dtype_size(t->dtype) + kAlign - 1) / kAlign * kAlign;
  }
  if (size == 0) return;
  tensors_ = DeviceBuffer(context, size);
  const Stream stream = make_stream(context);
  for (size_t k = 0; k < plan.tensors.size(); k++) {
    const Tensor &t = *plan.tensors[k];
    MLFF_CUDA(cuMemcpyHtoDAsync, tensor(int(k)), t.data, size_t(t.count) * dtype_size(t.dtype), stream.get());
  }
  MLFF_CUDA(cuStreamSynchronize, stream.get());
}

const Device::Function &Device::function(int kernel) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Function &function = functions_[size_t(kernel)];
  if (function.handle) return function;
  const Kernel &k = plan.kernels[size_t(kernel)];
  const auto &[image, shared] = k.images.at(architecture_);
  if (shared > max_shared_)
    fail(MLFF_ERROR_RESOURCE, "kernel %s needs %d bytes of shared memory, cuda:%d has %d", k.name.c_str(), shared, ordinal,
         max_shared_);
  Module module = load_module(context, image->data);
  FunctionHandle handle = nullptr;
  MLFF_CUDA(cuModuleGetFunction, &handle, module.get(), k.entry.c_str());
  if (shared > kSharedWithoutAsking) MLFF_CUDA(cuFuncSetAttribute, handle, kFunctionMaxDynamicShared, shared);
  if (k.carveout >= 0) MLFF_CUDA(cuFuncSetAttribute, handle, kFunctionCarveout, k.carveout);
  modules_.push_back(std::move(module));
  function = {handle, unsigned(32 * k.warps), unsigned(shared)};
  return function;
}

}  // namespace mlff::cuda
