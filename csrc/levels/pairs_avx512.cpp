// The kernels of bf16 pairs, compiled for AVX-512 as those of level_avx512.cpp are, whose unit compiles beside this one.
#include "levels.h"

#ifdef RLRR_X86
#include <immintrin.h>

#include "../dispatch.h"
#include "../runtime.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")

namespace rlrr {
namespace avx512 {
namespace {

#include "vector_avx512.h"

#include "../kernels/common.inl"
#include "../kernels/rank.inl"
#include "../kernels/pairs.inl"
#include "../kernels/pairs_dots.inl"
#include "../kernels/pairs_backward.inl"
#include "../kernels/stacked.inl"

}  // namespace
}  // namespace avx512

const PairLevel pairs_avx512 = {
    avx512::forward_pairs,
    avx512::forward_stacked,
    avx512::backward_pairs,
    avx512::backward_stacked,
};

}  // namespace rlrr

#endif  // RLRR_X86
