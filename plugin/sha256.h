// SHA-256 (FIPS 180-4): the identity of a model file.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace mlff {

std::array<uint8_t, 32> sha256(const void *data, size_t size);

}  // namespace mlff
