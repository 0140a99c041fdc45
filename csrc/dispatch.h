// Which of the three ways computes a call: every crossover is in this file.
//
// Measured on a 2-core AMD EPYC (Zen 5), 2 threads, at the four layer shapes of ViT-B: medians of interleaved runs of every
// path around each crossover. Its library (MKL) has no AVX-512 for float32 there, so float32 never goes to it; where the
// library is at home, in bf16, it wins once W' is small beside the products. The portable level is not measured on a
// processor that needs it: beyond few rows it trusts the library.
#pragma once

#include "types.h"

namespace rlrr {

enum class Path : int64_t { automatic = 0, one_pass = 1, panels = 2, library = 3 };

// The largest number of rows of x for one pass over W, and for panels; above, the library.
struct Crossovers {
  int64_t one_pass, panels;

  Path choose(int64_t count) const {
    return count <= one_pass ? Path::one_pass : count <= panels ? Path::panels : Path::library;
  }
};

constexpr int64_t kAlways = INT64_MAX;

// `level`: as in levels.h. Only float32 and bfloat16 (weights too) have more than the library's way.
inline Path choose_forward(int64_t level, Type type, int64_t count) {
  if (level == 0) return Crossovers{4, 16}.choose(count);
  if (type == Type::bf16 && level == 3) return Crossovers{4, 256}.choose(count);
  return Crossovers{4, kAlways}.choose(count);
}

inline Path choose_backward(int64_t level, Type type, int64_t count) {
  if (level == 0) return Crossovers{8, 16}.choose(count);
  if (type == Type::bf16 && level == 3) return Crossovers{12, 1024}.choose(count);
  return Crossovers{32, kAlways}.choose(count);
}

}  // namespace rlrr
