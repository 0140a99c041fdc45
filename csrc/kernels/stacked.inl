// bfloat16 where the processor multiplies pairs, few rows of x: every product is of W itself, read once a pass and never
// rescaled. With A = g W and B = (g ⊙ s_r) W [M, K], C = (x ⊙ s_c) Wᵀ [M, N], for rank 1:
//
//     y = x Wᵀ + s_r ⊙ C      ∂x = A + s_c ⊙ B      ∂s_c = Σ_m x ⊙ B      ∂s_r = Σ_m g ⊙ C
//
// The forward knows higher ranks, a C for each, and takes the rows of several adapters of one W in one pass.
//
// x ⊙ s_c is rounded to bfloat16 where the formula rounds W', so the error of y is of the same size. In backward x ⊙ s_c and
// g ⊙ s_r are two bfloat16 numbers each, or the scale gradients would have the error of G rounded and at times more. float32
// has no such form: W x and its rescaling cancel in coarser digits than W' has.

// The operands of one factor in backward: rows of `from`, of from ⊙ scale rounded and of what the rounding left; all
// zero-padded to whole vectors of 32.
class Stacked {
 public:
  // scale: [groups, cols]; `scaled` and `rest` then are [groups, count, stride].
  Stacked(const Matrix& from, int64_t count, int64_t cols, const float* scale, int64_t groups)
      : stride(round_up(cols, 2 * kWidth)),
        buffer_((1 + 2 * groups) * count * stride * sizeof(bf16)),
        plain(static_cast<bf16*>(buffer_.data())),
        scaled(plain + count * stride),
        rest(scaled + groups * count * stride) {
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

// A row of x in a forward, of any call.
struct StackedRow {
  const Weight* weight;  // with the call's scales
  const bf16* x;         // [K]
  Bias bias;
  bf16* y;  // [N]

  const float* scale_row() const { return static_cast<const float*>(weight->row); }  // [N, rank]
};

// The rows of calls that share x, W and y, one after the other, as operands of products with W: of each row and group of W
// x and then, rounded, x ⊙ s_c of every rank; zero-padded to whole vectors of 32.
class StackedCalls {
 public:
  StackedCalls(const Forward* calls, int64_t size)
      : count(rows_of(calls, size)),
        stride(round_up(calls->weight.cols, 2 * kWidth)),
        operands_(1 + calls->weight.rank),
        buffer_(calls->weight.groups * count * operands_ * stride * sizeof(bf16)),
        rows_(count * sizeof(StackedRow)),
        rows(static_cast<StackedRow*>(rows_.data())) {
    StackedRow* out = rows;
    for (const Forward* call = calls; call < calls + size; ++call) {
      for_runs(call->runs, 0, call->count, [&](int64_t, int64_t first, int64_t n) {
        for (int64_t m = first; m < first + n; ++m, ++out) {
          *out = {&call->weight, static_cast<const bf16*>(call->x.data) + m * call->x.stride, call->bias,
                  static_cast<bf16*>(call->y) + m * call->weight.rows};
        }
      });
    }
    const int64_t groups = calls->weight.groups;
    auto body = [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fill(rows[i / groups], i % groups, at(i % groups, i / groups));
    };
    count * groups * stride < 1 << 14 ? body(0, 0, count * groups) : parallel(count * groups, body);
  }

  // The operands of row m beside a group of W: [1 + rank, stride], followed by those of row m + 1.
  bf16* at(int64_t group, int64_t m) const {
    return static_cast<bf16*>(buffer_.data()) + (group * count + m) * operands_ * stride;
  }

  int64_t count, stride;

 private:
  static int64_t rows_of(const Forward* calls, int64_t size) {
    int64_t total = 0;
    for (int64_t i = 0; i < size; ++i) total += calls[i].count;
    return total;
  }

  void fill(const StackedRow& row, int64_t group, bf16* out) const {
    const Weight& weight = *row.weight;
    const float* col = static_cast<const float*>(weight.col) + group * weight.rank * weight.cols;
    for (int64_t k = 0; k < stride; k += 2 * kWidth) {
      const int64_t left = weight.cols - k;
      store_pairs(out + k, load_pairs(row.x + k, first_elements(left)));
      const Vec a = load_upto(row.x + k, left), b = load_upto(row.x + k + kWidth, left - kWidth);
      for (int64_t j = 0; j < weight.rank; ++j) {
        const float* s = col + j * weight.cols + k;
        const Vec a_s = mul(a, load_upto(s, left)), b_s = mul(b, load_upto(s + kWidth, left - kWidth));
        store_pairs(out + (1 + j) * stride + k, round_both(a_s, b_s));
      }
    }
  }

  int64_t operands_;
  Buffer buffer_, rows_;

 public:
  StackedRow* rows;
};

// product [V, NR] = the operands x [V, stride] times the rows w [NR] of W, to be summed over lanes. `ahead`: where to fetch
// from, in elements of W.
template <int V, int NR>
INLINE void multiply_stacked(const Weight& weight, const bf16* w, int64_t ahead, const bf16* x, int64_t stride,
                             Vec (&product)[V][NR]) {
  clear(product);
  auto step = [&](int64_t k, __mmask32 elements) __attribute__((always_inline)) {
    Pairs w_k[NR];
    UNROLL for (int i = 0; i < NR; ++i) {
      __builtin_prefetch(w + i * weight.stride + k + ahead);
      w_k[i] = load_pairs(w + i * weight.stride + k, elements);
    }
    UNROLL for (int v = 0; v < V; ++v) {
      const Pairs x_k = load_pairs(x + v * stride + k);
      UNROLL for (int i = 0; i < NR; ++i) product[v][i] = multiply_pairs(w_k[i], x_k, product[v][i]);
    }
  };
  int64_t k = 0;
  for (; k + 2 * kWidth <= weight.cols; k += 2 * kWidth) step(k, ~__mmask32{0});
  if (k < weight.cols) step(k, first_elements(weight.cols - k));
}

// y of a row [NR], for the rows n.. of W, from its sums by lane.
template <int NR>
INLINE void store_stacked(const StackedRow& row, int64_t n, const Vec (&total)[NR]) {
  float sums[NR];
  sum_lanes(total, sums);
  UNROLL for (int i = 0; i < NR; ++i) assign(row.y[n + i], sums[i] + bias_at(row.bias, n + i));
}

// y [MR, NR] for rank 1.
template <int MR, int NR>
INLINE void stacked_tile(const Weight& weight, int64_t n, bool fetch, const StackedRow* rows, const bf16* x, int64_t stride) {
  Vec product[2 * MR][NR];
  const int64_t ahead = fetch ? rows_ahead<bf16>(weight, NR) : 0;
  multiply_stacked(weight, static_cast<const bf16*>(weight.data) + n * weight.stride, ahead, x, stride, product);
  UNROLL for (int m = 0; m < MR; ++m) {
    Vec total[NR];
    UNROLL for (int i = 0; i < NR; ++i) {
      const Vec scale = splat(rows[m].scale_row()[n + i]), rescaled = product[2 * m + 1][i];
      total[i] = rows[m].weight->base != 0 ? fma(scale, rescaled, product[2 * m][i]) : mul(scale, rescaled);
    }
    store_stacked(rows[m], n, total);
  }
}

// y [1, NR] for any rank, a few of the operands at a time.
template <int NR>
void stacked_ranks(const Weight& weight, const StackedRow& row, const bf16* x, int64_t stride, int64_t n) {
  Vec total[NR];
  UNROLL for (int i = 0; i < NR; ++i) total[i] = zero();
  for (int64_t v = row.weight->base != 0 ? 0 : 1; v <= weight.rank;) {
    auto some = [&](auto operands) __attribute__((always_inline)) {
      constexpr int V = decltype(operands)::value;
      Vec product[V][NR];
      const bf16* w = static_cast<const bf16*>(weight.data) + n * weight.stride;
      multiply_stacked(weight, w, 0, x + v * stride, stride, product);
      UNROLL for (int u = 0; u < V; ++u) {
        UNROLL for (int i = 0; i < NR; ++i) {
          const float scale = v + u == 0 ? 1 : row.scale_row()[(n + i) * weight.rank + v + u - 1];
          total[i] = fma(splat(scale), product[u][i], total[i]);
        }
      }
      v += V;
    };
    with_count<6>(least(6, weight.rank + 1 - v), some);
  }
  store_stacked(row, n, total);
}

// Rank 1 and enough rows to transpose W for them, a panel at a time: the lanes of a tile are rows of W.
void stacked_panels(const Weight& weight, const StackedCalls& x) {
  const Buffer zeros(most(weight.rows, weight.groups * weight.cols) * sizeof(float));
  __builtin_memset(zeros.data(), 0, most(weight.rows, weight.groups * weight.cols) * sizeof(float));
  Weight bare = weight;
  bare.row = bare.col = zeros.data();
  bare.base = 1;
  multiply_panels(
      bare, weight.group_rows(), 2 * x.count,
      [&](int64_t n, auto visit) __attribute__((always_inline)) {
        const int64_t group = n / weight.group_rows();
        for_tiles(x.count, kPairRows / 2, [&](int64_t m, int64_t height) __attribute__((always_inline)) {
          visit(2 * m, m, 2 * height, x.at(group, m), x.stride);
        });
      },
      [&](int64_t n, int64_t some) __attribute__((always_inline)) {
        return [&x, n, some](int64_t m, auto& total) __attribute__((always_inline)) {
          constexpr int MR = sizeof(total) / sizeof(total[0]);
          UNROLL for (int i = 0; i + 1 < MR; i += 2) {
            const StackedRow& row = x.rows[m + i / 2];
            Vec y[kPairVectors];
            UNROLL for (int j = 0; j < kPairVectors; ++j) {
              const int64_t at = n + j * kWidth, left = some - j * kWidth;
              const Vec scale = load_upto(row.scale_row() + at, left);
              y[j] = row.weight->base != 0 ? fma(scale, total[i + 1][j], total[i][j]) : mul(scale, total[i + 1][j]);
              y[j] = add(y[j], load_bias(row.bias, at, left));
            }
            store_row(row.y + n, y[0], y[1], y[2], y[3], some);
          }
        };
      });
}

// Calls that share x, W and y.
void forward_stacked(const Forward* calls, int64_t size) {
  const Weight& weight = calls->weight;
  const StackedCalls x(calls, size);
  if (weight.rank == 1 && x.count > kFewStackedRows) return stacked_panels(weight, x);
  const int64_t group_rows = weight.group_rows();
  const int64_t block_rows = cache_rows<bf16>(weight), blocks = (group_rows + block_rows - 1) / block_rows;
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t group = block / blocks, first = group * group_rows + block % blocks * block_rows;
      const int64_t last = least(first + block_rows, (group + 1) * group_rows);
      auto each = [&](auto step, auto tile) __attribute__((always_inline)) {  // by tiles of that many rows of W
        constexpr int NR = decltype(step)::value;
        int64_t n = first;
        for (; n + NR <= last; n += NR) tile(step, n);
        for (; n < last; ++n) tile(Count<1>(), n);
      };
      for (int64_t m = 0; weight.rank > 1 && m < x.count; ++m) {
        each(Count<4>(), [&](auto width, int64_t n) __attribute__((always_inline)) {
          stacked_ranks<decltype(width)::value>(weight, x.rows[m], x.at(group, m), x.stride, n);
        });
      }
      if (weight.rank > 1) continue;
      for_tiles(x.count, 3, [&](int64_t m, int64_t count) __attribute__((always_inline)) {
        auto rows = [&](auto height) __attribute__((always_inline)) {
          constexpr int MR = decltype(height)::value;
          each(Count<MR == 1 ? 8 : 4>(), [&](auto width, int64_t n) __attribute__((always_inline)) {
            stacked_tile<MR, decltype(width)::value>(weight, n, m == 0, x.rows + m, x.at(group, m), x.stride);
          });
        };
        with_count<3>(count, rows);
      });
    }
  };
  parallel(blocks * weight.groups, body);
}

// ---------------------------------------------------------------- backward

constexpr int64_t kStackedRows = 4;  // rows of x in one pass over a block of W

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
      for (; n < last; n += 2) {
        for (int64_t i = 0; i < MR; ++i) {
          const StackedRows x_i(x, count, group, m + i), g_i(g, count, 0, m + i);
          stacked_rows<1, 2>(weight, x_i, g_i, n, last - n, sums_m + i * x.stride * 2, grad_row);
        }
      }
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
  const Stacked g(p.grad_y, count, rows, row, 1);
  const Stacked x(scales ? p.x : Matrix{nullptr, 0}, scales ? count : 0, cols, col, groups);
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
