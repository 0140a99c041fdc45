// A few rows of x for each of many adapters of one W: a block of W stays in the L1 cache while the rows of all adapters are
// multiplied by it, each rescaled in registers.

// A row of x that is alone under its adapter, of rank 1.
struct Single {
  const float *x, *scaled;  // [K]; x ⊙ s_c [G, K]
  const float* row;           // s_r [N]
  Bias bias;
  bool base;
  void* y;  // [N]
};

// y [MR, NR] of singles, for the rows n.. of W of one group: x is rescaled for each row of W.
template <int MR, int NR, class W>
INLINE void single_tile(const Weight& weight, const Single* singles, int64_t n, bool rounded) {
  const W* w = static_cast<const W*>(weight.data) + n * weight.stride;
  const float* scaled[MR];
  Vec scale[MR][NR], total[MR][NR], earlier[MR][NR];
  UNROLL for (int m = 0; m < MR; ++m) {
    scaled[m] = singles[m].scaled + n / weight.group_rows() * weight.cols;
    UNROLL for (int i = 0; i < NR; ++i) scale[m][i] = splat(singles[m].row[n + i]), earlier[m][i] = zero();
  }
  clear(total);
  auto step = [&](int64_t k, auto load_some) __attribute__((always_inline)) {
    Vec w_k[NR];
    UNROLL for (int i = 0; i < NR; ++i) w_k[i] = load_some(w + i * weight.stride + k);
    UNROLL for (int m = 0; m < MR; ++m) {
      const Vec scaled_k = load_some(scaled[m] + k), base = singles[m].base ? load_some(singles[m].x + k) : zero();
      UNROLL for (int i = 0; i < NR; ++i) total[m][i] = fma(w_k[i], fma(scale[m][i], scaled_k, base), total[m][i]);
    }
  };
  int64_t k = 0;
  for (int64_t vectors = 1; k + kWidth <= weight.cols; k += kWidth, ++vectors) {
    step(k, [](const auto* p) __attribute__((always_inline)) { return load(p); });
    if (kWidth < 16 && vectors % kChain == 0) {
      UNROLL for (int m = 0; m < MR; ++m) {
        UNROLL for (int i = 0; i < NR; ++i) earlier[m][i] = add(earlier[m][i], total[m][i]), total[m][i] = zero();
      }
    }
  }
  if (const int64_t lanes = weight.cols - k; lanes > 0) {
    step(k, [lanes](const auto* p) __attribute__((always_inline)) { return load_first(p, lanes); });
  }
  UNROLL for (int m = 0; m < MR; ++m) {
    float sums[NR];
    UNROLL for (int i = 0; i < NR; ++i) total[m][i] = add(total[m][i], earlier[m][i]);
    if constexpr (NR == 4) {
      sum4(total[m][0], total[m][1], total[m][2], total[m][3], sums);
    } else {
      UNROLL for (int i = 0; i < NR; ++i) sums[i] = sum(total[m][i]);
    }
    UNROLL for (int i = 0; i < NR; ++i) {
      const float y = sums[i] + bias_at(singles[m].bias, n + i);
      rounded ? assign(static_cast<bf16*>(singles[m].y)[n + i], y) : assign(static_cast<float*>(singles[m].y)[n + i], y);
    }
  }
}

// A tile of y [rows, width], to the rows row.. and the columns n.. of all.
SHARED void put_tile(const Forward& call, int64_t row, int64_t rows, int64_t n, int64_t width, const float* tile) {
  for (int64_t m = row; m < row + rows; ++m) {
    const int64_t at = m * call.weight.rows + n;
    for (int64_t i = 0; i < width; ++i, ++tile) {
      call.type == Type::bf16 ? assign(static_cast<bf16*>(call.y)[at + i], *tile)
                              : assign(static_cast<float*>(call.y)[at + i], *tile);
    }
  }
}

