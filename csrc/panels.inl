// More rows of x: three matrix products on tiles that stay in registers and in the L1 cache. W' is made a block at a time
// right where it is multiplied, and a tile of G = gᵀx is multiplied by W and summed without leaving the core.
//
// Everything here is fp32 (a bfloat16 x is widened first): pairs.inl has what processors with bf16 products run. Packed
// operands are zero-padded, so tails cost a branch at the edge and none inside.

constexpr int64_t kPanel = 2 * kWidth;  // columns of one outer-product tile
constexpr int64_t kChunk = 256;         // rows of x handled together in backward
constexpr int64_t kRun = 128;           // elements contracted in one run of additions
constexpr int64_t kBlockRows = 8;       // rows of W' prepared together in forward
constexpr int64_t kDepth = 768;         // columns of such a block: 24 KiB

// ---------------------------------------------------------------- forward: vectors run along the contraction

// out [MR, 4] (+)= x [MR, depth] · w [4, depth]ᵀ; w is zero-padded to whole vectors. `out` has rows of kBlockRows.
template <int MR>
void dot_tile(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t depth, float* out, bool first) {
  Vec total[MR][4];
  UNROLL for (int m = 0; m < MR; ++m) {
    UNROLL for (int i = 0; i < 4; ++i) total[m][i] = zero();
  }
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) {
    Vec w_k[4];
    UNROLL for (int i = 0; i < 4; ++i) w_k[i] = load(w + i * w_stride + k);
    UNROLL for (int m = 0; m < MR; ++m) {
      const auto x_k = load(x + m * x_stride + k);
      UNROLL for (int i = 0; i < 4; ++i) total[m][i] = fma(x_k, w_k[i], total[m][i]);
    }
  }
  if (k < depth) {
    UNROLL for (int m = 0; m < MR; ++m) {
      const auto x_k = load_first(x + m * x_stride + k, depth - k);
      UNROLL for (int i = 0; i < 4; ++i) total[m][i] = fma(x_k, load(w + i * w_stride + k), total[m][i]);
    }
  }
  UNROLL for (int m = 0; m < MR; ++m) {
    float sums[4];
    sum4(total[m][0], total[m][1], total[m][2], total[m][3], sums);
    UNROLL for (int i = 0; i < 4; ++i) out[m * kBlockRows + i] = first ? sums[i] : out[m * kBlockRows + i] + sums[i];
  }
}

template <int MR>
INLINE void dot_rows(int64_t rows, const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t depth, float* out,
                     bool first) {
  if constexpr (MR > 1) {
    if (rows < MR) return dot_rows<MR - 1>(rows, x, x_stride, w, w_stride, depth, out, first);
  }
  dot_tile<MR>(x, x_stride, w, w_stride, depth, out, first);
}

// block [kBlockRows, stride] = W' [n.., k..k + depth), zero-padded to whole vectors and to kBlockRows rows.
template <class W>
void prepare_rows(const Weight& weight, int64_t n, int64_t rows, int64_t k, int64_t depth, float* block, int64_t stride) {
  const float* row = static_cast<const float*>(weight.row) + n * weight.rank;
  const float* col = static_cast<const float*>(weight.col) + n / weight.group_rows() * weight.rank * weight.cols + k;
  const W* w = static_cast<const W*>(weight.data) + n * weight.stride + k;
  const Vec base = splat(static_cast<float>(weight.base));
  for (int64_t i = 0; i < rows; ++i) {
    const W* w_i = w + i * weight.stride;
    const float* row_i = row + i * weight.rank;
    float* out = block + i * stride;
    for (int64_t at = 0; at < stride; at += kWidth) {
      const Vec f = factor(base, row_i, col + at, weight.cols, weight.rank, depth - at);
      store(out + at, mul(load_upto(w_i + at, depth - at), f));
    }
  }
  __builtin_memset(block + rows * stride, 0, (kBlockRows - rows) * stride * sizeof(float));
}

