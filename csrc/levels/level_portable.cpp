// The kernels for any processor: the compiler's baseline, no intrinsics.
#include "levels.h"
#include "../runtime.h"

namespace rlrr {
namespace portable {
namespace {

#include "vector_portable.h"

#include "../kernels/common.inl"
#include "../kernels/elementwise.inl"
#include "../kernels/rank.inl"
#include "../kernels/fused.inl"
#include "../kernels/panels.inl"
#include "../kernels/together.inl"

}  // namespace
}  // namespace portable

const Level level_portable = {
    portable::forward_fused,
    portable::forward_panels,
    portable::forward_together,
    portable::backward_fused,
    portable::backward_panels,
    portable::merge,
    portable::reduce,
    portable::sum_rows,
};

}  // namespace rlrr
