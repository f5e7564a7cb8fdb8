// The payload of a model file (docs/file-format.md), read and checked. Reading it is reading untrusted input.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "memory.h"

namespace mlff {

enum class DType { f32, f64, i32, i64, u8, f16 };

size_t dtype_size(DType dtype);
const char *dtype_name(DType dtype);
bool parse_dtype(const std::string &name, DType &dtype);

struct Tensor {
  DType dtype;
  std::vector<int64_t> shape;  // no dimension is zero
  int64_t count;               // of elements
  void *data;                  // on a 64-byte boundary, in Payload::data

  template <class T>
  const T *as() const {
    return static_cast<const T *>(data);
  }
};

std::string shape_text(const std::vector<int64_t> &shape);  // "[2, 128]"

struct Payload {
  std::string header_text;
  nlohmann::json header;
  std::string sha256;  // 64 hexadecimal digits
  std::map<std::string, Tensor> tensors;
  AlignedBytes data;

  const Tensor *find(const std::string &name) const {
    const auto it = tensors.find(name);
    return it == tensors.end() ? nullptr : &it->second;
  }
};

// Both find the payload by its magic, verify size, version and hash, and check every tensor's place.
// They throw Error(MLFF_ERROR_FILE); `name` is what messages call the bytes.
Payload read_payload_file(const char *path);
Payload read_payload(const void *bytes, size_t size, const std::string &name);

}  // namespace mlff