template <class W, class Y>
void panels_forward(const Forward& p, const float* x, int64_t x_stride) {
  const Weight& weight = p.weight;
  const int64_t cols = weight.cols, group_rows = weight.group_rows();
  const int64_t blocks = (group_rows + kBlockRows - 1) / kBlockRows;
  const int64_t deepest = round_up(least(cols, kDepth), kWidth);
  constexpr int64_t kRows = 192;  // rows of x that stay in the L2 cache
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    const Buffer block_buffer(kBlockRows * deepest * sizeof(float)), sums_buffer(kRows * kBlockRows * sizeof(float));
    float* w = static_cast<float*>(block_buffer.data());
    float* sums = static_cast<float*>(sums_buffer.data());
    for (int64_t start = 0; start < p.count; start += kRows) {
      const int64_t count = least(kRows, p.count - start);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t n = block / blocks * group_rows + block % blocks * kBlockRows;
        const int64_t rows = least(kBlockRows, group_rows - block % blocks * kBlockRows);
        for (int64_t k = 0; k < cols; k += kDepth) {
          const int64_t depth = least(kDepth, cols - k), stride = round_up(depth, kWidth);
          prepare_rows<W>(weight, n, rows, k, depth, w, stride);
          for (int64_t m = 0; m < count; m += kDotRows) {
            for (int64_t i = 0; i < rows; i += 4) {
              dot_rows<kDotRows>(count - m, x + (start + m) * x_stride + k, x_stride, w + i * stride, stride, depth,
                                 sums + m * kBlockRows + i, k == 0);
            }
          }
        }
        for (int64_t m = 0; m < count; ++m) {
          Y* y = static_cast<Y*>(p.y) + (start + m) * weight.rows + n;
          for (int64_t i = 0; i < rows; i += kWidth) {
            Vec value = load_upto(sums + m * kBlockRows + i, kBlockRows - i);
            if (p.bias != nullptr) value = add(value, load_upto(p.bias + n + i, rows - i));
            store_upto(y + i, value, rows - i);
          }
        }
      }
    }
  };
  parallel(blocks * weight.groups, body);
}

void forward_panels(const Forward& p) {
  const bool wide_weight = p.weight.type == Type::f32;
  if (p.type == Type::f32) {
    return panels_forward<float, float>(p, static_cast<const float*>(p.x.data), p.x.stride);
  }
#ifdef RLRR_PAIRS
  if (pairs_supported()) return forward_pairs(p);
#endif
  const Widened x(p.x, p.type, p.count, p.weight.cols);
  wide_weight ? panels_forward<float, bf16>(p, x.data, x.stride)
              : panels_forward<bf16, bf16>(p, x.data, x.stride);
}

// ---------------------------------------------------------------- backward: vectors run along the columns of W

// out [MR, kPanel] (+)= Σ_s a[s, :MR] ⊗ b[s, :]; a has rows of kTileRows, b of kPanel.
template <int MR>
void outer_tile(const float* a, const float* b, int64_t steps, float* out, bool first) {
  Vec total[MR][2];
  UNROLL for (int i = 0; i < MR; ++i) total[i][0] = total[i][1] = zero();
  for (int64_t s = 0; s < steps; ++s, a += kTileRows, b += kPanel) {
    const auto b0 = load(b), b1 = load(b + kWidth);
    UNROLL for (int i = 0; i < MR; ++i) {
      const auto a_i = splat(a[i]);
      total[i][0] = fma(a_i, b0, total[i][0]);
      total[i][1] = fma(a_i, b1, total[i][1]);
    }
  }
  UNROLL for (int i = 0; i < MR; ++i) {
    float* row = out + i * kPanel;
    store(row, first ? total[i][0] : add(load(row), total[i][0]));
    store(row + kWidth, first ? total[i][1] : add(load(row + kWidth), total[i][1]));
  }
}

template <int MR>
INLINE void outer_rows(int64_t rows, const float* a, const float* b, int64_t steps, float* out, bool first) {
  if constexpr (MR > 1) {
    if (rows < MR) return outer_rows<MR - 1>(rows, a, b, steps, out, first);
  }
  // One accumulator over thousands of terms would lose digits to eager's blocked sums.
  for (int64_t s = 0; s < steps; s += kRun) {
    outer_tile<MR>(a + s * kTileRows, b + s * kPanel, least(kRun, steps - s), out, first && s == 0);
  }
}

