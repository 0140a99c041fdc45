// More rows of x: three matrix products on tiles that stay in registers and in the L1 cache. W' is made a block at a time
// right where it is multiplied, and a tile of G = gᵀx is multiplied by W and summed without leaving the core.
//
// Everything here is fp32 (a bfloat16 x is widened first): pairs.inl has what processors with bf16 products run. Packed
// operands are zero-padded, so tails cost a branch at the edge and none inside.

constexpr int64_t kPanel = 2 * kWidth;  // columns of one outer-product tile
constexpr int64_t kChunk = 1024;        // most rows of x contracted into G before its sums are taken
constexpr int64_t kBlock = 256;         // rows of W' made together in backward
constexpr int64_t kTogether = 4;        // panels that share one reading of g in backward
constexpr int64_t kRun = 64;            // elements contracted in one run of additions
constexpr int64_t kBlockRows = 8;       // rows of W' prepared together in forward
constexpr int64_t kDepth = kWidth < 8 ? 512 : 768;  // columns of such a block, up to 24 KiB: 4 lanes lose to eager above
constexpr int64_t kHeldBlocks = 8;      // such blocks that many rows of x are multiplied by: in the L2 cache
constexpr int64_t kFewRows = 192;       // rows of x that stay in the L2 cache
constexpr int64_t kRows = 2048;         // rows of x for which W' is made once in forward
constexpr int64_t kReduceRows = 64 / kTileRows * kTileRows;  // rows of G ⊙ W summed together: at least one tile

using Panels = ScalePanels<kTileRows, 2, InOrder>;

// out = f ⊙ W for two vectors at w, of which `left` columns exist.
template <class W>
INLINE void rescale_two(const W* w, int64_t ahead, int64_t left, Vec f0, Vec f1, float* out) {
  Vec a, b;
  __builtin_prefetch(w + ahead);
  if (sizeof(W) * kPanel > 64) __builtin_prefetch(w + ahead + kWidth);
  InOrder::load_two(w, left, a, b);
  store(out, mul(f0, a));
  store(out + kWidth, mul(f1, b));
}

// out [rows, kPanel], rows `stride` apart, = W' of higher ranks: rows from n, of which w is the first, and columns from k.
// `ahead`: which row to fetch.
template <class W>
SHARED void rescale_ranks(const Weight& weight, const Panels& panels, int64_t n, int64_t rows, int64_t k, const W* w,
                          int64_t ahead, float* out, int64_t stride) {
  const int64_t left = weight.cols - k;
  const auto put = [&](int64_t i, const Vec (&f)[2], int64_t columns) __attribute__((always_inline)) {
    rescale_two(w + i * weight.stride, ahead * weight.stride, columns, f[0], f[1], out + i * stride);
  };
  if (left >= kPanel) {
    panels.factors(weight, n, rows, k, [&](int64_t i, const Vec (&f)[2]) __attribute__((always_inline)) {
      put(i, f, kPanel);
    });
  } else {
    panels.factors(weight, n, rows, k, [&](int64_t i, const Vec (&f)[2]) __attribute__((always_inline)) { put(i, f, left); });
  }
}

// ---------------------------------------------------------------- forward: vectors run along the contraction

// out [MR, 4], rows `stride` apart, (+)= x [MR, depth] · w [4, depth]ᵀ; w is zero-padded to whole vectors.
template <int MR>
void dot_tile(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t depth, float* out, int64_t stride,
              bool first) {
  Vec total[MR][4];
  clear(total);
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
    UNROLL for (int i = 0; i < 4; ++i) out[m * stride + i] = first ? sums[i] : out[m * stride + i] + sums[i];
  }
}

