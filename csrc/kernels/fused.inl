// Few rows of x: W is read once and rescaled in registers, nothing W-sized is written.

// Vectors of W summed in one go where they are narrow: longer chains lose to eager's fp32. Sixteen lanes need no break.
constexpr int64_t kChain = 128;

// y tile [MR, NR] of rows n.. of W; every row of the tile lies in one group. `kFetch`: W comes from memory.
template <int MR, int NR, class W, bool kRankOne, bool kFetch>
SHARED void fused_tile(const Weight& weight, int64_t n, const float* x, int64_t x_stride, const Bias& bias, float* y,
                       int64_t y_stride) {
  const int64_t cols = weight.cols, rank = weight.rank;
  const W* w = static_cast<const W*>(weight.data) + n * weight.stride;
  const float* row = static_cast<const float*>(weight.row) + n * rank;
  const float* col = static_cast<const float*>(weight.col) + n / weight.group_rows() * rank * cols;
  const Vec base = splat(static_cast<float>(weight.base));
  const int64_t ahead = rows_ahead<W>(weight, NR);
  Vec scale[NR], total[MR][NR], earlier[MR][NR];
  UNROLL for (int i = 0; i < NR; ++i) {
    scale[i] = splat(row[i * rank]);
    UNROLL for (int m = 0; m < MR; ++m) total[m][i] = earlier[m][i] = zero();
  }
  auto step = [&](int64_t k, auto load_some, int64_t lanes) __attribute__((always_inline)) {
    Vec x_k[MR];
    UNROLL for (int m = 0; m < MR; ++m) x_k[m] = load_some(x + m * x_stride + k);
    const Vec col_k = load_some(col + k);
    UNROLL for (int i = 0; i < NR; ++i) {
      const Vec f = kRankOne ? fma(scale[i], col_k, base) : factor(base, row + i * rank, col + k, cols, rank, col_k, lanes);
      if (kFetch) __builtin_prefetch(w + i * weight.stride + k + ahead);
      const Vec scaled = mul(load_some(w + i * weight.stride + k), f);
      UNROLL for (int m = 0; m < MR; ++m) total[m][i] = fma(x_k[m], scaled, total[m][i]);
    }
  };
  int64_t k = 0;
  for (int64_t vectors = 1; k + kWidth <= cols; k += kWidth, ++vectors) {
    step(k, [](const auto* p) __attribute__((always_inline)) { return load(p); }, kWidth);
    if (kWidth < 16 && vectors % kChain == 0) {
      UNROLL for (int m = 0; m < MR; ++m) {
        UNROLL for (int i = 0; i < NR; ++i) earlier[m][i] = add(earlier[m][i], total[m][i]), total[m][i] = zero();
      }
    }
  }
  if (const int64_t lanes = cols - k; lanes > 0) {
    step(k, [lanes](const auto* p) __attribute__((always_inline)) { return load_first(p, lanes); }, lanes);
  }
  UNROLL for (int m = 0; m < MR; ++m) {
    UNROLL for (int i = 0; i < NR; ++i) total[m][i] = add(total[m][i], earlier[m][i]);
    if (NR % 4 == 0) {
      UNROLL for (int i = 0; i + 3 < NR; i += 4) {
        sum4(total[m][i], total[m][i + 1], total[m][i + 2], total[m][i + 3], y + m * y_stride + i);
      }
    } else {
      UNROLL for (int i = 0; i < NR; ++i) y[m * y_stride + i] = sum(total[m][i]);
    }
    for (int i = 0; i < NR; ++i) y[m * y_stride + i] += bias_at(bias, n + i);
  }
}

template <int MR, class W, bool kRankOne>
void fused_rows(const Forward& p, const float* x, int64_t x_stride, float* y) {
  constexpr int kRows = MR == 1 ? kStreamRows : 4;
  const int64_t group_rows = p.weight.group_rows();
  const int64_t blocks = (group_rows + kRows - 1) / kRows;
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first_row = block / blocks * group_rows;
      int64_t n = first_row + block % blocks * kRows;
      const int64_t last = least(n + kRows, first_row + group_rows);
      if (n + kRows == last) {
        fused_tile<MR, kRows, W, kRankOne, true>(p.weight, n, x, x_stride, p.bias, y + n, p.weight.rows);
        continue;
      }
      for (; n < last; ++n) {
        for (int64_t m = 0; m < MR; ++m) {
          fused_tile<1, 1, W, kRankOne, false>(p.weight, n, x + m * x_stride, x_stride, p.bias, y + m * p.weight.rows + n, 1);
        }
      }
    }
  };
  parallel(blocks * p.weight.groups, body);
}

