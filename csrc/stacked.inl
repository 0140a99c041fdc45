// bfloat16 where the processor multiplies pairs, rank 1, few rows of x: every product is of W itself, read once a pass and
// never rescaled. With A = g W and B = (g ⊙ s_r) W [M, K], C = (x ⊙ s_c) Wᵀ [M, N]:
//
//     y = x Wᵀ + s_r ⊙ C      ∂x = A + s_c ⊙ B      ∂s_c = Σ_m x ⊙ B      ∂s_r = Σ_m g ⊙ C
//
// x ⊙ s_c is rounded to bfloat16 where the formula rounds W', so the error of y is of the same size. In backward x ⊙ s_c and
// g ⊙ s_r are two bfloat16 numbers each, or the scale gradients would have the error of G rounded and at times more. float32
// has no such form: W x and its rescaling cancel in coarser digits than W' has.

constexpr int64_t kStackedRows = 4;  // rows of x in one pass over a block of W

// The operands of one factor: rows of `from`, of from ⊙ scale rounded and, if asked for, of what the rounding left; all
// zero-padded to whole vectors of 32.
class Stacked {
 public:
  // scale: [groups, cols]; `scaled` and `rest` then are [groups, count, stride].
  Stacked(const Matrix& from, int64_t count, int64_t cols, const float* scale, int64_t groups, bool with_rest)
      : stride(round_up(cols, 2 * kWidth)),
        buffer_((1 + (with_rest ? 2 : 1) * groups) * count * stride * sizeof(bf16)),
        plain(static_cast<bf16*>(buffer_.data())),
        scaled(plain + count * stride),
        rest(with_rest ? scaled + groups * count * stride : nullptr) {
    for (int64_t m = 0; m < count; ++m) {
      const bf16* row = static_cast<const bf16*>(from.data) + m * from.stride;
      for (int64_t k = 0; k < stride; k += 2 * kWidth) {
        const int64_t left = cols - k;
        store_pairs(plain + m * stride + k, load_pairs(row + k, first_elements(left)));
        const Vec a = load_upto(row + k, left), b = load_upto(row + k + kWidth, left - kWidth);
        for (int64_t group = 0; group < groups; ++group) {
          const float* s = scale + group * cols + k;
          const int64_t at = (group * count + m) * stride + k;
          const Vec a_s = mul(a, load_upto(s, left)), b_s = mul(b, load_upto(s + kWidth, left - kWidth));
          store_pairs(scaled + at, round_both(a_s, b_s));
          if (!with_rest) continue;
          store_pairs(rest + at, round_both(sub(a_s, load(scaled + at)), sub(b_s, load(scaled + at + kWidth))));
        }
      }
    }
  }

  int64_t stride;

 private:
  Buffer buffer_;

 public:
  bf16 *plain, *scaled, *rest;
};

// Sums of the lanes of NR vectors, NR a multiple of 4 or less than 4.
template <int NR>
INLINE void sum_lanes(const Vec (&lanes)[NR], float* out) {
  if constexpr (NR % 4 == 0) {
    UNROLL for (int i = 0; i < NR; i += 4) sum4(lanes[i], lanes[i + 1], lanes[i + 2], lanes[i + 3], out + i);
  } else {
    UNROLL for (int i = 0; i < NR; ++i) out[i] = sum(lanes[i]);
  }
}

// ---------------------------------------------------------------- forward