// block [kBlockRows, stride] = W' [n.., k..k + depth), zero-padded to whole panels and to kBlockRows rows of one group.
void prepare_rows(const Weight& weight, const Panels& panels, int64_t n, int64_t rows, int64_t k, int64_t depth,
                  float* block, int64_t stride) {
  const float* row = static_cast<const float*>(weight.row) + n;
  const float* col = static_cast<const float*>(weight.col) + n / weight.group_rows() * weight.cols + k;
  const Vec base = splat(static_cast<float>(weight.base));
  with_weight(weight, n, k, [&](const auto* w) __attribute__((always_inline)) {
    if (weight.rank == 1) {
      for (int64_t i = 0; i < rows; ++i) {
        const auto* w_i = w + i * weight.stride;
        const Vec scale = splat(row[i]);
        for (int64_t at = 0; at < stride; at += kWidth) {
          const Vec f = fma(scale, load_upto(col + at, depth - at), base);
          store(block + i * stride + at, mul(load_upto(w_i + at, depth - at), f));
        }
      }
      return;
    }
    for (int64_t at = 0; at < stride; at += kPanel) {
      rescale_ranks(weight, panels, n, rows, k + at, w + at, kBlockRows, block + at, stride);
    }
  });
  __builtin_memset(block + rows * stride, 0, (kBlockRows - rows) * stride * sizeof(float));
}

void forward_panels(const Forward& p) {
#ifdef RLRR_PAIRS
  if (p.type == Type::bf16 && pairs_supported()) return pairs_avx512.forward_panels(p);
#endif
  const Weight& weight = p.weight;
  const Widened x(p.x, p.type, p.runs, p.count, weight.cols);
  const int64_t cols = weight.cols, group_rows = weight.group_rows();
  const int64_t blocks = (group_rows + kBlockRows - 1) / kBlockRows;
  const int64_t deepest = round_up(least(cols, kDepth), kPanel);
  const Panels panels(weight, false);
  // Few rows of x stay in the L2 cache, and a block of W' in the L1 cache. Else several blocks stay in the L2 cache, and a
  // tile of x in the L1 cache.
  const int64_t held = p.count <= kFewRows ? 1 : kHeldBlocks, width = held * kBlockRows;
  auto body = [&](int64_t, int64_t begin, int64_t end) {
    const Buffer block_buffer(width * deepest * sizeof(float)), sums_buffer(least(p.count, kRows) * width * sizeof(float));
    float* w = static_cast<float*>(block_buffer.data());
    float* sums = static_cast<float*>(sums_buffer.data());
    auto first_row = [&](int64_t block) { return block / blocks * group_rows + block % blocks * kBlockRows; };
    auto height = [&](int64_t block) { return least(kBlockRows, group_rows - block % blocks * kBlockRows); };
    for (int64_t start = 0; start < p.count; start += kRows) {
      const int64_t count = least(kRows, p.count - start);
      for (int64_t block = begin; block < end; block += held) {
        const int64_t some = least(held, end - block);
        for (int64_t k = 0; k < cols; k += kDepth) {
          const int64_t depth = least(kDepth, cols - k), stride = round_up(depth, kPanel), size = kBlockRows * stride;
          for (int64_t b = 0; b < some; ++b) {
            prepare_rows(weight, panels, first_row(block + b), height(block + b), k, depth, w + b * size, stride);
          }
          for_runs(p.runs, start, count, [&](int64_t first, int64_t row, int64_t rows) __attribute__((always_inline)) {
            for (int64_t m = 0; m < rows; m += kDotRows) {
              const float* x_m = x.at(first + m, row + m) + k;
              float* sums_m = sums + (first - start + m) * width;
              auto tile = [&](auto height) __attribute__((always_inline)) {
                constexpr int MR = decltype(height)::value;
                for (int64_t i = 0; i < some * kBlockRows; i += 4) {
                  dot_tile<MR>(x_m, x.stride, w + i * stride, stride, depth, sums_m + i, width, k == 0);
                }
              };
              with_count<kDotRows>(least(kDotRows, rows - m), tile);
            }
          });
        }
        for (int64_t b = 0; b < some; ++b) {
          const int64_t n = first_row(block + b), rows = height(block + b);
          for (int64_t i = 0; i < rows; i += kWidth) {
            const Vec bias = load_bias(p.bias, n + i, rows - i);
            for_runs(p.runs, start, count, [&](int64_t first, int64_t row, int64_t some_rows) {
              const float* from = sums + (first - start) * width + b * kBlockRows + i;
              for (int64_t m = 0; m < some_rows; ++m, from += width) {
                const Vec value = add(load_upto(from, kBlockRows - i), bias);
                store_upto(p.type, p.y, (row + m) * weight.rows + n + i, value, rows - i);
              }
            });
          }
        }
      }
    }
  };
  parallel(blocks * weight.groups, body);
}