template <class W, bool kRankOne>
void fused_forward(const Forward& p) {
  const Widened x(p.x, p.type, p.count, p.weight.cols);
  const bool rounds = p.type == Type::bf16;
  const Buffer wide(rounds ? p.count * p.weight.rows * sizeof(float) : 0);
  float* y = static_cast<float*>(rounds ? wide.data() : p.y);
  int64_t m = 0;
  for (; m < p.count;) {
    const float* x_m = x.data + m * x.stride;
    float* y_m = y + m * p.weight.rows;
    const int64_t left = p.count - m;
    if (left >= 4 && kWidth > 8) {
      fused_rows<4, W, kRankOne>(p, x_m, x.stride, y_m), m += 4;
    } else if (left >= 3 && kWidth > 8) {
      fused_rows<3, W, kRankOne>(p, x_m, x.stride, y_m), m += 3;
    } else if (left >= 2) {
      fused_rows<2, W, kRankOne>(p, x_m, x.stride, y_m), m += 2;
    } else {
      fused_rows<1, W, kRankOne>(p, x_m, x.stride, y_m), m += 1;
    }
  }
  if (!rounds) return;
  const int64_t size = p.count * p.weight.rows;
  for (int64_t i = 0; i < size; i += kWidth) {
    store_upto(static_cast<bf16*>(p.y) + i, load_upto(y + i, size - i), size - i);
  }
}

void forward_fused(const Forward& p) {
#ifdef RLRR_PAIRS
  const bool stacks = p.weight.rank == 1 && p.type == Type::bf16 && p.weight.type == Type::bf16;
  if (stacks && pairs_supported()) return pairs_avx512.forward_stacked(&p, 1);
#endif
  with_form(p.weight, [&](auto w, auto one) { fused_forward<decltype(w), decltype(one)::value>(p); });
}

// ---------------------------------------------------------------- backward

// Vectors along a row of W in one fp32 sum of ∂s_r, which then goes to a double: at 4 lanes 8 lose to eager.
constexpr int64_t kRowRun = kWidth < 8 ? 4 : 32;

// Where one thread, which owns the columns [begin, end), sums.
struct Stream {
  int64_t begin, end, width;  // width: end - begin rounded up to whole vectors
  const float* x;             // [count, cols]
  int64_t x_stride;
  const float* grad_y;  // [count, rows]
  int64_t grad_y_stride;
  float* grad_x;                 // [count, width] or null: the rows of W since the last flush
  float* grad_x_total;           // [count, width]
  float *grad_col, *col_error;   // [rank, width], of the current group
  float* row_lanes;              // [rank, kStreamRows, kWidth]
  double* grad_row;              // [rows, rank], this slot's, from zero
};

// The same for a single row of x, where G is an outer product and five operations a vector of W are enough.
template <int NR, class W>
INLINE void single_rows(const Backward& p, const Stream& s, int64_t n) {
  const Weight& weight = p.weight;
  const W* w = static_cast<const W*>(weight.data) + n * weight.stride;
  const float* row = static_cast<const float*>(weight.row) + n;
  const float* col = static_cast<const float*>(weight.col) + n / weight.group_rows() * weight.cols;
  const Vec base = splat(static_cast<float>(weight.base));
  const int64_t ahead = NR * weight.stride;
  Vec scale[NR], g[NR], row_total[NR];
  UNROLL for (int i = 0; i < NR; ++i) {
    scale[i] = splat(row[i]);
    g[i] = splat(s.grad_y[n + i]);
  }
  for (int64_t run = s.begin; run < s.end; run += kRowRun * kWidth) {
    UNROLL for (int i = 0; i < NR; ++i) row_total[i] = zero();
    for (int64_t k = run; k < least(s.end, run + kRowRun * kWidth); k += kWidth) {
      const int64_t at = k - s.begin, lanes = s.end - k;
      const Vec x_k = load_upto(s.x + k, lanes), col_k = load_upto(col + k, lanes), both = mul(x_k, col_k);
      Vec x_sum = zero(), col_sum = zero();
      UNROLL for (int i = 0; i < NR; ++i) {
        __builtin_prefetch(w + i * weight.stride + k + ahead);
        const Vec product = mul(g[i], load_upto(w + i * weight.stride + k, lanes));
        x_sum = fma(product, fma(scale[i], col_k, base), x_sum);
        col_sum = fma(product, scale[i], col_sum);
        row_total[i] = fma(product, both, row_total[i]);
      }
      store(s.grad_x + at, add(load(s.grad_x + at), x_sum));
      add_compensated(s.grad_col + at, s.col_error + at, mul(col_sum, x_k));
    }
    UNROLL for (int i = 0; i < NR; ++i) s.grad_row[n + i] += sum(row_total[i]);
  }
}

