// The kernels compiled for AVX-512, but for those of bf16 pairs (pairs_avx512.cpp). Everything below the pragma has this
// level's own namespace: a function shared with another unit could be the copy the linker keeps, and fail on a processor
// without these instructions.
#include "levels.h"

#ifdef RLRR_X86
#include <immintrin.h>

#include "../runtime.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")

namespace rlrr {
namespace avx512 {
namespace {

#include "vector_avx512.h"

#include "../kernels/common.inl"
#include "../kernels/elementwise.inl"
#include "../kernels/rank.inl"
#include "../kernels/fused.inl"
#include "../kernels/panels.inl"
#include "../kernels/together.inl"

}  // namespace
}  // namespace avx512

const Level level_avx512 = {
    avx512::forward_fused,
    avx512::forward_panels,
    avx512::forward_together,
    avx512::backward_fused,
    avx512::backward_panels,
    avx512::merge,
    avx512::reduce,
    avx512::sum_rows,
};

}  // namespace rlrr

#endif  // RLRR_X86