// y [MR, NR] of rows n.. of W, all of one group; `x` and `scaled` point to its rows of x.
template <int MR, int NR>
INLINE void stacked_tile(const Forward& p, const bf16* x, const bf16* scaled, int64_t stride, int64_t n, bf16* y) {
  const Weight& weight = p.weight;
  const bf16* w = static_cast<const bf16*>(weight.data) + n * weight.stride;
  const int64_t ahead = rows_ahead<bf16>(weight, NR);
  Vec plain[MR][NR], rescaled[MR][NR];
  UNROLL for (int m = 0; m < MR; ++m) {
    UNROLL for (int i = 0; i < NR; ++i) plain[m][i] = rescaled[m][i] = zero();
  }
  auto step = [&](int64_t k, __mmask32 elements) __attribute__((always_inline)) {
    Pairs w_k[NR];
    UNROLL for (int i = 0; i < NR; ++i) {
      __builtin_prefetch(w + i * weight.stride + k + ahead);
      w_k[i] = load_pairs(w + i * weight.stride + k, elements);
    }
    UNROLL for (int m = 0; m < MR; ++m) {
      const Pairs x_k = load_pairs(x + m * stride + k), scaled_k = load_pairs(scaled + m * stride + k);
      UNROLL for (int i = 0; i < NR; ++i) {
        plain[m][i] = multiply_pairs(w_k[i], x_k, plain[m][i]);
        rescaled[m][i] = multiply_pairs(w_k[i], scaled_k, rescaled[m][i]);
      }
    }
  };
  int64_t k = 0;
  for (; k + 2 * kWidth <= weight.cols; k += 2 * kWidth) step(k, ~__mmask32{0});
  if (k < weight.cols) step(k, first_elements(weight.cols - k));
  const float* row = static_cast<const float*>(weight.row) + n;
  UNROLL for (int m = 0; m < MR; ++m) {
    Vec total[NR];
    UNROLL for (int i = 0; i < NR; ++i) {
      const Vec scale = splat(row[i]);
      total[i] = weight.base != 0 ? fma(scale, rescaled[m][i], plain[m][i]) : mul(scale, rescaled[m][i]);
    }
    float sums[NR];
    sum_lanes(total, sums);
    UNROLL for (int i = 0; i < NR; ++i) {
      assign(y[m * weight.rows + n + i], p.bias == nullptr ? sums[i] : sums[i] + p.bias[n + i]);
    }
  }
}

void forward_stacked(const Forward& p) {
  const Weight& weight = p.weight;
  const Stacked x(p.x, p.count, weight.cols, static_cast<const float*>(weight.col), weight.groups, false);
  const int64_t group_rows = weight.group_rows();
  constexpr int64_t kBlock = 8;
  const int64_t blocks = (group_rows + kBlock - 1) / kBlock;
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t group = block / blocks, first = group * group_rows + block % blocks * kBlock;
      const int64_t last = least(first + kBlock, (group + 1) * group_rows);
      for (int64_t m = 0; m < p.count; m += kStackedRows) {
        const bf16 *plain = x.plain + m * x.stride, *scaled = x.scaled + (group * p.count + m) * x.stride;
        bf16* y = static_cast<bf16*>(p.y) + m * weight.rows;
        auto rows = [&](auto height) __attribute__((always_inline)) {
          constexpr int MR = decltype(height)::value, NR = MR == 1 ? 8 : MR == 2 ? 4 : 2;
          int64_t n = first;
          for (; n + NR <= last; n += NR) stacked_tile<MR, NR>(p, plain, scaled, x.stride, n, y);
          for (; n < last; ++n) stacked_tile<MR, 1>(p, plain, scaled, x.stride, n, y);
        };
        with_count<kStackedRows>(least(kStackedRows, p.count - m), rows);
      }
    }
  };
  parallel(blocks * weight.groups, body);
}

// ---------------------------------------------------------------- backward

// Where one slot sums over its rows of W: [count, stride / 32, 64] floats, of each 32 columns A and B of the lower and then
// of the upper halves of the eights.
constexpr int64_t kStackedWidth = 4 * kWidth;

// Rows m.. of a Stacked, in one group.
struct StackedRows {
  const bf16 *plain, *scaled, *rest;
  int64_t stride;

  StackedRows(const Stacked& all, int64_t count, int64_t group, int64_t m)
      : plain(all.plain + m * all.stride),
        scaled(all.scaled + (group * count + m) * all.stride),
        rest(all.rest + (group * count + m) * all.stride),
        stride(all.stride) {}
};