// out += Σ_i g[i] rows[i]; of many rows their sum, rounded apart from what is there.
template <int NR>
INLINE void add_rows(const float* g, const Vec (&rows)[NR], float* out) {
  if (NR == 1) return store(out, fma(splat(g[0]), rows[0], load(out)));
  Vec total = mul(splat(g[0]), rows[0]);
  UNROLL for (int i = 1; i < NR; ++i) total = fma(splat(g[i]), rows[i], total);
  store(out, add(load(out), total));
}

// NR rows of W from n: adds to every gradient. h = the tile of G.
template <int NR, class W, bool kRankOne>
INLINE void stream_rows(const Backward& p, const Stream& s, int64_t n) {
  const Weight& weight = p.weight;
  const int64_t cols = weight.cols, rank = weight.rank;
  const W* w = static_cast<const W*>(weight.data) + n * weight.stride;
  const float* row = static_cast<const float*>(weight.row) + n * rank;
  const float* col = static_cast<const float*>(weight.col) + n / weight.group_rows() * rank * cols;
  const Vec base = splat(static_cast<float>(weight.base));
  Vec row_total[NR];
  const bool scales = s.x != nullptr;
  auto step = [&](int64_t k, auto load_some, int64_t lanes) __attribute__((always_inline)) {
    const int64_t at = k - s.begin;
    Vec scaled[NR], h[NR];
    const Vec col_k = load_some(col + k);
    UNROLL for (int i = 0; i < NR; ++i) {
      const Vec f = factor(base, row + i * rank, col + k, cols, kRankOne ? 1 : rank, col_k, lanes);
      scaled[i] = mul(load_some(w + i * weight.stride + k), f);
      h[i] = zero();
    }
    const float* g = s.grad_y + n;
    if (s.grad_x != nullptr && scales) {
      for (int64_t m = 0; m < p.count; ++m, g += s.grad_y_stride) {
        const Vec x_k = load_some(s.x + m * s.x_stride + k);
        float* out = s.grad_x + m * s.width + at;
        UNROLL for (int i = 0; i < NR; ++i) h[i] = fma(splat(g[i]), x_k, h[i]);
        add_rows(g, scaled, out);
      }
    } else if (s.grad_x != nullptr) {
      for (int64_t m = 0; m < p.count; ++m, g += s.grad_y_stride) {
        add_rows(g, scaled, s.grad_x + m * s.width + at);
      }
      return;
    } else {
      for (int64_t m = 0; m < p.count; ++m, g += s.grad_y_stride) {
        const Vec x_k = load_some(s.x + m * s.x_stride + k);
        UNROLL for (int i = 0; i < NR; ++i) h[i] = fma(splat(g[i]), x_k, h[i]);
      }
    }
    Vec col_sum = zero();
    UNROLL for (int i = 0; i < NR; ++i) {
      h[i] = mul(h[i], load_some(w + i * weight.stride + k));
      row_total[i] = fma(h[i], col_k, row_total[i]);
      col_sum = fma(h[i], splat(row[i * rank]), col_sum);
    }
    add_compensated(s.grad_col + at, s.col_error + at, col_sum);
    if (kRankOne) return;
    for (int64_t j = 1; j < rank; ++j) {
      const Vec col_j = load_some(col + j * cols + k);
      col_sum = zero();
      UNROLL for (int i = 0; i < NR; ++i) {
        float* lanes_j = s.row_lanes + (j * NR + i) * kWidth;
        store(lanes_j, fma(h[i], col_j, load(lanes_j)));
        col_sum = fma(h[i], splat(row[i * rank + j]), col_sum);
      }
      add_compensated(s.grad_col + j * s.width + at, s.col_error + j * s.width + at, col_sum);
    }
  };
  for (int64_t k = s.begin; k < s.end;) {
    UNROLL for (int i = 0; i < NR; ++i) row_total[i] = zero();
    if (!kRankOne) __builtin_memset(s.row_lanes, 0, rank * NR * kWidth * sizeof(float));
    const int64_t until = least(s.end, k + kRowRun * kWidth);
    for (; k + kWidth <= until; k += kWidth) {
      step(k, [](const auto* p) __attribute__((always_inline)) { return load(p); }, kWidth);
    }
    if (const int64_t lanes = until - k; lanes > 0) {
      step(k, [lanes](const auto* p) __attribute__((always_inline)) { return load_first(p, lanes); }, lanes);
      k = until;
    }
    UNROLL for (int i = 0; scales && i < NR; ++i) {
      double* out = s.grad_row + (n + i) * rank;
      out[0] += sum(row_total[i]);
      for (int64_t j = 1; j < rank; ++j) out[j] += sum(load(s.row_lanes + (j * NR + i) * kWidth));
    }
  }
}

