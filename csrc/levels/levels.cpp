#include "levels.h"

#include <atomic>

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

bool pairs_supported() { return current_level() == 3; }

}  // namespace rlrr