// The rows n.. of W, `rows` <= NR of them and of one group: adds to A and B, and (null: not needed) to ∂s_r.
template <int MR, int NR>
INLINE void stacked_rows(const Weight& weight, const StackedRows& x, const StackedRows& g, int64_t n, int64_t rows,
                         float* sums, float* grad_row) {
  const bf16* w[NR];
  UNROLL for (int i = 0; i < NR; ++i) w[i] = static_cast<const bf16*>(weight.data) + (n + (i < rows ? i : 0)) * weight.stride;
  const int64_t sums_stride = x.stride * 2, ahead = rows_ahead<bf16>(weight, NR);
  Vec product[MR][NR];
  UNROLL for (int m = 0; m < MR; ++m) {
    UNROLL for (int i = 0; i < NR; ++i) product[m][i] = zero();
  }
  auto step = [&](int64_t k, __mmask32 elements) __attribute__((always_inline)) {
    Pairs w_k[NR];
    UNROLL for (int i = 0; i < NR; ++i) {
      __builtin_prefetch(w[i] + k + ahead);
      w_k[i] = load_pairs(w[i] + k, i < rows ? elements : 0);
    }
    if (grad_row != nullptr) {
      UNROLL for (int m = 0; m < MR; ++m) {
        const Pairs x_k = load_pairs(x.scaled + m * x.stride + k), rest_k = load_pairs(x.rest + m * x.stride + k);
        UNROLL for (int i = 0; i < NR; ++i) {
          product[m][i] = multiply_pairs(w_k[i], rest_k, multiply_pairs(w_k[i], x_k, product[m][i]));
        }
      }
    }
    Pairs low[NR / 2], high[NR / 2];
    UNROLL for (int i = 0; i < NR / 2; ++i) {
      low[i] = interleave_low(w_k[2 * i], w_k[2 * i + 1]);
      high[i] = interleave_high(w_k[2 * i], w_k[2 * i + 1]);
    }
    UNROLL for (int m = 0; m < MR; ++m) {
      float* at = sums + m * sums_stride + k * 2;
      Vec a_low = load(at), b_low = load(at + kWidth), a_high = load(at + 2 * kWidth), b_high = load(at + 3 * kWidth);
      UNROLL for (int i = 0; i < NR / 2; ++i) {
        const int64_t pair = m * g.stride + n + 2 * i;
        // Past an odd group's last row comes the next group's, whose inf times the 0 of w would be NaN here.
        const bool both = 2 * i + 1 < rows;
        const Pairs a = splat_pair(g.plain + pair, both), b = splat_pair(g.scaled + pair, both);
        const Pairs rest = splat_pair(g.rest + pair, both);
        a_low = multiply_pairs(low[i], a, a_low);
        b_low = multiply_pairs(low[i], rest, multiply_pairs(low[i], b, b_low));
        a_high = multiply_pairs(high[i], a, a_high);
        b_high = multiply_pairs(high[i], rest, multiply_pairs(high[i], b, b_high));
      }
      store(at, a_low);
      store(at + kWidth, b_low);
      store(at + 2 * kWidth, a_high);
      store(at + 3 * kWidth, b_high);
    }
  };
  int64_t k = 0;
  for (; k + 2 * kWidth <= weight.cols; k += 2 * kWidth) step(k, ~__mmask32{0});
  if (k < weight.cols) step(k, first_elements(weight.cols - k));
  if (grad_row == nullptr) return;
  Vec total[NR];
  UNROLL for (int i = 0; i < NR; ++i) {
    total[i] = zero();
    UNROLL for (int m = 0; m < MR; ++m) {
      total[i] = fma(product[m][i], splat(i < rows ? value(g.plain[m * g.stride + n + i]) : 0), total[i]);
    }
  }
  float totals[NR];
  sum_lanes(total, totals);
  for (int64_t i = 0; i < least(NR, rows); ++i) grad_row[n + i] += totals[i];
}

// All rows of x against the rows [first, last) of W, of one group.
INLINE void stacked_block(const Weight& weight, int64_t count, const Stacked& x, const Stacked& g, int64_t group,
                          int64_t first, int64_t last, float* sums, float* grad_row) {
  for (int64_t m = 0; m < count; m += kStackedRows) {
    const StackedRows x_m(x, count, group, m), g_m(g, count, 0, m);
    float* sums_m = sums + m * x.stride * 2;
    auto rows = [&](auto height) __attribute__((always_inline)) {
      constexpr int MR = decltype(height)::value, NR = MR == 1 ? 8 : 4;
      int64_t n = first;
      for (; n + NR <= last; n += NR) stacked_rows<MR, NR>(weight, x_m, g_m, n, NR, sums_m, grad_row);
      for (; n < last; n += 2) stacked_rows<MR, 2>(weight, x_m, g_m, n, last - n, sums_m, grad_row);
    };
    with_count<kStackedRows>(least(kStackedRows, count - m), rows);
  }
}

