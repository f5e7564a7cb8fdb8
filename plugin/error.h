// The one exception of the core. It never leaves the library: mlff.cpp turns it into a status and a line of text.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "mlff.h"

namespace mlff {

struct Error : std::runtime_error {
  Error(mlff_status status, const std::string &message) : std::runtime_error(message), status(status) {}
  mlff_status status;
};

// Throws an Error with a message in printf's notation.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(mlff_status status, const char *format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw Error(status, text);
}

}  // namespace mlff
