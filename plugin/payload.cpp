#include "payload.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <optional>

#include "error.h"
#include "sha256.h"

namespace mlff {
namespace {

using nlohmann::json;

constexpr unsigned char kMagic[16] = {'M', 'L', 'F', 'F', 0x89, 'P', 'A', 'Y', 'L', 'O', 'A', 'D', '\r', '\n', 0x1a, '\n'};
constexpr uint32_t kVersion = 1;
constexpr size_t kHeadSize = 72;
constexpr int kMaxNesting = 32;      // of the header; ours has five levels
constexpr int kMaxOccurrences = 64;  // of the magic: bounds the time that a hostile file can take

template <class T>
T little_endian(const uint8_t *p) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); i++) value |= T(p[i]) << (8 * i);
  return value;
}

// First fault in what should be a payload at the start of the bytes, or nothing if size, version and hash fit.
std::optional<std::string> fault(const uint8_t *p, size_t available) {
  if (available < kHeadSize) return "the file is truncated inside the payload's first bytes; get it again";
  const auto version = little_endian<uint32_t>(p + 16);
  const auto size = little_endian<uint64_t>(p + 24), header_size = little_endian<uint64_t>(p + 32);
  if (version > kVersion)
    return "payload format " + std::to_string(version) + " is newer than this mlff reads (" + std::to_string(kVersion) +
           "); update mlff";
  if (version == 0 || little_endian<uint32_t>(p + 20) != 0 || size < kHeadSize || header_size > size - kHeadSize ||
      (kHeadSize + header_size) % kAlignment != 0)
    return "the payload's first bytes are damaged; get the file again";
  if (size > available)
    return "the file is truncated: the payload has " + std::to_string(size) + " bytes, " + std::to_string(available) +
           " are there; get it again";
  const auto digest = sha256(p + kHeadSize, size - kHeadSize);
  if (std::memcmp(digest.data(), p + 40, digest.size()) != 0)
    return "the content does not match its SHA-256: the file is damaged; get it again";
  return std::nullopt;
}

json parse_header(const std::string &text, const std::string &name) {
  // The parser itself keeps no stack, but users of the values (copy, dump) recurse: a limit keeps them safe.
  const auto limit = [&](int depth, json::parse_event_t, json &) {
    if (depth > kMaxNesting) fail(MLFF_ERROR_FILE, "%s: the header is nested deeper than %d levels", name.c_str(), kMaxNesting);
    return true;
  };
  json header;
  if (text.find('\0') != std::string::npos)
    fail(MLFF_ERROR_FILE, "%s: the header is not valid JSON (it holds a zero byte)", name.c_str());
  try {
    header = json::parse(text, limit);
  } catch (const json::exception &e) {
    std::string what = e.what();
    fail(MLFF_ERROR_FILE, "%s: the header is not valid JSON (%s)", name.c_str(), what.substr(0, 200).c_str());
  }
  if (!header.is_object()) fail(MLFF_ERROR_FILE, "%s: the header is not a JSON object", name.c_str());
  return header;
}

// A JSON integer in 0 .. 2^62; anything else throws.
int64_t whole_number(const json &value, const std::string &what) {
  if (value.is_number_unsigned() && value.get<uint64_t>() <= (uint64_t(1) << 62)) return int64_t(value.get<uint64_t>());
  throw Error(MLFF_ERROR_FILE, what + " is not a whole number that fits");
}

Tensor parse_tensor(const json &entry, const std::string &what, uint8_t *data, uint64_t data_size) {
  Tensor t;
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") || !entry.contains("offset"))
    throw Error(MLFF_ERROR_FILE, what + " needs a dtype, a shape and an offset");
  if (!entry["dtype"].is_string() || !parse_dtype(entry["dtype"].get_ref<const std::string &>(), t.dtype))
    throw Error(MLFF_ERROR_FILE, what + ": the dtype must be f32, f64, i32, i64, u8 or f16");
  if (!entry["shape"].is_array() || entry["shape"].size() > 8)
    throw Error(MLFF_ERROR_FILE, what + ": the shape must be a list of at most 8 numbers");
  const int64_t largest = int64_t(data_size / dtype_size(t.dtype));
  t.count = 1;
  for (const json &dimension : entry["shape"]) {
    const int64_t n = whole_number(dimension, what + ": a dimension");
    if (n < 1) throw Error(MLFF_ERROR_FILE, what + ": a dimension is zero");
    if (n > largest / t.count) throw Error(MLFF_ERROR_FILE, what + " is larger than the file's data");
    t.count *= n;
    t.shape.push_back(n);
  }
  const int64_t offset = whole_number(entry["offset"], what + ": the offset"), size = t.count * int64_t(dtype_size(t.dtype));
  if (offset % int64_t(kAlignment) != 0) throw Error(MLFF_ERROR_FILE, what + ": the offset is not a multiple of 64");
  if (size > int64_t(data_size) || offset > int64_t(data_size) - size)
    throw Error(MLFF_ERROR_FILE, what + ": bytes " + std::to_string(offset) + " to " +
                                     std::to_string(uint64_t(offset) + uint64_t(size)) + " lie outside the data (" +
                                     std::to_string(data_size) + " bytes)");
  t.data = data + offset;
  return t;
}

