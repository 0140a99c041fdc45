// The forward of pairs.inl for fewer rows: lanes run along the contraction.
//
// W' is not worth transposing then: 4 rows of it at a time stay in the L1 cache, and each sum ends across lanes. Neighbours
// along a row, of W' and of x alike, are pairs of two even or of two odd columns: a rounding leaves them in that order.

constexpr int64_t kDotDepth = 4096;

// Rows of x, one run after the other, those columns split of every 32, zero-padded.
INLINE void split_rows(const Forward& p, int64_t stride, bf16* out) {
  for_runs(p.runs, 0, p.count, [&](int64_t, int64_t first, int64_t n) {
    for (int64_t m = first; m < first + n; ++m, out += stride) {
      const bf16* row = static_cast<const bf16*>(p.x.data) + m * p.x.stride;
      for (int64_t k = 0; k < p.weight.cols; k += 2 * kWidth) {
        Vec even, odd;
        load_split(row + k, first_elements(p.weight.cols - k), even, odd);
        store_pairs(out + k, round_both(even, odd));
      }
    }
  });
}

// block [4, stride] = `rows` rows of W' from n, columns from k, in the order of split_rows; further rows are zero.
template <class W, bool kRankOne>
SHARED void rescale_rows(const Weight& weight, const SplitPanels& split, int64_t n, int64_t rows, int64_t k, int64_t depth,
                  int64_t stride, bf16* block) {
  const Vec base = splat(static_cast<float>(weight.base));
  const int64_t ahead = 4 * weight.stride, across = kRankOne ? depth : kPairPanel;
  alignas(64) float factors[kRankOne ? 1 : 4 * kPairPanel];
  __builtin_memset(block + rows * stride, 0, (4 - rows) * stride * sizeof(bf16));
  for (int64_t begin = 0; begin < depth; begin += across) {
    if (!kRankOne) split.factors_to(weight, n, rows, k + begin, factors);
    for (int64_t i = 0; i < rows; ++i) {
      const W* w = static_cast<const W*>(weight.data) + (n + i) * weight.stride + k;
      const float* row = static_cast<const float*>(weight.row) + n + i;
      const float* col = split.at((n + i) / weight.group_rows(), k);
      for (int64_t at = begin; at < least(begin + across, depth); at += 2 * kWidth) {
        Vec even, odd, f_even, f_odd;
        __builtin_prefetch(w + at + ahead);
        load_split(w + at, first_elements(depth - at), even, odd);
        factor_split<kRankOne>(base, row, col + at, factors + i * kPairPanel + at - begin, f_even, f_odd);
        store_pairs(block + i * stride + at, round_both(mul(even, f_even), mul(odd, f_odd)));
      }
    }
  }
}

void dots_forward(const Forward& p) {
  const Weight& weight = p.weight;
  const int64_t cols = weight.cols, stride = round_up(cols, 2 * kWidth);
  const Buffer x_buffer(p.count * stride * sizeof(bf16));
  bf16* x = static_cast<bf16*>(x_buffer.data());
  split_rows(p, stride, x);
  const SplitPanels split(weight, false);
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    const int64_t deepest = least(stride, kDotDepth);
    const Buffer block_buffer(4 * deepest * sizeof(bf16));
    const Buffer lanes_buffer(cols > kDotDepth ? 4 * p.count * kWidth * sizeof(float) : 0);
    bf16* block = static_cast<bf16*>(block_buffer.data());
    float* lanes = static_cast<float*>(lanes_buffer.data());
    for (int64_t n = 4 * begin; n < least(4 * end, weight.rows); n += 4) {
      const int64_t some = least(4, weight.rows - n);
      float bias[4] = {};
      for (int64_t i = 0; i < some; ++i) bias[i] = bias_at(p.bias, n + i);
      for (int64_t k = 0; k < cols; k += kDotDepth) {
        const int64_t depth = least(kDotDepth, cols - k);
        const bool last = k + depth == cols;
        with_form(weight, [&](auto w, auto one) __attribute__((always_inline)) {
          rescale_rows<decltype(w), decltype(one)::value>(weight, split, n, some, k, depth, deepest, block);
        });
        auto multiply_rows = [&](int64_t m, int64_t row, int64_t rows) __attribute__((always_inline)) {
          auto multiply = [&](auto height) __attribute__((always_inline)) {
            constexpr int MR = decltype(height)::value;
            Vec total[MR][4];
            UNROLL for (int r = 0; r < MR; ++r) {
              UNROLL for (int i = 0; i < 4; ++i) total[r][i] = k == 0 ? zero() : load(lanes + ((m + r) * 4 + i) * kWidth);
            }
            for (int64_t at = 0; at < depth; at += 2 * kWidth) {
              Pairs w_at[4];
              UNROLL for (int i = 0; i < 4; ++i) w_at[i] = load_pairs(block + i * deepest + at);
              UNROLL for (int r = 0; r < MR; ++r) {
                const Pairs x_at = load_pairs(x + (m + r) * stride + k + at);
                UNROLL for (int i = 0; i < 4; ++i) total[r][i] = multiply_pairs(x_at, w_at[i], total[r][i]);
              }
            }
            UNROLL for (int r = 0; r < MR; ++r) {
              if (last) {
                sum4(total[r][0], total[r][1], total[r][2], total[r][3], bias,
                     static_cast<bf16*>(p.y) + (row + r) * weight.rows + n, some);
                continue;
              }
              UNROLL for (int i = 0; i < 4; ++i) store(lanes + ((m + r) * 4 + i) * kWidth, total[r][i]);
            }
          };
          with_count<kPairRows>(rows, multiply);
        };
        for_runs(p.runs, 0, p.count, [&](int64_t m, int64_t row, int64_t count) __attribute__((always_inline)) {
          for_tiles(count, kPairRows, [&](int64_t first, int64_t rows) __attribute__((always_inline)) {
            multiply_rows(m + first, row + first, rows);
          });
        });
      }
    }
  };
  parallel((weight.rows + 3) / 4, body);
}

void forward_pairs(const Forward& p) { p.count <= kFewPairRows ? dots_forward(p) : pairs_forward(p); }
