// Kernel signatures (cpu/kernel.h) and the values of their letters.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "plan.h"

namespace mlff {

// factor x a x b, where a and b are letters or 0.
struct Dimension {
  int64_t factor = 1;
  char a = 0, b = 0;
};

struct Parameter {
  std::string name;
  DType dtype;
  bool has_rows;  // the first dimension counts rows of atoms or edges
  Rows rows;
  std::vector<Dimension> dims;  // without that first one
  bool written;
};

// Throws Error(MLFF_ERROR_INTERNAL) if a signature does not follow the grammar.
std::vector<Parameter> parse_signature(const std::string &signature);

// Values of the letters 'A' .. 'Z' for which every dimension has the size that is there, given some of them (0: unknown).
// False if there are none: `problem` then names the dimension.
struct Equation {
  Dimension dimension;
  int64_t size;
  std::string what;
};
bool solve(const std::vector<Equation> &equations, std::array<int64_t, 26> &letters, std::string &problem);

const char *rows_name(Rows rows);
bool parse_rows(const std::string &text, Rows &rows);

}  // namespace mlff
