// The kernels compiled for AVX-2. Everything below the pragma has this level's own namespace: a function shared
// with another unit could be the copy the linker keeps, and fail on a processor without these instructions.
#include "levels.h"

#ifdef RLRR_X86
#include <immintrin.h>

#include "../runtime.h"

#pragma GCC target("avx2,fma")

namespace rlrr {
namespace avx2 {
namespace {

#include "vector_avx2.h"

#include "../kernels/common.inl"
#include "../kernels/elementwise.inl"
#include "../kernels/rank.inl"
#include "../kernels/fused.inl"
#include "../kernels/panels.inl"
#include "../kernels/together.inl"

}  // namespace
}  // namespace avx2

const Level level_avx2 = {
    avx2::forward_fused,
    avx2::forward_panels,
    avx2::forward_together,
    avx2::backward_fused,
    avx2::backward_panels,
    avx2::merge,
    avx2::reduce,
    avx2::sum_rows,
};

}  // namespace rlrr

#endif  // RLRR_X86