// A and B of 32 columns in their order: [2, kWidth] each.
INLINE void in_order(const float* sums, Vec (&a)[2], Vec (&b)[2]) {
  join_eights(load(sums), load(sums + 2 * kWidth), a[0], a[1]);
  join_eights(load(sums + kWidth), load(sums + 3 * kWidth), b[0], b[1]);
}

void backward_stacked(const Backward& p) {
  const Weight& weight = p.weight;
  const int64_t rows = weight.rows, cols = weight.cols, count = p.count, groups = weight.groups;
  const int64_t group_rows = weight.group_rows();
  const bool scales = p.grad_row != nullptr || p.grad_col != nullptr;
  const float *row = static_cast<const float*>(weight.row), *col = static_cast<const float*>(weight.col);
  const Stacked g(p.grad_y, count, rows, row, 1, true);
  const Stacked x(scales ? p.x : Matrix{nullptr, 0}, scales ? count : 0, cols, col, groups, true);
  constexpr int64_t kBlock = 8;
  const int64_t blocks = (group_rows + kBlock - 1) / kBlock, slots = worker_count(blocks * groups);
  const int64_t stride = x.stride;
  // By slot: A and B of the group at hand, then the sums over groups of ∂x [count, stride], then ∂s_c [groups, stride].
  const int64_t pair_size = 2 * count * stride, size = pair_size + count * stride + groups * stride;
  const Buffer buffer(slots * size * sizeof(float));
  float* sums = static_cast<float*>(buffer.data());
  if (p.grad_row != nullptr) __builtin_memset(p.grad_row, 0, rows * sizeof(float));
  auto body = [&](int64_t slot, int64_t begin, int64_t end) {
    float *own = sums + slot * size, *grad_x = own + pair_size, *grad_col = grad_x + count * stride;
    __builtin_memset(own, 0, size * sizeof(float));
    while (begin < end) {
      const int64_t group = begin / blocks, until = least(end, (group + 1) * blocks), start = group * group_rows;
      for (; begin < until; ++begin) {
        const int64_t first = start + begin % blocks * kBlock;
        stacked_block(weight, count, x, g, group, first, least(first + kBlock, start + group_rows), own, p.grad_row);
      }
      for (int64_t m = 0; m < count; ++m) {
        for (int64_t k = 0; k < stride; k += 2 * kWidth) {
          Vec a[2], b[2];
          in_order(own + m * 2 * stride + 2 * k, a, b);
          UNROLL for (int half = 0; half < 2; ++half) {
            const int64_t at = k + half * kWidth;
            const Vec s_c = load_upto(col + group * cols + at, cols - at);
            const Vec both = weight.base != 0 ? fma(s_c, b[half], a[half]) : mul(s_c, b[half]);
            store(grad_x + m * stride + at, add(load(grad_x + m * stride + at), both));
            if (p.grad_col == nullptr) continue;
            float* out = grad_col + group * stride + at;
            store(out, fma(load(x.plain + m * stride + at), b[half], load(out)));
          }
        }
      }
      if (until < end) __builtin_memset(own, 0, pair_size * sizeof(float));
    }
  };
  parallel(blocks * groups, body);

  auto finish = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = begin * kWidth; k < least(end * kWidth, cols); k += kWidth) {
      const int64_t left = cols - k;
      for (int64_t line = 0; line < count + groups; ++line) {
        Vec total = zero();
        for (int64_t slot = 0; slot < slots; ++slot) {
          total = add(total, load(sums + slot * size + pair_size + line * stride + k));
        }
        if (line >= count) {
          if (p.grad_col != nullptr) store_upto(p.grad_col + (line - count) * cols + k, total, left);
        } else if (p.grad_x != nullptr) {
          store_upto(static_cast<bf16*>(p.grad_x) + line * cols + k, total, left);
        }
      }
    }
  };
  const int64_t vectors = (cols + kWidth - 1) / kWidth;
  if (slots * (count + groups) * cols < 1 << 17) return finish(0, 0, vectors);
  parallel(vectors, finish);
}
