// Which of the three ways computes a call: every crossover is in this file, measured by `make bench-crossovers`.
#pragma once

#include "types.h"

namespace rlrr {

enum class Path : int64_t { automatic = 0, one_pass = 1, panels = 2, library = 3 };

// `level`: as in levels.h. Only float32 and bfloat16 (weights too) have more than the library's way.
inline Path choose_forward(int64_t level, Type type, int64_t count) {
  const bool pairs = type == Type::bf16 && level == 3;
  if (count <= (pairs ? 4 : 4)) return Path::one_pass;
  return Path::panels;
}

inline Path choose_backward(int64_t level, Type type, int64_t count) {
  const bool pairs = type == Type::bf16 && level == 3;
  if (count <= (pairs ? 8 : 16)) return Path::one_pass;
  return Path::panels;
}

}  // namespace rlrr
