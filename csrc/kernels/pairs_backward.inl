// The backward of pairs.inl: ∂x, and G reduced in registers. Lanes are columns of W, and those of each 32 columns are split:
// the even ones, then the odd ones.

// panel [⌈rows / 2⌉, kPairPanel] = W' of `rows` rows from n and the columns from k, of which `left` exist; zero-padded.
template <class W, bool kRankOne>
SHARED void pack_rescaled(const Weight& weight, const SplitPanels& split, int64_t n, int64_t rows, int64_t k, int64_t left,
                   uint32_t* panel) {
  constexpr int64_t kAhead = 24;
  const Vec base = splat(static_cast<float>(weight.base));
  const int64_t group_rows = weight.group_rows();
  const __mmask32 elements[] = {first_elements(left), first_elements(left - 2 * kWidth)};
  alignas(64) float factors[kRankOne ? 1 : kPairRows * kPairPanel];
  const W* w = static_cast<const W*>(weight.data) + n * weight.stride + k;
  for (int64_t i = 0; i < rows; i += 2, panel += kPairPanel) {
    Vec even[2][2], odd[2][2];  // by half of the panel, by row
    const int64_t in_tile = i % kPairRows;
    if (!kRankOne && in_tile == 0) split.factors_to(weight, n + i, least(kPairRows, rows - i), k, factors);
    UNROLL for (int r = 0; r < 2; ++r) {
      if (i + r >= rows) {
        UNROLL for (int half = 0; half < 2; ++half) even[half][r] = odd[half][r] = zero();
        continue;
      }
      const float* row = static_cast<const float*>(weight.row) + n + i + r;
      const float* col = split.at((n + i + r) / group_rows, k);
      __builtin_prefetch(w + kAhead * weight.stride);
      __builtin_prefetch(w + kAhead * weight.stride + 2 * kWidth);
      UNROLL for (int half = 0; half < 2; ++half) {
        Vec f_even, f_odd;
        load_split(w + 2 * kWidth * half, elements[half], even[half][r], odd[half][r]);
        factor_split<kRankOne>(base, row, col + 2 * kWidth * half,
                               factors + (in_tile + r) * kPairPanel + 2 * kWidth * half, f_even, f_odd);
        even[half][r] = mul(even[half][r], f_even);
        odd[half][r] = mul(odd[half][r], f_odd);
      }
      w += weight.stride;
    }
    UNROLL for (int half = 0; half < 2; ++half) {
      store_pairs(panel + 2 * kWidth * half, round_pairs(even[half][0], even[half][1]));
      store_pairs(panel + 2 * kWidth * half + kWidth, round_pairs(odd[half][0], odd[half][1]));
    }
  }
}

// panel [⌈count / 2⌉, kPairPanel] = the columns of x, of which `left` exist; zero-padded.
INLINE void pack_columns(const bf16* x, int64_t stride, int64_t count, int64_t left, uint32_t* panel) {
  for (int64_t m = 0; m < count; m += 2, x += 2 * stride, panel += kPairPanel) {
    UNROLL for (int half = 0; half < 2; ++half) {
      const __mmask32 elements = first_elements(left - 2 * kWidth * half);
      const Pairs a = load_pairs(x + 2 * kWidth * half, elements);
      const Pairs b = m + 1 < count ? load_pairs(x + stride + 2 * kWidth * half, elements) : no_pairs();
      store_pairs(panel + 2 * kWidth * half, pair_even(a, b));
      store_pairs(panel + 2 * kWidth * half + kWidth, pair_odd(a, b));
    }
  }
}

