// Which of the three ways computes a call: every crossover is in this file.
//
// Measured on a 2-core AMD EPYC (Zen 5), 1 and 2 threads, at the four layer shapes of ViT-B: medians of interleaved runs of
// every path around each crossover. From AVX2 on no call needs the library there: its float32 product has no AVX-512, and
// panels of bf16 pairs beat it with W' made on the way. Where it has faster products than ours, as on Intel's processors, many
// rows pay for W' in memory. The portable level is not measured on a processor that needs it: beyond few rows it trusts the
// library.
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

// The level in use, as in levels.h, and what the library's own products run on, whatever that is.
struct Processor {
  int64_t level;
  bool tiles;  // bf16 in AMX's matrix tiles, with ten times the operations of pairs
  bool wide;   // float32 in all of AVX-512's lanes
};

// The largest rank for one pass over W, whose loops are for few ranks; panels have small matrix products. Measured on a 2-core
// AMD EPYC (Zen 4): at rank 8 both are level up to 8 rows, from rank 16 on panels win everywhere.
constexpr int64_t kFusedRank = 4;

// Up to so many rows of x the forward panels of bf16 pairs sum across lanes rather than transpose W'.
constexpr int64_t kFewPairRows = 40;

// Up to so many rows of all adapters together, of rank 1, one pass over W likewise sums across lanes. Measured on a 2-core AMD
// EPYC (Zen 4): with 64 rows laying W out for them takes .83 to 1 of the time, with 16 up to 1.26.
constexpr int64_t kFewStackedRows = 32;

// The most rows for panels. Beside AMX and beside Intel's float32 measured on a 2-core Xeon, ranks 1 to 64: the library's way
// makes W', and reduces G, at a cost that grows with the rank.
inline int64_t most_panels(const Processor& here, Type type, const Weight& weight, bool backward) {
  if (here.level == 0) return 16;
  if (type == Type::bf16 && here.tiles) return 24 + (backward ? 3 : 2) * weight.rank;
  if (type == Type::f32 && here.wide) return 384 + 6 * weight.rank;
  return kAlways;
}

// Only float32 and bfloat16 (weights too) have more than the library's way. Rank 1 on a bfloat16 weight has a form of one pass
// that makes no W', where the processor multiplies pairs; on the Xeon panels overtake it sooner.
inline int64_t most_fused(const Processor& here, Type type, const Weight& weight) {
  const bool stacks = here.level == 3 && type == Type::bf16 && weight.type == Type::bf16 && weight.rank == 1;
  if (weight.rank > kFusedRank) return 0;
  return !stacks ? 4 : here.tiles ? 3 : 6;
}

inline Path choose_forward(const Processor& here, Type type, const Weight& weight, int64_t count) {
  return Crossovers{most_fused(here, type, weight), most_panels(here, type, weight, false)}.choose(count);
}

// The same for the rows of one of many adapters of a weight: `fused` are few, and those of all such adapters share a pass over
// W; `panels` are enough to make W' for, a panel at a time. The pairs' one pass makes no W' for any rank.
inline Path choose_forward_of_task(const Processor& here, Type type, const Weight& weight, int64_t count) {
  const bool pairs = here.level == 3 && type == Type::bf16 && weight.type == Type::bf16;
  if (pairs && weight.rank > 1) return Crossovers{2, most_panels(here, type, weight, false)}.choose(count);
  return choose_forward(here, type, weight, count);
}

inline Path choose_backward(const Processor& here, Type type, const Weight& weight, int64_t count) {
  const int64_t fused = here.level == 0 ? 8 : type == Type::bf16 && here.level == 3 ? 3 : 32;
  return Crossovers{weight.rank > kFusedRank ? 0 : fused, most_panels(here, type, weight, true)}.choose(count);
}

}  // namespace rlrr
