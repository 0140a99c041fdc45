// A few rows of x for each of many adapters of one W: a block of W stays in the L1 cache while the rows of all adapters are
// multiplied by it, each rescaled in registers.

template <class W, bool kRankOne>
void together_fused(const Forward* calls, int64_t size) {
  constexpr int64_t kRows = kWidth > 8 ? 4 : 2;  // rows of x in one tile
  const Weight& weight = calls->weight;
  const bool copied = calls->type == Type::bf16;
  int64_t total = 0;
  for (int64_t i = 0; i < size; ++i) total += calls[i].count;
  const Buffer wide(copied ? total * weight.cols * sizeof(float) : 0);
  float* copy = static_cast<float*>(wide.data());
  for (int64_t i = 0, before = 0; copied && i < size; before += calls[i++].count) {
    widen_rows<bf16>(calls[i].x, calls[i].runs, calls[i].count, weight.cols, copy + before * weight.cols);
  }
  const int64_t group_rows = weight.group_rows(), block_rows = cache_rows<W>(weight);
  const int64_t blocks = (group_rows + block_rows - 1) / block_rows;
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block / blocks * group_rows + block % blocks * block_rows;
      const int64_t last = least(first + block_rows, (block / blocks + 1) * group_rows);
      for (int64_t n = last; n < least(last + block_rows, weight.rows); ++n) {  // the next block
        const W* w = static_cast<const W*>(weight.data) + n * weight.stride;
        for (int64_t k = 0; k < weight.cols; k += 64 / sizeof(W)) __builtin_prefetch(w + k, 0, 2);
      }
      int64_t before = 0;
      for (const Forward* call = calls; call < calls + size; before += call->count, ++call) {
        const int64_t x_stride = copied ? weight.cols : call->x.stride;
        auto tile = [&](int64_t m, int64_t row, auto height, auto width, int64_t n) __attribute__((always_inline)) {
          constexpr int MR = decltype(height)::value, NR = decltype(width)::value;
          const float* x = copied ? copy + (before + m) * weight.cols : static_cast<const float*>(call->x.data) + row * x_stride;
          float y[MR * NR];
          fused_tile<MR, NR, W, kRankOne, false>(call->weight, x, x_stride, n, call->bias, y, NR);
          for (int64_t i = 0; i < MR * NR; ++i) {
            const int64_t at = (row + i / NR) * weight.rows + n + i % NR;
            copied ? assign(static_cast<bf16*>(call->y)[at], y[i]) : assign(static_cast<float*>(call->y)[at], y[i]);
          }
        };
        for_runs(call->runs, 0, call->count, [&](int64_t m, int64_t row, int64_t count) {
          for (int64_t i = 0; i < count; i += kRows) {
            auto rows = [&](auto height) __attribute__((always_inline)) {
              int64_t n = first;
              for (; n + 4 <= last; n += 4) tile(m + i, row + i, height, Count<4>(), n);
              for (; n < last; ++n) tile(m + i, row + i, height, Count<1>(), n);
            };
            with_count<kRows>(least(kRows, count - i), rows);
          }
        });
      }
    }
  };
  parallel(blocks * weight.groups, body);
}

// Calls that share x, W, y, their types and the rank.
void forward_together(const Forward* calls, int64_t size) {
  const Weight& weight = calls->weight;
  const bool one = weight.rank == 1;
#ifdef RLRR_PAIRS
  if (calls->type == Type::bf16 && weight.type == Type::bf16 && pairs_supported()) return forward_stacked(calls, size);
#endif
  if (weight.type == Type::f32) {
    one ? together_fused<float, true>(calls, size) : together_fused<float, false>(calls, size);
  } else {
    one ? together_fused<bf16, true>(calls, size) : together_fused<bf16, false>(calls, size);
  }
}