// ∂x [:, k..k + kPairPanel) = g W'. `panel` holds kPairDepth rows of W', `sums` [count, kPairPanel] if W has more.
void panel_of_grad_x(const Backward& p, const PairedRows& g, const SplitPanels& split, int64_t k, uint32_t* panel,
                     float* sums) {
  const Weight& weight = p.weight;
  const int64_t rows = weight.rows, left = weight.cols - k, tiles = (p.count + kPairRows - 1) / kPairRows;
  for (int64_t n = 0; n < rows; n += kPairDepth) {
    const int64_t depth = least(kPairDepth, rows - n);
    const bool last = n + depth == rows;
    with_form(weight, [&](auto w, auto one) __attribute__((always_inline)) {
      pack_rescaled<decltype(w), decltype(one)::value>(weight, split, n, depth, k, left, panel);
    });
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = p.count * tile / tiles, after = p.count * (tile + 1) / tiles;
      auto multiply = [&](auto height) __attribute__((always_inline)) {
        constexpr int MR = decltype(height)::value;
        Vec total[MR][kPairVectors];
        UNROLL for (int i = 0; i < MR; ++i) {
          UNROLL for (int j = 0; j < kPairVectors; ++j) {
            total[i][j] = n == 0 ? zero() : load(sums + (m + i) * kPairPanel + j * kWidth);
          }
        }
        multiply_tile<MR, false>(g.data + m * g.stride + n, g.stride, panel, (depth + 1) / 2, total);
        UNROLL for (int i = 0; i < MR; ++i) {
          if (last) {
            bf16* out = static_cast<bf16*>(p.grad_x) + (m + i) * weight.cols + k;
            store_pairs(out, round_pairs(total[i][0], total[i][1]), first_elements(left));
            store_pairs(out + 2 * kWidth, round_pairs(total[i][2], total[i][3]), first_elements(left - 2 * kWidth));
            continue;
          }
          UNROLL for (int j = 0; j < kPairVectors; ++j) store(sums + (m + i) * kPairPanel + j * kWidth, total[i][j]);
        }
      };
      with_count<kPairRows>(after - m, multiply);
    }
  }
}

// A chunk of g for G: [tiles, steps, kPairRows] pairs of rows m; a tile's rows n lie in one group.
struct PackedChunk {
  const bf16* g;
  int64_t stride, count, rows, group_rows;
  uint32_t* data;

  int64_t steps() const { return (count + 1) / 2; }
  int64_t group_tiles() const { return (group_rows + kPairRows - 1) / kPairRows; }
  int64_t tiles() const { return group_tiles() * (rows / group_rows); }
  int64_t first_row(int64_t tile) const { return tile / group_tiles() * group_rows + tile % group_tiles() * kPairRows; }
  int64_t height(int64_t tile) const { return least(kPairRows, group_rows - tile % group_tiles() * kPairRows); }
  const bf16* at(int64_t tile) const { return reinterpret_cast<const bf16*>(data + tile * steps() * kPairRows); }

  // Tiles side by side share cache lines of g, so a few rows of many tiles are packed before the next rows.
  void pack(int64_t begin, int64_t end) const {
    constexpr int64_t kTogether = 16;
    for (int64_t first = begin; first < end; first += kTogether) {
      for (int64_t block = 0; block < count; block += kTogether) {
        const int64_t last = least(block + kTogether, count);
        for (int64_t tile = first; tile < least(first + kTogether, end); ++tile) {
          const int64_t some = height(tile);
          const bf16* from = g + block * stride + first_row(tile);
          uint32_t* out = data + (tile * steps() + block / 2) * kPairRows;
          int64_t m = block;
          for (; m + 1 < last; m += 2, from += 2 * stride, out += kPairRows) interleave_first(out, from, from + stride, some);
          if (m < last) interleave_first(out, from, nullptr, some);
        }
      }
    }
  }
};

// h = G ⊙ W for a tile of G, rows from n and columns from k.
template <int MR>
INLINE void times_weight(const Weight& weight, int64_t n, int64_t k, Vec (&h)[MR][kPairVectors]) {
  const int64_t left = weight.cols - k;
  const __mmask32 elements[] = {first_elements(left), first_elements(left - 2 * kWidth)};
  with_weight(weight, n, k, [&](const auto* w) __attribute__((always_inline)) {
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int half = 0; half < 2; ++half) {
        Vec even, odd;
        load_split(w + i * weight.stride + 2 * kWidth * half, elements[half], even, odd);
        h[i][2 * half] = mul(h[i][2 * half], even);
        h[i][2 * half + 1] = mul(h[i][2 * half + 1], odd);
      }
    }
  });
}