// Both packings of a chunk of g, [tiles][steps][kTileRows]: `across` contracts n for ∂x, its tiles hold rows m;
// `down` contracts m for G, its tiles hold columns n and never straddle two groups.
struct PackedGradient {
  const float* g;
  int64_t stride, count, rows, group_rows;
  float *across, *down;

  int64_t across_tiles() const { return (count + kTileRows - 1) / kTileRows; }
  int64_t group_tiles() const { return (group_rows + kTileRows - 1) / kTileRows; }
  int64_t down_tiles() const { return group_tiles() * (rows / group_rows); }

  void pack_across(int64_t tile) const {
    float* out = across + tile * rows * kTileRows;
    const int64_t m = tile * kTileRows, some = least(kTileRows, count - m);
    const float* from = g + m * stride;
    for (int64_t n = 0; n < rows; ++n, out += kTileRows) {
      for (int64_t i = 0; i < some; ++i) out[i] = from[i * stride + n];
    }
  }
  void pack_down(int64_t tile) const {
    float* out = down + tile * count * kTileRows;
    const int64_t at = tile % group_tiles() * kTileRows, n = tile / group_tiles() * group_rows + at;
    const int64_t some = least(kTileRows, group_rows - at);
    for (int64_t m = 0; m < count; ++m) __builtin_memcpy(out + m * kTileRows, g + m * stride + n, some * sizeof(float));
  }
};

// block [rows, kPanel] = W' [n.., k..k + kPanel) for `rows` rows, zero-padded.
template <class W>
void prepare_columns(const Weight& weight, int64_t n, int64_t rows, int64_t k, float* block) {
  constexpr int64_t kAhead = 24;
  const int64_t left = weight.cols - k, group_rows = weight.group_rows();
  const Vec base = splat(static_cast<float>(weight.base));
  auto rescaled = [&](int64_t row, int64_t at) __attribute__((always_inline)) {
    const W* w = static_cast<const W*>(weight.data) + row * weight.stride + k;
    __builtin_prefetch(w + kAhead * weight.stride + at);
    const float* col = static_cast<const float*>(weight.col) + row / group_rows * weight.rank * weight.cols + k;
    const float* scale = static_cast<const float*>(weight.row) + row * weight.rank;
    return mul(load_upto(w + at, left - at), factor(base, scale, col + at, weight.cols, weight.rank, left - at));
  };
  for (int64_t i = 0; i < rows; ++i, block += kPanel) {
    for (int64_t at = 0; at < kPanel; at += kWidth) store(block + at, rescaled(n + i, at));
  }
}

// panel [count, kPanel] = x [:, k..k + kPanel), zero-padded.
INLINE void pack_x(const float* x, int64_t stride, int64_t count, int64_t left, float* panel) {
  const int64_t some = least(kPanel, left);
  for (int64_t m = 0; m < count; ++m, panel += kPanel) {
    __builtin_memcpy(panel, x + m * stride, some * sizeof(float));
    __builtin_memset(panel + some, 0, (kPanel - some) * sizeof(float));
  }
}

// Sums of one panel of columns in one group, from tiles h [tile rows, kPanel] of G.
struct PanelSums {
  float *col, *error;  // [rank, kPanel]
  double* row;         // [rows, rank], the slot's
};

// Rank 1 and whole panels: few rows of x leave so little to multiply that this pass over the tile is half the work.
template <class W>
void reduce_tile_of_rank_one(const Weight& weight, int64_t n, int64_t rows, int64_t k, const float* h,
                             const PanelSums& sums) {
  const W* w = static_cast<const W*>(weight.data) + n * weight.stride + k;
  const float* row = static_cast<const float*>(weight.row) + n;
  const float* col = static_cast<const float*>(weight.col) + n / weight.group_rows() * weight.cols + k;
  const Vec col0 = load(col), col1 = load(col + kWidth);
  Vec sum0 = zero(), sum1 = zero();
  auto reduce_row = [&](int64_t i) __attribute__((always_inline)) {
    const Vec h0 = mul(load(h + i * kPanel), load(w + i * weight.stride));
    const Vec h1 = mul(load(h + i * kPanel + kWidth), load(w + i * weight.stride + kWidth));
    sum0 = fma(h0, splat(row[i]), sum0);
    sum1 = fma(h1, splat(row[i]), sum1);
    return fma(h0, col0, mul(h1, col1));
  };
  float totals[4];
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const Vec a = reduce_row(i), b = reduce_row(i + 1), c = reduce_row(i + 2), d = reduce_row(i + 3);
    sum4(a, b, c, d, totals);
    for (int64_t q = 0; q < 4; ++q) sums.row[n + i + q] += totals[q];
  }
  for (; i < rows; ++i) sums.row[n + i] += sum(reduce_row(i));
  add_compensated(sums.col, sums.error, sum0);
  add_compensated(sums.col + kWidth, sums.error + kWidth, sum1);
}

