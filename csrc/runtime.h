// Threads and scratch, on torch's own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rlrr {

// How many workers `parallel_slots` will use for `count` tasks.
int64_t worker_count(int64_t count);

// Splits [0, count) into worker_count(count) contiguous ranges and runs body(context, slot, begin, end) on each. The
// split depends on the number of threads only, so what is summed by slot is repeatable.
void parallel_slots(int64_t count, void (*body)(void*, int64_t, int64_t, int64_t), void* context);

// 64-byte aligned scratch for a scope. Small ones are cut from a block that each thread keeps (at most 2 MiB), larger
// ones are torch tensors and so are seen by torch's memory accounting. Destroy in reverse order of construction.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  void* tensor_;
  size_t mark_;
};

}  // namespace rlrr