// Rank 1: adds a tile h to the lanes of ∂s_r [kPairRows, kWidth] and to the panel's ∂s_c [kPairPanel].
template <int MR>
INLINE void reduce_pairs(const float* row, const float* col, const Vec (&h)[MR][kPairVectors], float* row_lanes,
                         float* col_sums) {
  Vec lanes[MR];
  UNROLL for (int i = 0; i < MR; ++i) lanes[i] = load(row_lanes + i * kWidth);
  UNROLL for (int j = 0; j < kPairVectors; ++j) {
    const Vec col_j = load(col + j * kWidth);
    Vec sum = load(col_sums + j * kWidth);
    UNROLL for (int i = 0; i < MR; ++i) {
      lanes[i] = fma(h[i][j], col_j, lanes[i]);
      sum = fma(h[i][j], splat(row[i]), sum);
    }
    store(col_sums + j * kWidth, sum);
  }
  UNROLL for (int i = 0; i < MR; ++i) store(row_lanes + i * kWidth, lanes[i]);
}

// Where one slot sums scale gradients: `panels` holds the panels of x that share a reading of g, `col` [panels, rank,
// kPairPanel], `tiles` the lanes of ∂s_r [kPairRows, kWidth] of rank 1, else kPairHeld tiles of G ⊙ W. ∂s_r goes to `row`,
// [rows] of rank 1, else [rows, lanes], and ∂s_c to `grad_col` (null: not needed).
struct ScaleSums {
  uint32_t* panels;
  float *col, *tiles, *row, *grad_col;
};

constexpr int64_t kPairHeld = 8;

// The columns [k, end) of x, as many rows as a chunk of g, contracted with it: adds to the sums.
void panels_of_scales(const Weight& weight, const SplitPanels& split, const PackedChunk& g, const bf16* x,
                      int64_t x_stride, int64_t k, int64_t end, const ScaleSums& sums) {
  const int64_t rank = weight.rank, steps = g.steps(), held = rank == 1 ? 1 : kPairHeld;
  const float* row = static_cast<const float*>(weight.row);
  for (int64_t at = k, i = 0; at < end; at += kPairPanel, ++i) {
    pack_columns(x + at, x_stride, g.count, weight.cols - at, sums.panels + i * steps * kPairPanel);
  }
  for (int64_t group = 0; group < weight.groups; ++group) {
    __builtin_memset(sums.col, 0, (end - k + kPairPanel - 1) / kPairPanel * rank * kPairPanel * sizeof(float));
    const int64_t last_tile = (group + 1) * g.group_tiles();
    for (int64_t first_tile = group * g.group_tiles(); first_tile < last_tile; first_tile += held) {
      const int64_t until = least(first_tile + held, last_tile), first = g.first_row(first_tile);
      if (rank == 1) __builtin_memset(sums.tiles, 0, kPairRows * kWidth * sizeof(float));
      for (int64_t at = k, i = 0; at < end; at += kPairPanel, ++i) {
        float *col_sums = sums.col + i * rank * kPairPanel, *h = sums.tiles;
        for (int64_t tile = first_tile; tile < until; ++tile) {
          const int64_t n = g.first_row(tile), height = g.height(tile);
          with_weight(weight, n + height, at, [&](const auto* next) __attribute__((always_inline)) {
            for (int64_t line = 0; line < height; ++line, next += weight.stride) {
              __builtin_prefetch(next, 0, 2);
              __builtin_prefetch(next + 2 * kWidth, 0, 2);
            }
          });
          auto multiply = [&](auto rows) __attribute__((always_inline)) {
            constexpr int MR = decltype(rows)::value;
            Vec total[MR][kPairVectors];
            clear(total);
            multiply_tile<MR, true>(g.at(tile), 0, sums.panels + i * steps * kPairPanel, steps, total);
            times_weight<MR>(weight, n, at, total);
            if (rank == 1) return reduce_pairs<MR>(row + n, split.at(group, at), total, sums.tiles, col_sums);
            UNROLL for (int r = 0; r < MR; ++r) {
              UNROLL for (int j = 0; j < kPairVectors; ++j) store(h + r * kPairPanel + j * kWidth, total[r][j]);
            }
          };
          with_count<kPairRows>(height, multiply);
          h += height * kPairPanel;
        }
        if (rank == 1) continue;
        split.reduce<false>(weight, first, (h - sums.tiles) / kPairPanel, at, sums.tiles, col_sums, nullptr, sums.row);
      }
      for (int64_t i = 0; rank == 1 && i < g.height(first_tile); ++i) {
        sums.row[first + i] += sum(load(sums.tiles + i * kWidth));
      }
    }
    for (int64_t at = k, i = 0; sums.grad_col != nullptr && at < end; at += kPairPanel, ++i) {
      for (int64_t r = 0; r < rank; ++r) {
        float* out = sums.grad_col + (group * rank + r) * weight.cols + at;
        const float* from = sums.col + (i * rank + r) * kPairPanel;
        for (int64_t c = 0; c < least(kPairPanel, weight.cols - at); ++c) {
          out[c] += from[c / (2 * kWidth) * 2 * kWidth + c % 2 * kWidth + c % (2 * kWidth) / 2];
        }
      }
    }
  }
}

