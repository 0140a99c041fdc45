// Which of the three ways computes a call: every crossover is in this file.
//
// Measured on a 2-core AMD EPYC (Zen 5), 1 and 2 threads, at the four layer shapes of ViT-B: medians of interleaved runs of
// every path around each crossover. From AVX2 on no call needs the library: its float32 product has no AVX-512 there, and
// panels of bf16 pairs beat it with W' made on the way. The portable level is not measured on a processor that needs it:
// beyond few rows it trusts the library.
#pragma once

#include "types.h"

namespace rlrr {

enum class Path : int64_t { automatic = 0, fused = 1, panels = 2, library = 3 };

// The largest number of rows of x for one pass over W, and for panels; above, the library.
struct Crossovers {
  int64_t fused, panels;

  Path choose(int64_t count) const {
    return count <= fused ? Path::fused : count <= panels ? Path::panels : Path::library;
  }
};

constexpr int64_t kAlways = INT64_MAX;

// The largest rank for one pass over W, whose loops are for few ranks; panels have small matrix products. Measured on a 2-core
// AMD EPYC (Zen 4): at rank 8 both are level up to 8 rows, from rank 16 on panels win everywhere.
constexpr int64_t kFusedRank = 4;

// Up to so many rows of x the forward panels of bf16 pairs sum across lanes rather than transpose W'.
constexpr int64_t kFewPairRows = 40;

// Up to so many rows of all adapters together, of rank 1, one pass over W likewise sums across lanes. Measured on a 2-core AMD
// EPYC (Zen 4): with 64 rows laying W out for them takes .83 to 1 of the time, with 16 up to 1.26.
constexpr int64_t kFewStackedRows = 32;

// `level`: as in levels.h. Only float32 and bfloat16 (weights too) have more than the library's way. Rank 1 on a bfloat16
// weight has a form of one pass that makes no W', where the processor multiplies pairs.
inline bool stacks(int64_t level, Type type, const Weight& weight) {
  return level == 3 && type == Type::bf16 && weight.type == Type::bf16 && weight.rank == 1;
}

inline Path choose_forward(int64_t level, Type type, const Weight& weight, int64_t count) {
  const bool ranks = weight.rank > kFusedRank;
  if (level == 0) return Crossovers{ranks ? 0 : 4, 16}.choose(count);
  return Crossovers{ranks ? 0 : stacks(level, type, weight) ? 6 : 4, kAlways}.choose(count);
}

// The same for the rows of one of many adapters of a weight: `fused` are few, and those of all such adapters share a pass over
// W; `panels` are enough to make W' for, a panel at a time. The pairs' one pass makes no W' for any rank.
inline Path choose_forward_of_task(int64_t level, Type type, const Weight& weight, int64_t count) {
  const bool pairs = level == 3 && type == Type::bf16 && weight.type == Type::bf16;
  if (pairs && weight.rank > 1) return Crossovers{2, kAlways}.choose(count);
  return choose_forward(level, type, weight, count);
}

inline Path choose_backward(int64_t level, Type type, const Weight& weight, int64_t count) {
  const bool ranks = weight.rank > kFusedRank;
  if (level == 0) return Crossovers{ranks ? 0 : 8, 16}.choose(count);
  if (type == Type::bf16 && level == 3) return Crossovers{ranks ? 0 : 3, kAlways}.choose(count);
  return Crossovers{ranks ? 0 : 32, kAlways}.choose(count);
}

}  // namespace rlrr