// ---------------------------------------------------------------- backward: vectors run along the columns of W

// out [MR, kPanel] (+)= Σ_s a[s, :MR] ⊗ b[s, :]; a has rows of kTileRows, b of kPanel.
template <int MR>
INLINE void outer_tile(const float* a, const float* b, int64_t steps, float* out, bool first) {
  Vec total[MR][2];
  multiply_few(a, 1, kTileRows, b, kPanel, steps, total);
  UNROLL for (int i = 0; i < MR; ++i) {
    float* row = out + i * kPanel;
    store(row, first ? total[i][0] : add(load(row), total[i][0]));
    store(row + kWidth, first ? total[i][1] : add(load(row + kWidth), total[i][1]));
  }
}

// The same for the first `rows` of kTileRows, or as many as there are.
SHARED void outer_rows(int64_t rows, const float* a, const float* b, int64_t steps, float* out, bool first) {
  auto tile = [&](auto height) __attribute__((always_inline)) {
    // One accumulator over thousands of terms would lose digits to eager's blocked sums.
    for (int64_t s = 0; s < steps; s += kRun) {
      outer_tile<decltype(height)::value>(a + s * kTileRows, b + s * kPanel, least(kRun, steps - s), out, first && s == 0);
    }
  };
  with_count<kTileRows>(least(kTileRows, rows), tile);
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
void prepare_columns(const Weight& weight, const Panels& panels, int64_t n, int64_t rows, int64_t k, float* block) {
  constexpr int64_t kAhead = 24;
  const int64_t left = weight.cols - k, group_rows = weight.group_rows();
  const Vec base = splat(static_cast<float>(weight.base));
  with_weight(weight, n, k, [&](const auto* w) __attribute__((always_inline)) {
    if (weight.rank > 1) return rescale_ranks(weight, panels, n, rows, k, w, kAhead, block, kPanel);
    for (int64_t i = 0; i < rows; ++i) {
      const float* col = static_cast<const float*>(weight.col) + (n + i) / group_rows * weight.cols + k;
      const Vec scale = splat(static_cast<const float*>(weight.row)[n + i]);
      Vec a, b;
      InOrder::load_two(col, left, a, b);
      rescale_two(w + i * weight.stride, kAhead * weight.stride, left, fma(scale, a, base), fma(scale, b, base),
                  block + i * kPanel);
    }
  });
}

// panel [count, kPanel] = x [:, k..k + kPanel), zero-padded.
INLINE void pack_x(const float* x, int64_t stride, int64_t count, int64_t left, float* panel) {
  const int64_t some = least(kPanel, left);
  for (int64_t m = 0; m < count; ++m, panel += kPanel) {
    __builtin_memcpy(panel, x + m * stride, some * sizeof(float));
    __builtin_memset(panel + some, 0, (kPanel - some) * sizeof(float));
  }
}

// Sums of one panel of columns in one group, from tiles of G ⊙ W.
struct PanelSums {
  float *col, *error;  // [rank, kPanel]
  double* row;         // of rank 1: [rows], the slot's
  float* row_lanes;    // of higher ranks: [rows, lanes], the slot's
};

// Rank 1: few rows of x leave so little to multiply that this pass over a tile h of G is half the work.
template <bool kWhole, class W>
void reduce_tile(const Weight& weight, int64_t n, int64_t rows, int64_t k, const W* w, const float* h,
                 const PanelSums& sums) {
  const int64_t left = kWhole ? kPanel : weight.cols - k;
  const float* row = static_cast<const float*>(weight.row) + n;
  const float* col = static_cast<const float*>(weight.col) + n / weight.group_rows() * weight.cols + k;
  Vec col0, col1, sum0 = zero(), sum1 = zero();
  InOrder::load_two(col, left, col0, col1);
  auto reduce_row = [&](int64_t i) __attribute__((always_inline)) {
    Vec h0, h1;
    InOrder::load_two(w + i * weight.stride, left, h0, h1);
    h0 = mul(h0, load(h + i * kPanel));
    h1 = mul(h1, load(h + i * kPanel + kWidth));
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

// Adds the rows `at`.. of a group, at most kReduceRows, and the panel of column k: G from `g` and the panel of x, into `tile`.
void reduce_rows(const Weight& weight, const Panels& panels, const PackedGradient& g, int64_t group, int64_t at, int64_t k,
                 const float* x, float* tile, const PanelSums& sums) {
  const int64_t last = least(at + kReduceRows, g.group_rows), n = group * g.group_rows, left = weight.cols - k;
  float* h = tile;
  for (int64_t row = at; row < last; row += kTileRows) {
    const int64_t some = least(kTileRows, last - row);
    const float* a = g.down + (group * g.group_tiles() + row / kTileRows) * g.count * kTileRows;
    outer_rows(some, a, x, g.count, h, true);
    with_weight(weight, n + row, k, [&](const auto* w) __attribute__((always_inline)) {
      if (weight.rank == 1) {
        left >= kPanel ? reduce_tile<true>(weight, n + row, some, k, w, h, sums)
                       : reduce_tile<false>(weight, n + row, some, k, w, h, sums);
        return;
      }
      for (int64_t i = 0; i < some; ++i, h += kPanel) {
        rescale_two(w + i * weight.stride, kTileRows * weight.stride, left, load(h), load(h + kWidth), h);
      }
    });
  }
  if (weight.rank == 1) return;
  panels.reduce<true>(weight, n + at, last - at, k, tile, sums.col, sums.error, sums.row_lanes);
}

// One chunk of rows of x and grad_y. `partial`, the ∂s_r of PanelSums by slot, sums over chunks.
void backward_chunk(const Backward& p, const Panels& panels, const float* x, int64_t x_stride, const float* grad_y,
                    int64_t grad_y_stride, int64_t start, int64_t count, void* partial) {
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

  auto body = [&](int64_t slot, int64_t begin, int64_t end) {
    const int64_t together = least(kTogether, end - begin), block_size = most(kBlock, count) * kPanel;
    const int64_t tile_size = most(round_up(count, kTileRows), kReduceRows) * kPanel, col_size = rank * kPanel;
    const Buffer block_buffer(together * block_size * sizeof(float)), tile_buffer(together * tile_size * sizeof(float));
    const Buffer col_buffer(together * 2 * col_size * sizeof(float));
    float* blocks = static_cast<float*>(block_buffer.data());  // of W', then panels of x
    float* tiles = static_cast<float*>(tile_buffer.data());    // ∂x of the panels, then tiles of G
    float* cols_sums = static_cast<float*>(col_buffer.data());
    auto sums_of = [&](int64_t i) {
      float* col = cols_sums + i * 2 * col_size;
      return PanelSums{col, col + col_size, static_cast<double*>(partial) + slot * rows,
                       static_cast<float*>(partial) + slot * rows * panels.lanes};
    };
    for (int64_t panel = begin; panel < end; panel += together) {
      const int64_t some_panels = least(together, end - panel), k = panel * kPanel;
      for (int64_t n = 0; need_x && n < rows; n += kBlock) {
        const int64_t some = least(kBlock, rows - n);
        for (int64_t i = 0; i < some_panels; ++i) {
          prepare_columns(weight, panels, n, some, k + i * kPanel, blocks + i * block_size);
        }
        for (int64_t m = 0; m < count; m += kTileRows) {
          const float* a = g.across + m / kTileRows * across_size + n * kTileRows;
          for (int64_t i = 0; i < some_panels; ++i) {
            outer_rows(count - m, a, blocks + i * block_size, some, tiles + i * tile_size + m * kPanel, n == 0);
          }
        }
      }
      for (int64_t m = 0; need_x && m < count; ++m) {
        for (int64_t i = 0; i < some_panels; ++i) {
          const float* from = tiles + i * tile_size + m * kPanel;
          const int64_t at = k + i * kPanel, out = (start + m) * cols + at;
          store_upto(p.type, p.grad_x, out, load(from), cols - at);
          store_upto(p.type, p.grad_x, out + kWidth, load(from + kWidth), cols - at - kWidth);
        }
      }
      if (!scales) continue;
      for (int64_t i = 0; i < some_panels; ++i) {
        pack_x(x + k + i * kPanel, x_stride, count, cols - k - i * kPanel, blocks + i * block_size);
      }
      for (int64_t group = 0; group < weight.groups; ++group) {
        __builtin_memset(cols_sums, 0, some_panels * 2 * col_size * sizeof(float));
        for (int64_t at = 0; at < group_rows; at += kReduceRows) {
          for (int64_t i = 0; i < some_panels; ++i) {
            reduce_rows(weight, panels, g, group, at, k + i * kPanel, blocks + i * block_size, tiles, sums_of(i));
          }
        }
        for (int64_t i = 0; p.grad_col != nullptr && i < some_panels; ++i) {
          const int64_t at = k + i * kPanel;
          for (int64_t j = 0; j < rank; ++j) {
            float* out = p.grad_col + (group * rank + j) * cols + at;
            const float* from = sums_of(i).col + j * kPanel;
            for (int64_t c = 0; c < least(kPanel, cols - at); ++c) out[c] = start == 0 ? from[c] : out[c] + from[c];
          }
        }
      }
    }
  };
  parallel((cols + kPanel - 1) / kPanel, body);
}

void backward_panels(const Backward& p) {
#ifdef RLRR_PAIRS
  if (p.type == Type::bf16 && pairs_supported()) return pairs_avx512.backward_panels(p);
#endif
  const Widened x(p.x, p.type, p.count, p.weight.cols), g(p.grad_y, p.type, p.count, p.weight.rows);
  const bool scales = p.grad_row != nullptr || p.grad_col != nullptr, one = p.weight.rank == 1;
  const int64_t slots = worker_count((p.weight.cols + kPanel - 1) / kPanel), rows = p.weight.rows;
  const Panels panels(p.weight, scales && !one);
  const int64_t bytes = scales ? slots * rows * (one ? sizeof(double) : panels.lanes * sizeof(float)) : 0;
  const Buffer partial(bytes);
  if (scales) __builtin_memset(partial.data(), 0, bytes);
  const int64_t chunks = (p.count + kChunk - 1) / kChunk, chunk = round_up((p.count + chunks - 1) / chunks, kTileRows);
  for (int64_t m = 0; m < p.count; m += chunk) {
    backward_chunk(p, panels, scales ? x.data + m * x.stride : nullptr, x.stride, g.data + m * g.stride, g.stride, m,
                   least(chunk, p.count - m), scales ? partial.data() : nullptr);
  }
  if (p.grad_row == nullptr) return;
  one ? finish_grad_row(static_cast<const double*>(partial.data()), slots, rows, p.grad_row)
      : panels.finish(static_cast<const float*>(partial.data()), slots, rows, p.grad_row);
}