void backward_pairs(const Backward& p) {
  const Weight& weight = p.weight;
  const int64_t rows = weight.rows, cols = weight.cols, rank = weight.rank, panels = (cols + kPairPanel - 1) / kPairPanel;
  const bool scales = p.grad_row != nullptr || p.grad_col != nullptr, one = rank == 1;
  const Run all{0, p.count};
  const PairedRows g(p.grad_y, &all, p.count, rows);
  const SplitPanels split(weight, scales && !one);
  const int64_t slots = worker_count(panels), size = rows * (one ? 1 : split.lanes);
  const Buffer partial(scales ? slots * size * sizeof(float) : 0);
  float* row_sums = static_cast<float*>(partial.data());
  if (scales) __builtin_memset(row_sums, 0, slots * size * sizeof(float));
  if (p.grad_col != nullptr) __builtin_memset(p.grad_col, 0, weight.groups * rank * cols * sizeof(float));
  const int64_t chunks = (p.count + kPairChunk - 1) / kPairChunk, most_rows = round_up((p.count + chunks - 1) / chunks, 2);
  const int64_t together = most(1, least(kPairGroup, kPairHeldX / most_rows));
  PackedChunk chunk{nullptr, p.grad_y.stride, least(p.count, most_rows), rows, weight.group_rows(), nullptr};
  const Buffer chunk_buffer(scales ? chunk.tiles() * chunk.steps() * kPairRows * sizeof(uint32_t) : 0);
  chunk.data = static_cast<uint32_t*>(chunk_buffer.data());
  for (int64_t start = 0; start == 0 || (scales && start < p.count); start += most_rows) {
    if (scales) {
      chunk.g = static_cast<const bf16*>(p.grad_y.data) + start * p.grad_y.stride;
      chunk.count = least(most_rows, p.count - start);
      auto pack = [&](int64_t, int64_t begin, int64_t end) { chunk.pack(begin, end); };
      if (chunk.count * rows < 1 << 16) {
        pack(0, 0, chunk.tiles());
      } else {
        parallel(chunk.tiles(), pack);
      }
    }
    auto body = [&](int64_t slot, int64_t begin, int64_t end) {
      const bool need_x = p.grad_x != nullptr && start == 0;
      const int64_t held = most(need_x ? (least(rows, kPairDepth) + 1) / 2 : 0, scales ? together * chunk.steps() : 0);
      const int64_t tall = need_x && rows > kPairDepth ? p.count * kPairPanel : 0;
      const int64_t tiles = one ? kPairRows * kWidth : kPairHeld * kPairRows * kPairPanel;
      const int64_t scale_sums = scales ? rank * together * kPairPanel + tiles : 0;
      const Buffer panel_buffer(held * kPairPanel * sizeof(uint32_t)), sums_buffer((tall + scale_sums) * sizeof(float));
      uint32_t* panels = static_cast<uint32_t*>(panel_buffer.data());
      float* sums = static_cast<float*>(sums_buffer.data());
      const ScaleSums scale{panels, sums + tall, sums + tall + rank * together * kPairPanel, row_sums + slot * size,
                            p.grad_col};
      for (int64_t index = begin; index < end; index += together) {
        const int64_t last = least(index + together, end);
        for (int64_t i = index; need_x && i < last; ++i) {
          panel_of_grad_x(p, g, split, i * kPairPanel, panels, sums);
        }
        if (!scales) continue;
        const bf16* x = static_cast<const bf16*>(p.x.data) + start * p.x.stride;
        panels_of_scales(weight, split, chunk, x, p.x.stride, index * kPairPanel, last * kPairPanel, scale);
      }
    };
    parallel(panels, body);
  }
  if (p.grad_row == nullptr) return;
  one ? finish_grad_row(row_sums, slots, rows, p.grad_row) : split.finish(row_sums, slots, rows, p.grad_row);
}
