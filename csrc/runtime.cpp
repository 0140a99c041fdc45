#include "runtime.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <new>

namespace rlrr {

int64_t worker_count(int64_t count) {
  return std::max<int64_t>(1, std::min<int64_t>(count, torch::stable::get_num_threads()));
}

void parallel_slots(int64_t count, void (*body)(void*, int64_t, int64_t, int64_t), void* context) {
  if (count <= 0) return;
  const int64_t workers = worker_count(count);
  if (workers == 1) return body(context, 0, 0, count);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) {
      body(context, slot, count * slot / workers, count * (slot + 1) / workers);
    }
  });
}

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKept = size_t{2} << 20;
// Between buffers of one thread: processors fetch past the end of what another thread reads, and would fight over lines
// that this one writes. Not a multiple of a page, or all buffers would compete for the same cache sets.
constexpr size_t kGap = 4096 + 2 * kAlignment;

struct Free {
  void operator()(char* block) const { ::operator delete(block, std::align_val_t{kAlignment}); }
};

struct Arena {
  std::unique_ptr<char, Free> block;
  size_t used = 0;
};

thread_local Arena arena;

}  // namespace

Buffer::Buffer(size_t bytes) : data_(nullptr), tensor_(nullptr), mark_(arena.used) {
  const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (arena.used + size <= kKept) {
    if (!arena.block) arena.block.reset(static_cast<char*>(::operator new(kKept, std::align_val_t{kAlignment})));
    data_ = arena.block.get() + arena.used;
    arena.used = std::min(arena.used + size + kGap, kKept);
    return;
  }
  const int64_t sizes[] = {static_cast<int64_t>(size)}, strides[] = {1};
  AtenTensorHandle handle;
  STD_TORCH_CHECK(
      aoti_torch_empty_strided(
          1, sizes, strides, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &handle) == 0,
      "rlrr_kernels: cannot allocate ", bytes, " bytes of scratch");
  tensor_ = handle;
  aoti_torch_get_data_ptr(handle, &data_);
}

Buffer::~Buffer() {
  if (tensor_ != nullptr) aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(tensor_));
  arena.used = mark_;
}

}  // namespace rlrr