template <class W, bool kRankOne>
void together_fused(const Forward* calls, int64_t size) {
  constexpr int64_t kRows = kWidth > 8 ? 4 : 2, kSingles = kWidth > 8 ? 2 : 1;  // rows of x in one tile
  const Weight& weight = calls->weight;
  const bool copied = calls->type == Type::bf16;
  int64_t total = 0;
  for (int64_t i = 0; i < size; ++i) total += calls[i].count;
  const Buffer wide(copied ? total * weight.cols * sizeof(float) : 0);
  float* copy = static_cast<float*>(wide.data());
  for (int64_t i = 0, before = 0; copied && i < size; before += calls[i++].count) {
    widen_rows<bf16>(calls[i].x, calls[i].runs, calls[i].count, weight.cols, copy + before * weight.cols);
  }
  int64_t alone = 0;
  for (int64_t i = 0; kRankOne && i < size; ++i) alone += calls[i].count == 1;
  const int64_t scaled_size = weight.groups * weight.cols;
  const Buffer singles_buffer(alone * sizeof(Single)), scaled_buffer(alone * scaled_size * sizeof(float));
  Single* singles = static_cast<Single*>(singles_buffer.data());
  float* scaled = static_cast<float*>(scaled_buffer.data());
  alone = 0;
  for (int64_t i = 0, before = 0; kRankOne && i < size; before += calls[i++].count) {
    const Forward& call = calls[i];
    if (call.count > 1) continue;
    const int64_t row = call.runs->first, y_size = copied ? sizeof(bf16) : sizeof(float);
    const float* x = copied ? copy + before * weight.cols : static_cast<const float*>(call.x.data) + row * call.x.stride;
    float* own = scaled + alone * scaled_size;
    for (int64_t group = 0; group < weight.groups; ++group) {
      const float* col = static_cast<const float*>(call.weight.col) + group * weight.cols;
      for (int64_t k = 0; k < weight.cols; ++k) own[group * weight.cols + k] = x[k] * col[k];
    }
    singles[alone++] = {x, own, static_cast<const float*>(call.weight.row), call.bias, call.weight.base != 0,
                        static_cast<char*>(call.y) + row * weight.rows * y_size};
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
      for (int64_t m = 0; m < alone; m += kSingles) {
        auto tiles = [&](auto height) __attribute__((always_inline)) {
          constexpr int MR = decltype(height)::value;
          int64_t n = first;
          for (; n + 4 <= last; n += 4) single_tile<MR, 4, W>(weight, singles + m, n, copied);
          for (; n < last; ++n) {
            for (int64_t i = 0; i < MR; ++i) single_tile<1, 1, W>(weight, singles + m + i, n, copied);
          }
        };
        with_count<kSingles>(least(kSingles, alone - m), tiles);
      }
      int64_t before = 0;
      for (const Forward* call = calls; call < calls + size; before += call->count, ++call) {
        if (kRankOne && call->count == 1) continue;
        const int64_t x_stride = copied ? weight.cols : call->x.stride;
        for_runs(call->runs, 0, call->count, [&](int64_t first_m, int64_t row, int64_t count) __attribute__((always_inline)) {
          for (int64_t m = 0; m < count; m += kRows) {
            const float* x = copied ? copy + (before + first_m + m) * weight.cols
                                    : static_cast<const float*>(call->x.data) + (row + m) * x_stride;
            float y[kRows * 4];
            auto rows = [&](auto height) __attribute__((always_inline)) {
              constexpr int MR = decltype(height)::value;
              int64_t n = first;
              for (; n + 4 <= last; n += 4) {
                fused_tile<MR, 4, W, kRankOne, false>(call->weight, n, x, x_stride, call->bias, y, 4);
                put_tile(*call, row + m, MR, n, 4, y);
              }
              for (; n < last; ++n) {
                for (int64_t r = 0; r < MR; ++r) {
                  fused_tile<1, 1, W, kRankOne, false>(call->weight, n, x + r * x_stride, x_stride, call->bias, y, 1);
                  put_tile(*call, row + m + r, 1, n, 1, y);
                }
              }
            };
            with_count<kRows>(least(kRows, count - m), rows);
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
#ifdef RLRR_PAIRS
  const bool stacks = calls->type == Type::bf16 && weight.type == Type::bf16;
  if (stacks && pairs_supported()) return pairs_avx512.forward_stacked(calls, size);
#endif
  with_form(weight, [&](auto w, auto one) { together_fused<decltype(w), decltype(one)::value>(calls, size); });
}