struct Half {
  uint16_t bits;
};
bool is_finite(Half x) { return (x.bits & 0x7c00) != 0x7c00; }  // not all bits of the exponent are set
bool is_finite(float x) { return std::isfinite(x); }
bool is_finite(double x) { return std::isfinite(x); }

template <class T>
void require_finite(const Tensor &t, const std::string &what) {
  if (!std::all_of(t.as<T>(), t.as<T>() + t.count, [](T x) { return is_finite(x); }))
    throw Error(MLFF_ERROR_FILE, what + " holds a number that is not finite");
}

// A payload whose size and hash are right.
Payload parse(const uint8_t *p, const std::string &name) {
  const auto size = little_endian<uint64_t>(p + 24), header_size = little_endian<uint64_t>(p + 32);
  Payload payload;
  for (int i = 40; i < 72; i++) {
    constexpr char digits[] = "0123456789abcdef";
    payload.sha256 += {digits[p[i] >> 4], digits[p[i] & 15]};
  }
  payload.header_text.assign(reinterpret_cast<const char *>(p + kHeadSize), header_size);
  payload.header_text.erase(payload.header_text.find_last_not_of(' ') + 1);
  payload.header = parse_header(payload.header_text, name);

  const uint64_t data_size = size - kHeadSize - header_size;
  payload.data = allocate_aligned(std::max<uint64_t>(data_size, 1));
  auto *data = static_cast<uint8_t *>(payload.data.get());
  std::memcpy(data, p + kHeadSize + header_size, data_size);

  const auto tensors = payload.header.find("tensors");
  if (tensors == payload.header.end() || !tensors->is_object())
    fail(MLFF_ERROR_FILE, "%s: the header has no table of tensors", name.c_str());
  for (const auto &[key, entry] : tensors->items()) {
    const std::string what = name + ": tensor \"" + key.substr(0, 80) + "\"";
    const Tensor t = parse_tensor(entry, what, data, data_size);
    if (t.dtype == DType::f32) require_finite<float>(t, what);
    if (t.dtype == DType::f64) require_finite<double>(t, what);
    if (t.dtype == DType::f16) require_finite<Half>(t, what);
    payload.tensors.emplace(key, t);
  }
  return payload;
}

// A regular file's bytes, mapped for reading.
class MappedFile {
 public:
  explicit MappedFile(const char *path) {
    struct stat info;
    if (stat(path, &info) != 0) fail(MLFF_ERROR_FILE, "%s: cannot open the model file (%s)", path, std::strerror(errno));
    if (!S_ISREG(info.st_mode)) fail(MLFF_ERROR_FILE, "%s: is not a file; give the path of a model.pt", path);
    if (info.st_size == 0) fail(MLFF_ERROR_FILE, "%s: the file is empty", path);
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) fail(MLFF_ERROR_FILE, "%s: cannot open the model file (%s)", path, std::strerror(errno));
    size_ = size_t(info.st_size);
    data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    const int reason = errno;
    close(file);
    if (data_ == MAP_FAILED) fail(MLFF_ERROR_FILE, "%s: cannot read the model file (%s)", path, std::strerror(reason));
  }
  ~MappedFile() { munmap(data_, size_); }
  MappedFile(const MappedFile &) = delete;
  MappedFile &operator=(const MappedFile &) = delete;
  const void *data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void *data_;
  size_t size_;
};

}  // namespace

size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f16: return 2;
    case DType::u8: return 1;
    default: return 4;
  }
}

const char *dtype_name(DType dtype) {
  constexpr const char *names[] = {"f32", "f64", "i32", "i64", "u8", "f16"};
  return names[int(dtype)];
}

bool parse_dtype(const std::string &name, DType &dtype) {
  for (DType d : {DType::f32, DType::f64, DType::i32, DType::i64, DType::u8, DType::f16})
    if (name == dtype_name(d)) {
      dtype = d;
      return true;
    }
  return false;
}

std::string shape_text(const std::vector<int64_t> &shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Payload read_payload_file(const char *path) {
  const MappedFile file(path);
  return read_payload(file.data(), file.size(), path);
}

Payload read_payload(const void *bytes, size_t size, const std::string &name) {
  const auto *begin = static_cast<const uint8_t *>(bytes), *end = begin + size;
  // The magic can occur by accident in front of the payload: the first occurrence whose size and hash fit is the payload.
  std::optional<std::string> first_fault;
  const uint8_t *p = begin;
  for (int n = 0; n < kMaxOccurrences; n++, p++) {
    p = static_cast<const uint8_t *>(size ? memmem(p, size_t(end - p), kMagic, sizeof kMagic) : nullptr);
    if (!p) break;
    const auto problem = fault(p, size_t(end - p));
    if (!problem) return parse(p, name);
    if (!first_fault) first_fault = problem;
  }
  if (first_fault) throw Error(MLFF_ERROR_FILE, name + ": " + *first_fault);
  throw Error(MLFF_ERROR_FILE, name + ": not an mlff model file (no payload inside); make one with mlff-export");
}

}  // namespace mlff
