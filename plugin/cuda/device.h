// What all systems of one model on one GPU share: the context, the machine code that fits the GPU, and the weights in its memory.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../model.h"
#include "driver.h"
#include "plan.h"

namespace mlff::cuda {

// Of the architectures that a file has code for, the one to use on a GPU of compute capability major.minor; empty if none fits.
std::string choose_architecture(const std::vector<std::string> &architectures, int major, int minor);

// Throws Error, saying why, unless the model can be evaluated on that GPU. Cheap: nothing is loaded.
void check_support(const Model &model, int ordinal);

class Device {
 public:
  // The state of that model on that GPU, made if no system is using it.
  static std::shared_ptr<Device> get(std::shared_ptr<const Model> model, int ordinal);
  Device(std::shared_ptr<const Model> model, int ordinal);

  struct Function {
    FunctionHandle handle;
    unsigned threads, shared_bytes;
  };
  // Loads the kernel's machine code when it is first asked for: not while a stream is capturing. The context must be current.
  const Function &function(int kernel);
  // Whether a kernel may be launched while the one before runs: it waits for that where it must.
  bool overlaps() const { return overlaps_; }
  DevicePointer tensor(int index) const { return tensors_.get() + offsets_[index]; }

  const std::shared_ptr<const Model> model;
  const Plan &plan;
  const int ordinal;
  const Context context;

 private:
  const std::string architecture_;
  const bool overlaps_;
  int max_shared_ = 0;
  std::mutex mutex_;
  std::vector<Module> modules_;
  std::vector<Function> functions_;  // by kernel; handle nullptr: not loaded yet
  DeviceBuffer tensors_;
  std::vector<size_t> offsets_;
};

}  // namespace mlff::cuda