constexpr int64_t kFlush = 32;  // row blocks of W whose ∂x is summed before it goes to the total: short fp32 chains

void flush_grad_x(const Stream& s, int64_t size) {
  for (int64_t i = 0; i < size; i += kWidth) {
    store(s.grad_x_total + i, add(load(s.grad_x_total + i), load(s.grad_x + i)));
    store(s.grad_x + i, zero());
  }
}

template <class W, bool kRankOne>
void fused_backward(const Backward& p) {
  const Weight& weight = p.weight;
  const int64_t rows = weight.rows, cols = weight.cols, rank = weight.rank, group_rows = weight.group_rows();
  const bool scales = p.grad_row != nullptr || p.grad_col != nullptr;
  const Widened x(scales ? p.x : Matrix{nullptr, 0}, p.type, p.count, cols);
  const Widened grad_y(p.grad_y, p.type, p.count, rows);
  constexpr int64_t kUnit = 2 * kWidth;
  const int64_t units = (cols + kUnit - 1) / kUnit, slots = worker_count(units);
  const Buffer partial(scales ? slots * rows * rank * sizeof(double) : 0);
  if (scales) __builtin_memset(partial.data(), 0, slots * rows * rank * sizeof(double));
  const bool single = kRankOne && p.count == 1 && scales && p.grad_x != nullptr;
  auto body = [&](int64_t slot, int64_t begin, int64_t end) {
    Stream s{begin * kUnit, least(end * kUnit, cols), (end - begin) * kUnit, x.data, x.stride,
             grad_y.data,   grad_y.stride,            nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    const int64_t x_size = p.grad_x != nullptr ? p.count * s.width : 0, col_size = scales ? rank * s.width : 0;
    const Buffer sums((2 * x_size + 2 * col_size + rank * kStreamRows * kWidth) * sizeof(float));
    float* at = static_cast<float*>(sums.data());
    __builtin_memset(at, 0, 2 * x_size * sizeof(float));
    s.grad_x = p.grad_x != nullptr ? at : nullptr;
    s.grad_x_total = at + x_size;
    s.grad_col = at + 2 * x_size;
    s.col_error = s.grad_col + col_size;
    s.row_lanes = s.col_error + col_size;
    s.grad_row = static_cast<double*>(partial.data()) + slot * rows * rank;
    for (int64_t group = 0; group < weight.groups; ++group) {
      __builtin_memset(s.grad_col, 0, 2 * col_size * sizeof(float));
      int64_t n = group * group_rows;
      const int64_t last = n + group_rows;
      for (int64_t block = 1; n + kStreamRows <= last; n += kStreamRows, ++block) {
        single ? single_rows<kStreamRows, W>(p, s, n) : stream_rows<kStreamRows, W, kRankOne>(p, s, n);
        if (block % kFlush == 0) flush_grad_x(s, x_size);
      }
      for (; n < last; ++n) stream_rows<1, W, kRankOne>(p, s, n);
      if (p.grad_col == nullptr) continue;
      for (int64_t j = 0; j < rank; ++j) {
        __builtin_memcpy(p.grad_col + (group * rank + j) * cols + s.begin, s.grad_col + j * s.width,
                         (s.end - s.begin) * sizeof(float));
      }
    }
    flush_grad_x(s, x_size);
    for (int64_t m = 0; p.grad_x != nullptr && m < p.count; ++m) {
      for (int64_t k = s.begin; k < s.end; k += kWidth) {
        const Vec value = load(s.grad_x_total + m * s.width + k - s.begin);
        if (p.type == Type::f32) {
          store_upto(static_cast<float*>(p.grad_x) + m * cols + k, value, s.end - k);
        } else {
          store_upto(static_cast<bf16*>(p.grad_x) + m * cols + k, value, s.end - k);
        }
      }
    }
  };
  parallel(units, body);
  if (p.grad_row != nullptr) {
    finish_grad_row(static_cast<const double*>(partial.data()), slots, rows * rank, p.grad_row);
  }
}

void backward_fused(const Backward& p) {
#ifdef RLRR_PAIRS
  const bool stacks = p.weight.rank == 1 && p.type == Type::bf16 && p.weight.type == Type::bf16;
  if (stacks && pairs_supported()) return pairs_avx512.backward_stacked(p);
#endif
  with_form(p.weight, [&](auto w, auto one) { fused_backward<decltype(w), decltype(one)::value>(p); });
}
