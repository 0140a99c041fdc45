#include "levels.h"

#include <atomic>

#ifdef RLRR_X86
#include <cpuid.h>
#endif

namespace rlrr {

int64_t best_level() {
#ifdef RLRR_X86
  static const int64_t best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
      return 1;
    }
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  }();
  return best;
#else
  return 0;
#endif
}

namespace {

std::atomic<int64_t> current{-1};

#ifdef RLRR_X86
// Whether processor and system know AMX's tiles of bf16; GCC's own question is younger than some that build this.
bool has_tiles() {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17, kTilesOfBf16 = 1u << 22 | 1u << 24;
  if ((low & kTileState) != kTileState || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kTilesOfBf16) == kTilesOfBf16;
}
#endif

}  // namespace

int64_t current_level() {
  const int64_t number = current.load(std::memory_order_relaxed);
  return number < 0 ? best_level() : number;
}

void set_level(int64_t number) { current.store(number, std::memory_order_relaxed); }

const Level& level() {
#ifdef RLRR_X86
  const int64_t number = current_level();
  return number >= 2 ? level_avx512 : number == 1 ? level_avx2 : level_portable;
#else
  return level_portable;
#endif
}

Processor processor() {
#ifdef RLRR_X86
  static const bool tiles = has_tiles(), wide = best_level() >= 2 && __builtin_cpu_is("intel");
  return {current_level(), tiles, wide};
#else
  return {current_level(), false, false};
#endif
}

bool pairs_supported() { return current_level() == 3; }

}  // namespace rlrr
