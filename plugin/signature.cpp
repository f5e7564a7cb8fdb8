#include "signature.h"

#include <cctype>
#include <sstream>

#include "error.h"

namespace mlff {
namespace {

constexpr const char *kRows[] = {"local", "total", "edges", "local+1"};

Dimension parse_dimension(const std::string &text, const std::string &word) {
  Dimension d;
  size_t i = 0;
  if (i < text.size() && std::isdigit(static_cast<unsigned char>(text[i]))) {
    d.factor = 0;
    for (; i < text.size() && std::isdigit(static_cast<unsigned char>(text[i])) && d.factor < 1000000; i++)
      d.factor = 10 * d.factor + (text[i] - '0');
  }
  if (i < text.size() && text[i] >= 'A' && text[i] <= 'Z') d.a = text[i++];
  if (i < text.size() && text[i] >= 'A' && text[i] <= 'Z') d.b = text[i++];
  if (i == 0 || i != text.size() || d.factor < 1) fail(MLFF_ERROR_INTERNAL, "kernel signature: cannot read \"%s\"", word.c_str());
  return d;
}

std::string text_of(const Dimension &d) {
  std::string text = d.factor != 1 || !d.a ? std::to_string(d.factor) : "";
  if (d.a) text += d.a;
  if (d.b) text += d.b;
  return text;
}

}  // namespace

const char *rows_name(Rows rows) { return kRows[int(rows)]; }

bool parse_rows(const std::string &text, Rows &rows) {
  for (int i = 0; i < 4; i++)
    if (text == kRows[i]) {
      rows = Rows(i);
      return true;
    }
  return false;
}

std::vector<Parameter> parse_signature(const std::string &signature) {
  std::vector<Parameter> parameters;
  std::istringstream words(signature);
  std::string word;
  bool written = false;
  while (words >> word) {
    if (word == ">") {
      written = true;
      continue;
    }
    const size_t colon = word.find(':'), open = word.find('[');
    Parameter p;
    if (colon == std::string::npos || open == std::string::npos || colon > open || word.back() != ']' ||
        !parse_dtype(word.substr(colon + 1, open - colon - 1), p.dtype))
      fail(MLFF_ERROR_INTERNAL, "kernel signature: cannot read \"%s\"", word.c_str());
    p.name = word.substr(0, colon);
    p.written = written;
    std::istringstream dims(word.substr(open + 1, word.size() - open - 2));
    std::string dim;
    p.has_rows = false;
    p.rows = Rows::local;
    while (std::getline(dims, dim, ',')) {
      if (p.dims.empty() && !p.has_rows && parse_rows(dim, p.rows))
        p.has_rows = true;
      else
        p.dims.push_back(parse_dimension(dim, word));
    }
    if (p.dims.empty() || p.dims.size() > 2 || (p.has_rows && p.dims.size() != 1))
      fail(MLFF_ERROR_INTERNAL, "kernel signature: \"%s\" needs one or two dimensions", word.c_str());
    parameters.push_back(p);
  }
  return parameters;
}

bool solve(const std::vector<Equation> &equations, std::array<int64_t, 26> &letters, std::string &problem) {
  // Every round binds at least one letter or is the last: an equation with one unknown, linear letter determines it.
  for (bool progress = true; progress;) {
    progress = false;
    for (const Equation &e : equations) {
      __int128 known = e.dimension.factor;
      char unknown = 0;
      int unknowns = 0;
      for (char letter : {e.dimension.a, e.dimension.b}) {
        if (!letter) continue;
        if (letters[letter - 'A'])
          known *= letters[letter - 'A'];
        else
          unknown = letter, unknowns++;
      }
      const bool fits = unknowns == 0 ? known == e.size : unknowns > 1 || (known <= e.size && e.size % int64_t(known) == 0);
      if (!fits) {
        problem = e.what + " is " + std::to_string(e.size) + ", which does not fit " + text_of(e.dimension);
        if (known != e.dimension.factor || unknowns == 0) problem += " given the stage's other arguments";
        return false;
      }
      if (unknowns == 1) {
        letters[unknown - 'A'] = e.size / int64_t(known);
        progress = true;
      }
    }
  }
  for (const Equation &e : equations)
    for (char letter : {e.dimension.a, e.dimension.b})
      if (letter && !letters[letter - 'A']) {
        problem = e.what + " leaves the size " + letter + " undetermined";
        return false;
      }
  return true;
}

}  // namespace mlff
