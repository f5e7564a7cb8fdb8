/* SPDX-License-Identifier: GPL-2.0-only
   LAMMPS pair style of mlff. Copyright (C) the mlff authors. See pair_mlff.h and LICENSE. */

// In a file of its own because LAMMPS has a JSON library of the same file name that must not meet this one.
#include "describe.h"

#include <nlohmann/json.hpp>

using nlohmann::json;

// The text at `key`, or of the "name" in the object there; empty if there is neither.
static std::string text(const json &object, const char *key)
{
  const auto found = object.is_object() ? object.find(key) : object.end();
  if (found == object.end()) return {};
  if (found->is_string()) return found->get<std::string>();
  return text(*found, "name");
}

std::string describe_model(const char *header)
{
  const json root = json::parse(header, nullptr, false);
  const json provenance = root.is_object() ? root.value("provenance", json::object()) : json::object();
  std::string result = text(provenance, "name"), teacher = text(provenance, "teacher");
  result += (result.empty() ? "" : ", ") + text(root, "architecture");
  if (!teacher.empty()) result += ", teacher " + teacher;
  return result;
}