template <class W>
void reduce_tile(const Weight& weight, int64_t n, int64_t rows, int64_t k, float* h, const PanelSums& sums) {
  if (weight.rank == 1 && weight.cols - k >= kPanel) return reduce_tile_of_rank_one<W>(weight, n, rows, k, h, sums);
  const int64_t left = weight.cols - k, rank = weight.rank;
  const W* w = static_cast<const W*>(weight.data) + n * weight.stride + k;
  const float* row = static_cast<const float*>(weight.row) + n * rank;
  const float* col = static_cast<const float*>(weight.col) + n / weight.group_rows() * rank * weight.cols + k;
  for (int64_t i = 0; i < rows; ++i) {
    float* h_i = h + i * kPanel;
    store(h_i, mul(load(h_i), load_upto(w + i * weight.stride, left)));
    store(h_i + kWidth, mul(load(h_i + kWidth), load_upto(w + i * weight.stride + kWidth, left - kWidth)));
  }
  for (int64_t j = 0; j < rank; ++j) {
    const Vec col0 = load_upto(col + j * weight.cols, left);
    const Vec col1 = load_upto(col + j * weight.cols + kWidth, left - kWidth);
    Vec sum0 = zero(), sum1 = zero();
    for (int64_t i = 0; i < rows; i += 4) {
      Vec lanes[4];
      UNROLL for (int64_t q = 0; q < 4; ++q) {
        lanes[q] = zero();
        if (i + q >= rows) continue;
        const float* h_i = h + (i + q) * kPanel;
        const Vec h0 = load(h_i), h1 = load(h_i + kWidth), scale = splat(row[(i + q) * rank + j]);
        sum0 = fma(h0, scale, sum0);
        sum1 = fma(h1, scale, sum1);
        lanes[q] = fma(h0, col0, mul(h1, col1));
      }
      float totals[4];
      sum4(lanes[0], lanes[1], lanes[2], lanes[3], totals);
      for (int64_t q = 0; q < least(4, rows - i); ++q) sums.row[(n + i + q) * rank + j] += totals[q];
    }
    add_compensated(sums.col + j * kPanel, sums.error + j * kPanel, sum0);
    add_compensated(sums.col + j * kPanel + kWidth, sums.error + j * kPanel + kWidth, sum1);
  }
}

