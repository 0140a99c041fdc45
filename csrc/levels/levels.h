// The instruction sets the kernels are compiled for, and which of them is in use.
#pragma once

#include "../dispatch.h"
#include "../types.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__) && !defined(__clang__)
#define RLRR_X86 1
#endif

// What that code is written with.
#define INLINE inline __attribute__((always_inline))
#define SHARED __attribute__((noinline, noclone))  // one copy for all callers
#define UNROLL _Pragma("GCC unroll 16")

namespace rlrr {

// The code of one instruction set. `forward_*` and `backward_*` serve float32 and bfloat16.
struct Level {
  void (*forward_fused)(const Forward&);
  void (*forward_panels)(const Forward&);
  // Of calls that share x, W and y, a few rows each; the two above take them one by one, rows of `forward_fused` in one run.
  void (*forward_together)(const Forward* calls, int64_t size);
  void (*backward_fused)(const Backward&);
  void (*backward_panels)(const Backward&);
  // out [rows, cols] = W' rounded once to `type`.
  void (*merge)(const Weight&, Type type, void* out);
  // The scale gradients from product = G [rows, cols] of `type`; results fp32, fp64 beside a float64 weight.
  void (*reduce)(const Weight&, Type type, const void* product, void* grad_row, void* grad_col);
  // out [cols] = Σ over rows of a [count, cols] matrix; fp32, fp64 for float64.
  void (*sum_rows)(Type type, const Matrix&, int64_t count, int64_t cols, void* out);
};

// The code for bfloat16 rows of x where pairs_supported(), a unit of its own: panels, beside a weight of any type, and one
// pass over a bfloat16 weight, of rank 1 in backward.
struct PairLevel {
  void (*forward_panels)(const Forward&);
  void (*forward_stacked)(const Forward* calls, int64_t size);
  void (*backward_panels)(const Backward&);
  void (*backward_stacked)(const Backward&);
};

extern const Level level_portable;
#ifdef RLRR_X86
extern const Level level_avx2;
extern const Level level_avx512;
extern const PairLevel pairs_avx512;
#endif

// Numbers that the Python side names: 0 portable, 1 avx2, 2 avx512, 3 avx512_bf16 (the code of 2 with bf16 pairs).
int64_t best_level();
int64_t current_level();
void set_level(int64_t number);  // at most best_level()
const Level& level();
Processor processor();   // that level, and what the library's products run on
bool pairs_supported();  // whether bf16 pair products may be executed

}  // namespace rlrr
