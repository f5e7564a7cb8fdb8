// Memory on 64-byte boundaries, as vector instructions and cache lines like it.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace mlff {

constexpr size_t kAlignment = 64;

struct AlignedDelete {
  void operator()(void *p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};
using AlignedBytes = std::unique_ptr<void, AlignedDelete>;

inline AlignedBytes allocate_aligned(size_t size) { return AlignedBytes(::operator new(size, std::align_val_t{kAlignment})); }

// An array that is overwritten at every evaluation: growing it forgets what it held.
template <class T>
class Scratch {
 public:
  // Memory for n numbers, zero when it is new; grows with headroom so that a fluctuating n allocates rarely.
  T *resize(int64_t n) {
    if (n > capacity_) {
      const int64_t wanted = n + n / 8;
      if (wanted > INT64_MAX / 2 / int64_t(sizeof(T))) throw std::bad_alloc();
      capacity_ = 0;
      memory_.reset();
      memory_ = allocate_aligned(size_t(wanted) * sizeof(T));
      std::memset(memory_.get(), 0, size_t(wanted) * sizeof(T));
      capacity_ = wanted;
    }
    return data();
  }
  T *data() const { return static_cast<T *>(memory_.get()); }
  T &operator[](int64_t i) const { return data()[i]; }
  size_t bytes() const { return size_t(capacity_) * sizeof(T); }

 private:
  AlignedBytes memory_;
  int64_t capacity_ = 0;
};

}  // namespace mlff