// One chunk of rows of x and grad_y. `partial` [slots, rows, rank] sums over chunks.
template <class W, class X>
void backward_chunk(const Backward& p, const float* x, int64_t x_stride, const float* grad_y, int64_t grad_y_stride,
                    int64_t start, int64_t count, double* partial) {
  const Weight& weight = p.weight;
  const int64_t rows = weight.rows, cols = weight.cols, rank = weight.rank, group_rows = weight.group_rows();
  const bool scales = partial != nullptr, need_x = p.grad_x != nullptr;
  PackedGradient g{grad_y, grad_y_stride, count, rows, group_rows, nullptr, nullptr};
  const int64_t across_size = rows * kTileRows, down_size = count * kTileRows;
  const Buffer across_buffer(need_x ? g.across_tiles() * across_size * sizeof(float) : 0);
  const Buffer down_buffer(scales ? g.down_tiles() * down_size * sizeof(float) : 0);
  g.across = static_cast<float*>(across_buffer.data());
  g.down = static_cast<float*>(down_buffer.data());
  const int64_t across_tiles = need_x ? g.across_tiles() : 0, down_tiles = scales ? g.down_tiles() : 0;
  auto pack = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      tile < across_tiles ? g.pack_across(tile) : g.pack_down(tile - across_tiles);
    }
  };
  parallel(across_tiles + down_tiles, pack);

  auto panels = [&](int64_t slot, int64_t begin, int64_t end) {
    const Buffer block_buffer(kChunk * kPanel * sizeof(float));  // a block of W', then the panel of x
    const Buffer sums_buffer((round_up(count, kTileRows) + 2 * rank) * kPanel * sizeof(float));
    float* block = static_cast<float*>(block_buffer.data());
    float* tile = static_cast<float*>(sums_buffer.data());  // ∂x of the panel, then one tile of G
    PanelSums sums{tile + round_up(count, kTileRows) * kPanel, nullptr, partial + slot * rows * rank};
    sums.error = sums.col + rank * kPanel;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t k = panel * kPanel, left = cols - k;
      for (int64_t n = 0; need_x && n < rows; n += kChunk) {
        const int64_t some = least(kChunk, rows - n);
        prepare_columns<W>(weight, n, some, k, block);
        for (int64_t m = 0; m < count; m += kTileRows) {
          outer_rows<kTileRows>(count - m, g.across + m / kTileRows * across_size + n * kTileRows, block, some,
                                tile + m * kPanel, n == 0);
        }
      }
      for (int64_t m = 0; need_x && m < count; ++m) {
        X* out = static_cast<X*>(p.grad_x) + (start + m) * cols + k;
        store_upto(out, load(tile + m * kPanel), left);
        store_upto(out + kWidth, load(tile + m * kPanel + kWidth), left - kWidth);
      }
      if (!scales) continue;
      pack_x(x + k, x_stride, count, left, block);
      for (int64_t group = 0; group < weight.groups; ++group) {
        __builtin_memset(sums.col, 0, 2 * rank * kPanel * sizeof(float));
        for (int64_t t = 0; t < g.group_tiles(); ++t) {
          const int64_t n = group * group_rows + t * kTileRows, some = least(kTileRows, group_rows - t * kTileRows);
          outer_rows<kTileRows>(some, g.down + (group * g.group_tiles() + t) * down_size, block, count, tile, true);
          reduce_tile<W>(weight, n, some, k, tile, sums);
        }
        for (int64_t j = 0; p.grad_col != nullptr && j < rank; ++j) {
          float* out = p.grad_col + (group * rank + j) * cols + k;
          const float* from = sums.col + j * kPanel;
          for (int64_t i = 0; i < least(kPanel, left); ++i) out[i] = start == 0 ? from[i] : out[i] + from[i];
        }
      }
    }
  };
  parallel((cols + kPanel - 1) / kPanel, panels);
}

template <class W, class X>
void panels_backward(const Backward& p, const float* x, int64_t x_stride, const float* grad_y, int64_t grad_y_stride) {
  const bool scales = p.grad_row != nullptr || p.grad_col != nullptr;
  const int64_t slots = worker_count((p.weight.cols + kPanel - 1) / kPanel), size = p.weight.rows * p.weight.rank;
  const Buffer partial(scales ? slots * size * sizeof(double) : 0);
  double* sums = scales ? static_cast<double*>(partial.data()) : nullptr;
  if (scales) __builtin_memset(sums, 0, slots * size * sizeof(double));
  for (int64_t m = 0; m < p.count; m += kChunk) {
    backward_chunk<W, X>(p, x == nullptr ? nullptr : x + m * x_stride, x_stride, grad_y + m * grad_y_stride,
                         grad_y_stride, m, least(kChunk, p.count - m), sums);
  }
  if (p.grad_row != nullptr) finish_grad_row(sums, slots, size, p.grad_row);
}

void backward_panels(const Backward& p) {
  const bool wide_weight = p.weight.type == Type::f32;
  if (p.type == Type::f32) {
    return panels_backward<float, float>(p, static_cast<const float*>(p.x.data), p.x.stride,
                                         static_cast<const float*>(p.grad_y.data), p.grad_y.stride);
  }
#ifdef RLRR_PAIRS
  if (pairs_supported()) return backward_pairs(p);
#endif
  const Widened x(p.x, p.type, p.count, p.weight.cols), g(p.grad_y, p.type, p.count, p.weight.rows);
  wide_weight ? panels_backward<float, bf16>(p, x.data, x.stride, g.data, g.stride)
              : panels_backward<bf16, bf16>(p, x.data, x.stride, g.data, g.stride);
}
